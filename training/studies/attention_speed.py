"""Time one layer's attention, by Transformers' ways and by ours.

Question: is our attention faster than that of Transformers where heads share keys (GQA)?
Answer: yes, on a CPU. A lone token takes a quarter to a tenth of the time, several tokens with a mask a half to three
quarters. Of a prompt, two products of matrices take ANSWER of the time of PyTorch's kernel.

    python -m training.studies.attention_speed

Method: one layer with random numbers, in the sizes of SmolLM2-135M in bfloat16; keys and values of thirty layers in
turn, as in a model. The products are compiled, as in packaged code.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import repeat_kv

from transformers_resps.verifying.attention import attend, multiplied, stacked


HEADS, KEY_HEADS, HEAD_SIZE, LAYERS, REPEATS = 9, 3, 64, 30, 20
# Rows, tokens of each, context.
PLACES = ((1, 1, 150), (1, 1, 800), (1, 8, 800), (8, 1, 250), (8, 3, 250), (1, 32, 250), (1, 150, 0), (1, 250, 500))
Way = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def copied(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Attend as Transformers does for several tokens with a mask: keys and values are copied."""
    key, value = (repeat_kv(states, HEADS // KEY_HEADS) for states in (key, value))
    return scaled_dot_product_attention(query, key, value, attn_mask=mask)


def shared(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Attend with PyTorch's shared keys, as Transformers does where there is no mask."""
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


def by_products(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Attend as packaged code does to long prompts."""
    rows, heads, count, width = query.shape
    mask = stacked(mask, heads // KEY_HEADS, 1)
    attended = multiplied(query.reshape(rows, KEY_HEADS, -1, width), key, value, mask, width**-0.5)
    return attended.reshape(query.shape)


def milliseconds(way: Way, rows: int, tokens: int, past: int) -> float:
    """Return the median time of one layer."""
    query = torch.randn(rows, tokens, HEADS, HEAD_SIZE, dtype=torch.bfloat16).transpose(1, 2)
    keys, values = torch.randn(2, LAYERS, rows, KEY_HEADS, past + tokens, HEAD_SIZE, dtype=torch.bfloat16)
    mask = torch.zeros(rows, 1, tokens, past + tokens, dtype=torch.bfloat16)
    taken = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        for key, value in zip(keys, values, strict=True):
            way(query, key, value, mask)
        taken.append(time.perf_counter() - started)
    return 1e3 * median(taken) / LAYERS


@torch.inference_mode()
def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.manual_seed(0)
    ways = copied, shared, attend, torch.compile(by_products, dynamic=True)
    print("| rows, tokens, context | copies | `enable_gqa` | ours | products |\n|---|---:|---:|---:|---:|")
    for place in PLACES:
        cells = " | ".join(f"{milliseconds(way, *place):.2f}" for way in ways)
        print(f"| {', '.join(map(str, place))} | {cells} |")


if __name__ == "__main__":
    main()
