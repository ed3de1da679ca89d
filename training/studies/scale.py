"""How a step's cost grows: measured here on random Llamas, and counted for an H100.

    python -m training.studies.scale --output results/scale.json        # about four minutes on two cores
    python -m training.studies.scale --output results/scale.json --show # prints the tables from the file

Measured: seconds of one forward over n nodes after a context, for three sizes of model; one size at a time is varied
in context, batch and vocabulary. Counted: bytes that must be read and operations that must be done, with the memory
bandwidth and peak arithmetic of an H100 SXM (NVIDIA's data sheet: 3.35 TB/s; 989 TFLOP/s dense bf16).
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from transformers_resps import prepack
from transformers_resps.calibration.device import device_name
from transformers_resps.target.attention import tree_attention_mask, tree_positions
from transformers_resps.target.forward import TargetForward
from transformers_resps.target.preallocated_cache import make_room
from transformers_resps.tree import DraftTree


NODES = (1, 2, 4, 8, 16, 32, 64)
H100_BYTES_PER_SECOND, H100_OPERATIONS_PER_SECOND = 3.35e12, 989e12


@dataclass(frozen=True)
class Size:
    """A Llama by its numbers."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    vocabulary: int
    tied: bool = False

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            intermediate_size=self.mlp,
            vocab_size=self.vocabulary,
            max_position_embeddings=8192,
            tie_word_embeddings=self.tied,
        )

    @property
    def matrix_weights(self) -> int:
        """Weights that every token is multiplied with: all but the embedding table."""
        kv_width = self.hidden // self.heads * self.kv_heads
        layer = 2 * self.hidden**2 + 2 * self.hidden * kv_width + 3 * self.hidden * self.mlp
        return self.layers * layer + self.hidden * self.vocabulary

    def bytes_read(self, context: int, batch: int, width: int) -> int:
        """Of one forward, at `width` bytes a number: weights once, keys and values of every row."""
        kv_width = self.hidden // self.heads * self.kv_heads
        return width * (self.matrix_weights + 2 * batch * self.layers * kv_width * context)

    def operations(self, nodes: int, context: int, batch: int) -> int:
        """Of one forward: two for each weight and row, four for each query number and visible position."""
        attention = 4 * self.layers * self.hidden * (context + nodes)
        return batch * nodes * (2 * self.matrix_weights + attention)

    def h100_seconds(self, nodes: int, context: int, batch: int) -> float:
        """The longer of reading and computing, bf16, neither perfect overlap nor launches counted."""
        reading = self.bytes_read(context, batch, 2) / H100_BYTES_PER_SECOND
        return max(reading, self.operations(nodes, context, batch) / H100_OPERATIONS_PER_SECOND)


MEASURED = (
    Size("0.1B", 576, 30, 9, 3, 1536, 49152, tied=True),
    Size("0.4B", 960, 32, 15, 5, 2560, 49152, tied=True),
    Size("1B", 2048, 16, 32, 8, 8192, 32000),
)
COUNTED = (
    Size("8B", 4096, 32, 32, 8, 14336, 128256),
    Size("70B", 8192, 80, 64, 8, 28672, 128256),
)


class Place:
    """A forward over a root with `nodes - 1` children after `context` cached positions of each of `batch` rows."""

    def __init__(self, model: Any, nodes: int, context: int, batch: int) -> None:
        self.nodes, self.context, self.batch = nodes, context, batch
        cache = DynamicCache(config=model.config)
        shape = (batch, model.config.num_key_value_heads, context, model.config.head_dim)
        for index in range(model.config.num_hidden_layers):
            cache.update(torch.randn(shape, dtype=model.dtype), torch.randn(shape, dtype=model.dtype), index)
        make_room(cache)
        tokens = torch.randint(model.config.vocab_size, (batch, nodes))
        self._tree = DraftTree.from_parents(tokens, torch.zeros_like(tokens))
        mask = None if nodes == 1 else tree_attention_mask(model.config, cache, None, self._tree, model.dtype)
        self._inputs = tokens, mask, tree_positions(self._tree, torch.full((batch,), context))
        self._forward = TargetForward(model, None, cache)

    def seconds(self) -> float:
        started = time.perf_counter()
        self._forward.verify(*self._inputs)
        taken = time.perf_counter() - started
        self._forward.undo(self._tree)
        return taken


def measure(size: Size, repeats: int, packed: bool, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Rows of `nodes`, `context`, `batch` and median `seconds`; one of the three is varied at a time.

    All are measured in turn, again and again: a slow moment of the machine meets each of them.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(size.config(), dtype=dtype).eval()
    if packed:
        prepack(model)
    sizes = [(nodes, 256, 1) for nodes in NODES]
    if size is MEASURED[0]:
        sizes += [(nodes, context, 1) for context in (1024, 4096) for nodes in (1, 8)]
        sizes += [(nodes, 256, batch) for batch in (2, 4, 8) for nodes in (1, 8)]
    with torch.inference_mode():  # the model was made outside: weights that tell of no change are not packed
        places = [Place(model, *one) for one in sizes]
        rounds = [[place.seconds() for place in places] for _ in range(repeats + 1)][1:]
    return [
        {
            "size": size.name,
            "packed": packed,
            "nodes": place.nodes,
            "context": place.context,
            "batch": place.batch,
            "seconds": median(taken),
        }
        for place, taken in zip(places, zip(*rounds, strict=True), strict=True)
    ]


def facts(dtype: str) -> dict[str, Any]:
    """What a figure needs to be believed."""
    return {
        "device": device_name(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "dtype": dtype,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def show(found: dict[str, Any]) -> None:
    """Print the tables."""
    rows = {(r["size"], r["packed"], r["nodes"], r["context"], r["batch"]): r["seconds"] for r in found["rows"]}
    print("| size | layers | " + " | ".join(f"{nodes}" for nodes in NODES) + " |")
    print("|---|---|" + "---:|" * len(NODES))
    for size in MEASURED:
        for packed in (False, True):
            ms = [1e3 * rows[size.name, packed, nodes, 256, 1] for nodes in NODES]
            layers = "prepacked" if packed else "stock"
            print(f"| {size.name} | {layers} | " + " | ".join(f"{m:.0f}" for m in ms) + " |")
    print("\n| context, batch | 1 node | 8 nodes | ratio |\n|---|---:|---:|---:|")
    for context, batch in ((256, 1), (1024, 1), (4096, 1), (256, 2), (256, 4), (256, 8)):
        one, eight = (1e3 * rows["0.1B", True, nodes, context, batch] for nodes in (1, 8))
        print(f"| {context}, {batch} | {one:.0f} | {eight:.0f} | {eight / one:.2f} |")
    print("\n| counted for an H100, ms | 1 node | 8 | 64 | 256 | nodes that cost a tenth more |")
    print("|---|---:|---:|---:|---:|---:|")
    for size in COUNTED:
        for context, batch in ((1024, 1), (16384, 1), (1024, 32)):
            ms = [1e3 * size.h100_seconds(nodes, context, batch) for nodes in (1, 8, 64, 256)]
            more_expensive = next(n for n in range(1, 4096) if size.h100_seconds(n, context, batch) > 1.1e-3 * ms[0])
            cells = " | ".join(f"{m:.1f}" for m in ms)
            print(f"| {size.name}, context {context}, batch {batch} | {cells} | {more_expensive} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--dtype", default="bfloat16", help="a torch dtype name")
    parser.add_argument("--show", action="store_true", help="print the tables of a file that is there")
    args = parser.parse_args()
    if not args.show:
        ways = [(size, packed) for size in MEASURED for packed in (False, True)]
        dtype = getattr(torch, args.dtype)
        rows = [row for size, packed in ways for row in measure(size, args.repeats, packed, dtype)]
        args.output.write_text(
            json.dumps({**facts(args.dtype), "sizes": [asdict(s) for s in MEASURED], "rows": rows}, indent=1)
        )
    show(json.loads(args.output.read_text()))


if __name__ == "__main__":
    main()
