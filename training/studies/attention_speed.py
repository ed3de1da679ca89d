"""Time one layer's attention, by Transformers' ways and by ours.

Question: is our attention faster than that of Transformers where heads share keys (GQA)?
Answer: yes, on a CPU. A lone token takes a quarter to a tenth of the time, several tokens with a mask a half to three
quarters. The operator of packaged code, on a CPU with AVX512-BF16 and no AMX, takes about half of that; here every
layer is a call of packaged code, of which 0.04 ms are the call.

    python -m training.studies.attention_speed

Method: one layer with random numbers, in the sizes of SmolLM2-135M in bfloat16; keys and values of thirty layers in
turn, as in a model. The operator is called from code that is packaged for this run.
"""

import argparse
import os
import time
from collections.abc import Callable
from statistics import median
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import repeat_kv

from transformers_resps.compilation.compiled import CompiledFunction
from transformers_resps.compilation.packages import FOLDER_VARIABLE, ModulePackages
from transformers_resps.verifying.attention import attend


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


def packaged() -> Way:
    """Return the attention of packaged code."""
    module = nn.Identity()

    def attending(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        return attend(query.transpose(1, 2), key, value, mask)

    packages = ModulePackages(lambda: module, "the study's attention")
    code = CompiledFunction(attending, [(0, 1), (0, 2), (0, 2), (0, 2, 3)], packages=packages, name="attention")
    return lambda query, key, value, mask: code([query.transpose(1, 2), key, value, mask])


def milliseconds(way: Way, rows: int, tokens: int, past: int) -> float:
    """Return the median time of one layer."""
    query = torch.randn(rows, tokens, HEADS, HEAD_SIZE, dtype=torch.bfloat16).transpose(1, 2)
    keys, values = torch.randn(2, LAYERS, rows, KEY_HEADS, past + tokens, HEAD_SIZE, dtype=torch.bfloat16)
    mask = torch.zeros(rows, 1, tokens, past + tokens, dtype=torch.bfloat16)
    taken = []
    way(query, keys[0], values[0], mask)  # may compile
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
    with TemporaryDirectory() as folder, patch.dict(os.environ, {FOLDER_VARIABLE: folder}):
        ways = copied, shared, attend, packaged()
        print("| rows, tokens, context | copies | `enable_gqa` | ours | packaged |\n|---|---:|---:|---:|---:|")
        for place in PLACES:
            cells = " | ".join(f"{milliseconds(way, *place):.3f}" for way in ways)
            print(f"| {', '.join(map(str, place))} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
