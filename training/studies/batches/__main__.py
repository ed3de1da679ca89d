"""Compare ways to decode batches greedily: plain, ragged ("rows apart"), in lockstep, and every row alone.

Writes `results.json` and prints one row per batch size and way. Run it on a quiet machine. Without `--shape` every
way and batch size has its own `policy="auto"`, which learns from group to group, as in a user's process.
"""

import argparse
import sys

from transformers_resps.policy import FixedPolicy, Policy, default_policy
from transformers_resps.tree import TreeShape

from ..experiment import Experiment, add_options, execute
from .measuring import BatchBench, table


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser("python -m training.studies.batches", description=__doc__)
    add_options(parser, "results/batches")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 4, 8])
    return execute(parser, arguments, run)


def run(args: argparse.Namespace) -> int:
    """Decode, write, print."""
    from rich.progress import track  # of the extra `bench`

    given = Experiment.load(args)
    bench = BatchBench(given.target, given.head, lambda: policy_of(args.shape), args.max_new_tokens)
    sizes = [size for size in args.batch_sizes if size <= len(given.prompts)]
    if not sizes:
        raise ValueError(
            f"The batch sizes {args.batch_sizes} are above the number of prompts, {len(given.prompts)}. Pass smaller "
            "`--batch-sizes`, or a larger `--limit` and a dataset of as many rows."
        )
    runs = list(track(bench.run(given.prompts, sizes, args.repeats), "Decoding"))
    rows = table(runs)
    file = given.write(args, rows, runs)
    print("| batch | way | tokens/s | to plain batch | to trees one by one | same text |")
    print("|---:|---|---:|---:|---:|---:|")
    for row in rows:
        alone = "" if row["to_one_by_one"] is None else f"{row['to_one_by_one']:.2f}"
        rates = f"{row['tokens_per_second']:.1f} | {row['to_plain_batch']:.2f} | {alone} | {row['same_text']:.0%}"
        print(f"| {row['batch_size']} | {row['way']} | {rates} |")
    print(f"\nWritten to {file}")
    return 0


def policy_of(chosen: TreeShape | None) -> Policy:
    """One shape for every step, or a fresh default policy."""
    return default_policy() if chosen is None else FixedPolicy(chosen)


if __name__ == "__main__":
    sys.exit(main())
