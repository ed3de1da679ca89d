"""Compare dynamic, static and compiled caches, plain and with trees of one shape (greedy, one prompt at a time).

Writes `results.json` and prints one row per way. Run it on a quiet machine. Compiling takes minutes on a CPU. Without
`--shape` the head's default tree is used.
"""

import argparse
import sys

from transformers import CompileConfig

from ..experiment import Experiment, add_options, execute
from .measuring import StaticBench, table


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser("python -m training.studies.static_caches", description=__doc__)
    add_options(parser, "results/static")
    parser.add_argument(
        "--backend", default="inductor", help="backend of `torch.compile`; 'none' leaves compiling out"
    )
    return execute(parser, arguments, run)


def run(args: argparse.Namespace) -> int:
    """Decode, write, print."""
    from rich.progress import track  # of the extra `bench`

    given = Experiment.load(args)
    config = None if args.backend == "none" else CompileConfig(backend=args.backend)
    shape = args.shape or given.head.default_shape
    bench = StaticBench(given.target, given.head, shape, args.max_new_tokens, config)
    runs = list(track(bench.run(given.prompts, args.repeats), "Decoding"))
    rows = table(runs)
    file = given.write(args, rows, runs)
    print("| way | tokens/s | to plain | to a cache that grows | same text | compiling, s |")
    print("|---|---:|---:|---:|---:|---:|")
    for row in rows:
        rates = f"{row['tokens_per_second']:.1f} | {row['to_plain']:.2f} | {row['to_dynamic']:.2f}"
        print(f"| {row['way']} | {rates} | {row['same_text']:.0%} | {row['first_pass_extra_seconds']:.0f} |")
    print(f"\nWritten to {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
