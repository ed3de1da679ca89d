"""What static caches and `torch.compile` gain, plainly and with trees of one shape, one prompt at a time, greedily.

Writes `results.json` and prints one row per way. Run it on a quiet machine. Compiling takes minutes on a processor.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from transformers import AutoModelForCausalLM, AutoTokenizer, CompileConfig

from ...generation import attach
from ...head import DraftHead
from ..batches.__main__ import read_prompts
from ..options import shape
from ..provenance import code, machine
from .measuring import StaticBench, table


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser("python -m transformers_resps.bench.static_caches", description=__doc__)
    parser.add_argument("target", help="folder or Hub id")
    parser.add_argument("head", help="folder or Hub id of a draft head for the target")
    parser.add_argument("--dataset", type=Path, required=True, help=".jsonl with turns, messages or prompt")
    parser.add_argument("--limit", type=int, default=8, help="prompts, spread evenly over the file")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--shape", type=shape, help="total_tokens,depth,top_k[,lookup]; the head's own by default")
    parser.add_argument("--backend", default="inductor", help="of `torch.compile`; 'none' leaves compiling out")
    parser.add_argument("--dtype", default="float32", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("results/static"), help="folder for results.json")
    return run(parser.parse_args(arguments))


def run(args: argparse.Namespace) -> int:
    """Decode, write, print."""
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    dtype = getattr(torch, args.dtype)
    target = attach(AutoModelForCausalLM.from_pretrained(args.target, dtype=dtype).to(args.device))
    head = DraftHead.from_pretrained(args.head, target=target)
    config = None if args.backend == "none" else CompileConfig(backend=args.backend)
    bench = StaticBench(target, head, args.shape or head.default_shape, args.max_new_tokens, config)
    prompts = read_prompts(args.dataset, args.limit, tokenizer)
    runs = list(track(bench.run(prompts, args.repeats), "Decoding"))
    rows = table(runs)
    facts: dict[str, Any] = {**machine(target), **code(), "arguments": vars(args), "rows": rows}
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / "results.json"
    file.write_text(json.dumps(facts | {"runs": [asdict(run) for run in runs]}, indent=1, default=str), "utf-8")
    print("| way | tokens/s | to plain | to a cache that grows | same text | compiling, s |")
    print("|---|---:|---:|---:|---:|---:|")
    for row in rows:
        rates = f"{row['tokens_per_second']:.1f} | {row['to_plain']:.2f} | {row['to_dynamic']:.2f}"
        print(f"| {row['way']} | {rates} | {row['same_text']:.0%} | {row['first_pass_extra_seconds']:.0f} |")
    print(f"\nWritten to {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
