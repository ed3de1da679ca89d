"""Time a forward over a tree in the invariant mode and in the normal one.

Question: how much longer does a step take that writes one text in any dtype?
Answer (SmolLM2, bfloat16, two threads, after 100 and 450 tokens): a plain step takes 1.07 to 1.12 times as long,
a chain of 8 nodes 1.07 to 1.13; 8 nodes on 3 paths 1.24 to 1.26; 16 nodes on 6 paths 1.24 to 1.28. Compiled:
1.06 to 1.11; 1.06 to 1.07; 1.10 to 1.15; 1.19 to 1.20.

    python -m training.studies.invariant_speed work/smollm2 --dtype bfloat16 --pack
    python -m training.studies.invariant_speed work/smollm2 --dtype bfloat16 --compile

Method: both modes read one text of random tokens and verify trees of random tokens after it, in turn, five times; the
least time of all repeats counts. A tree's paths share its first nodes; one path is a chain, and one node a plain step.
"""

import argparse
import json
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from training.benchmarking.provenance import code
from transformers_resps.tools.cli import dtype, model, positive
from transformers_resps.tools.results import machine
from transformers_resps.tree import DraftTree
from transformers_resps.verifying.forward import TargetForward
from transformers_resps.verifying.growing import TreeVerifier
from transformers_resps.verifying.invariant.row_classes import RowClasses
from transformers_resps.verifying.invariant.verifier import InvariantVerifier
from transformers_resps.verifying.prepacking import prepack
from transformers_resps.verifying.slots.engine import SlotEngine
from transformers_resps.verifying.slots.verifier import SlotVerifier
from transformers_resps.verifying.verifier import Verifier

from .experiment import execute, print_table


TREES = ((1, 1), (2, 1), (4, 1), (8, 1), (16, 1), (8, 3), (16, 6))  # nodes, paths
MODES = ("normal", "invariant")
ROUNDS = 5


def tree_of(tokens: torch.Tensor, paths: int) -> DraftTree:
    """A chain of `[n]` tokens, of which the last ones are leaves further up."""
    count = len(tokens)
    parents = [max(node - 1, 0) for node in range(count)]
    for path in range(1, paths):
        parents[count - path] = min(path, count - paths - 1)
    return DraftTree.from_parents(tokens[None], torch.tensor([parents]))


def verifier_of(mode: str, target: Any, engine: SlotEngine, place: int, *, compiles: bool) -> Verifier:
    """For a prompt of so many tokens."""
    positions, forward = torch.arange(place)[None], TargetForward.of(target)
    if mode == "invariant":
        needs = RowClasses().needs(target)
        return InvariantVerifier(forward, engine, needs, positions, compiles=compiles)
    return SlotVerifier(forward, engine, positions) if compiles else TreeVerifier.of(target, place)


def least_seconds(verifier: Verifier, trees: Sequence[DraftTree], repeats: int) -> list[float]:
    """Of a step with each tree; one more of each prepares."""
    least = [float("inf")] * len(trees)
    for index, tree in enumerate(trees):
        for repeat in range(repeats + 1):
            started = time.perf_counter()
            verifier.verify(tree)
            verifier.undo()
            if repeat:
                least[index] = min(least[index], time.perf_counter() - started)
    return least


def measure(target: Any, places: list[int], repeats: int, *, compiles: bool) -> list[dict[str, Any]]:
    """A row for each place and tree: milliseconds of both modes, and their ratio."""
    rows, engine = [], SlotEngine()
    vocabulary = target.config.get_text_config().vocab_size
    text = torch.randint(vocabulary, (max(places) + 64,), generator=torch.Generator().manual_seed(0))
    for place in places:
        trees = [tree_of(text[place : place + nodes], paths) for nodes, paths in TREES]
        taken = {mode: [float("inf")] * len(trees) for mode in MODES}
        for _ in range(ROUNDS):
            for mode, before in taken.items():
                with (
                    engine.borrow(target) if compiles else nullcontext(),
                    verifier_of(mode, target, engine, place, compiles=compiles) as verifier,
                ):
                    verifier.prefill(text[None, :place], logits_to_keep=1)
                    found = least_seconds(verifier, trees, -(-repeats // ROUNDS))
                taken[mode] = [min(pair) for pair in zip(before, found, strict=True)]
        for (nodes, paths), *seconds in zip(TREES, *taken.values(), strict=True):
            both = dict(zip(MODES, (1e3 * each for each in seconds), strict=True))
            row = {"place": place, "nodes": nodes, "paths": paths, **both}
            rows.append(row | {"ratio": both["invariant"] / both["normal"]})
    return rows


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("target", type=model, help="folder or Hub id of the target")
    made.add_argument("--dtype", type=dtype, default="bfloat16")
    made.add_argument("--pack", action="store_true", help="prepack the target's weights")
    made.add_argument("--compile", action="store_true", help="time compiled steps, which takes minutes first")
    made.add_argument("--places", type=positive, nargs="+", default=[100, 450], help="tokens before the tree")
    made.add_argument("--repeats", type=positive, default=25)
    made.add_argument("--output", type=Path, help="file for the rows")
    return made


@torch.no_grad()
def run(args: argparse.Namespace) -> int:
    target = AutoModelForCausalLM.from_pretrained(args.target, dtype=args.dtype).eval()
    if args.pack:
        prepack(target)
    rows = measure(target, args.places, args.repeats, compiles=args.compile)
    print_table(rows)
    if args.output is not None:
        facts = {**machine(target), **code(), "arguments": vars(args), "rows": rows}
        args.output.write_text(json.dumps(facts, indent=1, default=str) + "\n", encoding="utf-8")
    return 0


def main(arguments: list[str] | None = None) -> int:
    return execute(parser(), arguments, run)


if __name__ == "__main__":
    raise SystemExit(main())
