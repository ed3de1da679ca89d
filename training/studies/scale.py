"""Count what a forward over a tree costs on an H100.

Question: what would a draft tree cost on a GPU, which we have not measured?
Answer: by the data sheet of an H100, 64 nodes cost an 8B or 70B model almost nothing for one prompt, and five to seven
plain forwards for a batch of 32 (docs/performance.md). What forwards cost on a CPU, `resps calibrate` measures.

    python -m training.studies.scale

Method: counts the bytes that a forward must read and the operations that it must do, and divides by the bandwidth and
peak arithmetic of an H100 SXM (NVIDIA's data sheet: 3.35 TB/s; 989 TFLOP/s dense bf16).
"""

import argparse
from dataclasses import dataclass


NODES = (1, 8, 64, 256)
PLACES = ((1024, 1), (16384, 1), (1024, 32))  # context, batch
BYTES_PER_SECOND, OPERATIONS_PER_SECOND, BYTES_PER_NUMBER = 3.35e12, 989e12, 2
MAX_EXTRA = 0.1  # of a plain forward, for "as good as free"


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

    @property
    def kv_width(self) -> int:
        return self.hidden // self.heads * self.kv_heads

    @property
    def matrix_weights(self) -> int:
        """Weights that every token is multiplied with: all but the embedding table."""
        layer = 2 * self.hidden**2 + 2 * self.hidden * self.kv_width + 3 * self.hidden * self.mlp
        return self.layers * layer + self.hidden * self.vocabulary

    def bytes_read(self, context: int, batch: int) -> int:
        """Of one forward: weights once, keys and values of every row."""
        return BYTES_PER_NUMBER * (self.matrix_weights + 2 * batch * self.layers * self.kv_width * context)

    def operations(self, nodes: int, context: int, batch: int) -> int:
        """Of one forward: two for each weight and row, four for each query number and visible position."""
        attention = 4 * self.layers * self.hidden * (context + nodes)
        return batch * nodes * (2 * self.matrix_weights + attention)

    def seconds(self, nodes: int, context: int, batch: int) -> float:
        """The longer of reading and computing: they overlap perfectly, and launches take no time."""
        reading = self.bytes_read(context, batch) / BYTES_PER_SECOND
        return max(reading, self.operations(nodes, context, batch) / OPERATIONS_PER_SECOND)

    def free_nodes(self, context: int, batch: int) -> int:
        """The largest tree that costs at most `MAX_EXTRA` more than a plain forward."""
        most = (1 + MAX_EXTRA) * self.seconds(1, context, batch)
        return next(nodes for nodes in range(1, 4096) if self.seconds(nodes + 1, context, batch) > most)


SIZES = (Size("8B", 4096, 32, 32, 8, 14336, 128256), Size("70B", 8192, 80, 64, 8, 28672, 128256))


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(f"| ms, by nodes | {' | '.join(f'{nodes}' for nodes in NODES)} | nodes for a tenth more |")
    print("|---|" + "---:|" * (len(NODES) + 1))
    for size in SIZES:
        for context, batch in PLACES:
            cells = [f"{1e3 * size.seconds(nodes, context, batch):.1f}" for nodes in NODES]
            free = size.free_nodes(context, batch)
            print(f"| {size.name}, context {context}, batch {batch} | {' | '.join(cells)} | {free} |")


if __name__ == "__main__":
    main()
