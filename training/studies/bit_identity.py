"""Compare the parts of a tree's forward with one-token decoding, bit for bit.

Question: which parts of a forward over a tree are bit for bit those of one-token decoding on this machine?
Answer, for AMD EPYC with and without AVX-512: in float32 norms always, prepacked linear layers mostly (their sums over
1,536 inputs differ where the CPU has AVX-512), and attention almost never: it moves a row by two millionths of its
largest number. In bfloat16 nearly all linear layers and eager attention; of SDPA's rows half to two thirds.

    python -m training.studies.bit_identity

Method: random numbers in the sizes of SmolLM2-135M, one part at a time. Every node of every tree is computed among the
others and alone. `resps verify TARGET --rounding` asks the same of whole forwards.
"""

import argparse
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm, eager_attention_forward

from transformers_resps import prepack
from transformers_resps.verifying.attention import grouped_attention


HIDDEN, INNER, VOCABULARY, HEADS, KEY_HEADS, HEAD_SIZE = 576, 1536, 49152, 9, 3, 64
NODE_COUNTS = (1, 2, 3, 4, 5, 8, 13, 16, 32, 48, 64)
PASTS = (37, 300, 1000)
LONE = "a lone token, sdpa and our attention"
Attention = Callable[..., tuple[Tensor, Tensor | None]]
Case = tuple[Tensor, Tensor]  # a row alone, and the same row among others


def linear_cases(layer: nn.Linear, dtype: torch.dtype) -> Iterator[Case]:
    states = torch.randn(max(NODE_COUNTS), layer.in_features, dtype=dtype)
    for count in NODE_COUNTS:
        together = layer(states[None, :count])[0]
        for row in range(count):
            yield layer(states[None, row : row + 1])[0, 0], together[row]


def norm_cases(dtype: torch.dtype) -> Iterator[Case]:
    norm, states = LlamaRMSNorm(HIDDEN).to(dtype), torch.randn(1, max(NODE_COUNTS), HIDDEN, dtype=dtype)
    together = norm(states)
    for row in range(states.shape[1]):
        yield norm(states[:, row : row + 1])[0, 0], together[0, row]


class Attending:
    """One layer's attention over a chain of nodes after cached positions.

    Args:
        attention: of Transformers.
        dtype: of keys, values and queries.
    """

    def __init__(self, attention: Attention, dtype: torch.dtype) -> None:
        config = LlamaConfig(hidden_size=HIDDEN, num_attention_heads=HEADS, num_key_value_heads=KEY_HEADS)
        self.layer = LlamaAttention(config, 0).eval()
        self.attention, self.dtype = attention, dtype

    def run(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        return self.attention(self.layer, query, keys, values, mask, scaling=HEAD_SIZE**-0.5, dropout=0.0)[0]

    def states(self, heads: int, length: int) -> Tensor:
        return torch.randn(1, heads, length, HEAD_SIZE, dtype=self.dtype)

    def mask(self, past: int, count: int) -> Tensor:
        hidden = torch.ones(count, past + count, dtype=torch.bool).triu(past + 1)
        return torch.zeros(1, 1, count, past + count, dtype=self.dtype).masked_fill(
            hidden, torch.finfo(self.dtype).min
        )

    def cases(self, variant: str) -> Iterator[Case]:
        for past in PASTS:
            for count in NODE_COUNTS:
                query, keys, values = (
                    self.states(heads, length)
                    for heads, length in ((HEADS, count), (KEY_HEADS, past + count), (KEY_HEADS, past + count))
                )
                mask = self.mask(past, count)
                together = self.run(query, keys, values, mask)[0] if variant == "a tree" else None
                for node in range(count):
                    end, own = past + node + 1, query[:, :, node : node + 1]
                    alone = self.run(own, keys[:, :, :end], values[:, :, :end], None)[0, 0]
                    if together is not None:
                        yield alone, together[node]
                    elif variant == LONE:
                        seen = (own, keys[:, :, :end], values[:, :, :end], None)
                        yield alone, grouped_attention(self.layer, *seen, scaling=HEAD_SIZE**-0.5)[0][0, 0]
                    elif variant == "a mask of zeros":
                        row = mask[:, :, node : node + 1, :end]
                        yield alone, self.run(own, keys[:, :, :end], values[:, :, :end], row)[0, 0]
                    else:
                        yield alone, self.run(own, keys, values, mask[:, :, node : node + 1])[0, 0]


def report(part: str, cases: Iterator[Case]) -> None:
    equal, moved, total = 0, 0.0, 0
    for alone, together in cases:
        total += 1
        equal += torch.equal(alone, together)
        moved = max(moved, float((alone - together).abs().max() / alone.abs().max()))
    print(f"| {part} | {equal} of {total} | {moved:.1e} |", flush=True)


@torch.inference_mode(False)
@torch.no_grad()
def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.manual_seed(0)
    print("| part | rows equal bit for bit | most moved, of the largest |\n|---|---:|---:|")
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        report(f"{name}, norm", norm_cases(dtype))
        for inputs, outputs in ((HIDDEN, HIDDEN), (HIDDEN, INNER), (INNER, HIDDEN), (HIDDEN, VOCABULARY)):
            layer = nn.Linear(inputs, outputs, bias=False).to(dtype)
            report(f"{name}, linear {inputs} to {outputs}", linear_cases(layer, dtype))
            report(f"{name}, linear {inputs} to {outputs}, packed", linear_cases(prepack(layer), dtype))
        report(f"{name}, {LONE}", Attending(sdpa_attention_forward, dtype).cases(LONE))
        for attention in (sdpa_attention_forward, eager_attention_forward):
            for variant in ("a mask of zeros", "masked keys after it", "a tree"):
                kind = attention.__name__.split("_")[0]
                report(f"{name}, {kind} attention, {variant}", Attending(attention, dtype).cases(variant))


if __name__ == "__main__":
    main()
