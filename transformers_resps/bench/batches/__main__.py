"""Batches of prompts, decoded greedily: plain, rows that advance apart, lockstep, and every row alone.

Writes `results.json` and prints one row per batch size and way. Run it on a quiet machine.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from transformers import AutoModelForCausalLM, AutoTokenizer

from ...generation import attach
from ...head import DraftHead
from ...policy import FixedPolicy, Policy, default_policy
from ...trainers.conversations import read_conversations
from ...tree import TreeShape
from ..options import shape
from ..provenance import code, machine
from .measuring import BatchBench, table


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser("python -m transformers_resps.bench.batches", description=__doc__)
    parser.add_argument("target", help="folder or Hub id")
    parser.add_argument("head", help="folder or Hub id of a draft head for the target")
    parser.add_argument("--dataset", type=Path, required=True, help=".jsonl with turns, messages or prompt")
    parser.add_argument("--limit", type=int, default=8, help="prompts, spread evenly over the file")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 4, 8])
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--shape", type=shape, help="total_tokens,depth,top_k[,lookup]; policy='auto' by default")
    parser.add_argument("--dtype", default="float32", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("results/batches"), help="folder for results.json")
    return run(parser.parse_args(arguments))


def run(args: argparse.Namespace) -> int:
    """Decode, write, print."""
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    dtype = getattr(torch, args.dtype)
    target = attach(AutoModelForCausalLM.from_pretrained(args.target, dtype=dtype).to(args.device))
    head = DraftHead.from_pretrained(args.head, target=target)
    bench = BatchBench(target, head, lambda: policy_of(args.shape), args.max_new_tokens)
    prompts = read_prompts(args.dataset, args.limit, tokenizer)
    sizes = [size for size in args.batch_sizes if size <= len(prompts)]
    runs = list(track(bench.run(prompts, sizes, args.repeats), "Decoding"))
    rows = table(runs)
    facts: dict[str, Any] = {**machine(target), **code(), "arguments": vars(args), "rows": rows}
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / "results.json"
    file.write_text(json.dumps(facts | {"runs": [asdict(run) for run in runs]}, indent=1, default=str), "utf-8")
    print("| batch | way | tokens/s | to plain batch | to trees one by one | same text |")
    print("|---:|---|---:|---:|---:|---:|")
    for row in rows:
        alone = "" if row["to_one_by_one"] is None else f"{row['to_one_by_one']:.2f}"
        rates = f"{row['tokens_per_second']:.1f} | {row['to_plain_batch']:.2f} | {alone} | {row['same_text']:.0%}"
        print(f"| {row['batch_size']} | {row['way']} | {rates} |")
    print(f"\nWritten to {file}")
    return 0


def read_prompts(file: Path, limit: int, tokenizer: Any) -> list[torch.Tensor]:
    """Up to the first user turn of `limit` rows spread evenly over the file, as chat prompts `[s]`."""
    rows = list(read_conversations(file))
    count = min(limit, len(rows))
    prompts = []
    for messages in (rows[index * len(rows) // count] for index in range(count)):
        opened = next(turn for turn, message in enumerate(messages, start=1) if message["role"] == "user")
        ids = tokenizer.apply_chat_template(messages[:opened], add_generation_prompt=True, return_dict=False)
        prompts.append(torch.tensor(ids))
    return prompts


def policy_of(chosen: TreeShape | None) -> Policy:
    """One shape for every step, or our default, which has learned nothing yet: ways must not teach each other."""
    return default_policy() if chosen is None else FixedPolicy(chosen)


if __name__ == "__main__":
    sys.exit(main())
