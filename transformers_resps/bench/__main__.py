"""Compare draft trees with plain decoding and prompt lookup, in turn, on prompts of your own.

Exit status: 0, or 1 when a greedy answer differs from the plain one and rounding does not explain it.
"""

import argparse
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..generation import attach
from ..head import DraftHead
from ..trainers.conversations import read_conversations
from ..verification import explain_divergence
from .measurement import Summary, summarise
from .options import add_options
from .profile import profile
from .protocol import PLAIN, Bench, Method, Prompt, Run, methods
from .results import circumstances, markdown_table, write_results


def read_prompts(file: Path, limit: int, tokenizer: Any) -> list[Prompt]:
    """Up to the first user turn of `limit` rows spread evenly over the file, as chat prompts."""
    rows = list(read_conversations(file))
    chosen = [index * len(rows) // min(limit, len(rows)) for index in range(min(limit, len(rows)))]
    found = []
    for index in chosen:
        opened = next(turn for turn, message in enumerate(rows[index], start=1) if message["role"] == "user")
        ids = tokenizer.apply_chat_template(rows[index][:opened], add_generation_prompt=True, return_dict=False)
        found.append(Prompt(f"{file.stem}/{index}", torch.tensor(ids)))
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser("resps bench", description=__doc__)
    add_options(parser)
    return run(parser.parse_args(arguments))


def run(args: argparse.Namespace) -> int:
    """Decode, judge, report."""
    if args.threads:
        torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    target = AutoModelForCausalLM.from_pretrained(args.target, dtype=getattr(torch, args.dtype)).to(args.device)
    head = DraftHead.from_pretrained(args.head, target=target)
    bench = Bench(attach(target), args.max_new_tokens)
    prompts = [prompt for file in args.dataset for prompt in read_prompts(file, args.limit, tokenizer)]
    shapes = args.shapes or [head.default_shape]
    if args.profile:
        return print_profile(bench, head, methods(head, shapes[:1])[1], prompts)
    chosen = methods(head, shapes, prompt_lookup=args.prompt_lookup, auto=args.auto)
    total = args.repeats * len(prompts) * len(chosen)
    runs = list(track(bench.run(prompts, chosen, args.repeats), "Decoding", total=total))
    return report(bench, chosen, prompts, runs, args)


def print_profile(bench: Bench, head: DraftHead, tree: Method, prompts: list[Prompt]) -> int:
    """One line per finding."""
    found = profile(bench, head, tree, prompts)
    for name, value in asdict(found).items():
        print(f"{name:20}{value / 2**20:8.0f} MiB" if name.startswith("peak") else f"{name:20}{value:8.3f}")
    print(f"{'head_bytes':20}{sum(p.nbytes for p in head.parameters()) / 2**20:8.0f} MiB")
    return 0


def report(bench: Bench, chosen: list[Method], prompts: list[Prompt], runs: list[Run], args: Any) -> int:
    """Table, results.json, and every difference from plain decoding that rounding does not explain."""
    measurements = [run.measurement for run in runs]
    names = [method.name for method in chosen]
    summaries: dict[str, list[Summary]] = {}
    for dataset in [*(file.stem for file in args.dataset), "all"][-1 if len(args.dataset) == 1 else 0 :]:
        own = [m for m in measurements if dataset in ("all", m.prompt.rpartition("/")[0])]
        summaries[dataset] = [summarise(own, name) for name in names]
    same, unexplained = judge(bench, prompts, [run for run in runs if run.measurement.repeat == 0])
    facts = {**circumstances(bench.model), "target": args.target, "head": args.head, "unexplained": unexplained}
    file = write_results(args.output, {**facts, "same_text": same}, summaries, measurements)
    print(markdown_table(summaries, {name: f"{same[name]} of {len(prompts)}" for name in names}))
    print(f"\nWritten to {file}")
    for line in unexplained:
        print(f"NOT explained by rounding: {line}")
    return 1 if unexplained else 0


def judge(bench: Bench, prompts: list[Prompt], runs: list[Run]) -> tuple[dict[str, int], list[str]]:
    """How many answers of each method equal the plain ones, and those that differ beyond rounding."""
    plain = {run.measurement.prompt: run.token_ids for run in runs if run.measurement.method == PLAIN}
    inputs = {prompt.name: prompt.input_ids for prompt in prompts}
    same: Counter[str] = Counter()
    unexplained = []
    for run in runs:
        method, prompt = run.measurement.method, run.measurement.prompt
        found = explain_divergence(bench.model, inputs[prompt], plain[prompt], run.token_ids)
        same[method] += found is None
        if found is not None and not found.explained:
            unexplained.append(f"{method}, {prompt}, {found}")
    return dict(same), unexplained


if __name__ == "__main__":
    sys.exit(main())
