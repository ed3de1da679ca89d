"""Measure the memory of a process that decodes, for each way in a process of its own.

Question: how much memory do a head and compiled steps need, beside stock decoding and OpenVINO?
Answer: SmolLM2 in bfloat16, two threads: 670 MiB with stock layers, 780 with a head and `auto`; compiled 940 and
1,070, for packed weights are copies; OpenVINO 1,010.

    python -m training.studies.peak_memory TARGET HEAD --dataset prompts.jsonl --dtype bfloat16 --openvino

Method: each process loads what its way needs, decodes the prompts greedily, and tells the most memory that was ever
resident (`VmHWM`, Linux): code, weights and caches. Run it twice: a process that compiles takes more than one that
loads what was kept. OpenVINO reads the folder that `training/benchmark.py --peers openvino` reads.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoTokenizer
from transformers.utils.logging import tqdm

from training.benchmarking.peers import load_peers
from transformers_resps import attach
from transformers_resps.tools.cli import dtype, model, positive
from transformers_resps.tools.loading import load_source, load_target
from transformers_resps.tools.methods import Method, compiled, plain, plain_steps, policies
from transformers_resps.tools.session import read_dialogues, spread

from .experiment import execute, print_table


OURS = ("plain", "plain, compiled", "auto", "auto, compiled")
OPENVINO = ("OpenVINO (plain)", "OpenVINO (prompt lookup)")


def ready(way: str, args: argparse.Namespace) -> tuple[Any, Method]:
    """Load a target and what decodes it in some way; OpenVINO needs to know the target alone."""
    if way in OPENVINO:
        named = SimpleNamespace(
            name_or_path=args.target, device=torch.device("cpu"), dtype=getattr(torch, args.dtype or "float32", None)
        )
        return named, next(peer for peer in load_peers(["openvino"], named, None) if peer.name == way)
    target = attach(load_target(args.target, args.dtype, "cpu"))
    if way.startswith("plain"):
        return target, plain() if way == "plain" else compiled(plain_steps())
    (auto,) = policies(load_source(args.head, target), {"auto": "auto"})
    return target, auto if way == "auto" else compiled(auto)


def peak_mib(way: str, args: argparse.Namespace) -> float:
    """Decode in this process; returns the most memory that it ever had, in MiB."""
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    target, method = ready(way, args)
    for dialogue in spread(read_dialogues(str(args.dataset)), args.limit):
        prompt = dialogue.prompt(tokenizer).input_ids[None]
        method.prepare(target, prompt, args.max_new_tokens, 0.0, [tokenizer.eos_token_id])()
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) / 1024


def table(ways: Sequence[str], measured: Callable[[str], float]) -> list[dict[str, Any]]:
    """One row per way: MiB, and the ratio to the first one."""
    peaks = {way: measured(way) for way in tqdm(ways, desc="Decoding")}
    return [{"way": way, "peak_mib": peak, "to_first": peak / peaks[ways[0]]} for way, peak in peaks.items()]


def run(args: argparse.Namespace) -> int:
    """Start the processes, print."""

    def measured(way: str) -> float:
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            return process.submit(peak_mib, way, args).result()

    print_table(table(args.ways or [*OURS, *(OPENVINO if args.openvino else ())], measured))
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        "python -m training.studies.peak_memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("target", type=model, help="folder or Hub id of the target")
    add("head", type=model, help="folder or Hub id of a draft head for the target")
    add("--dataset", type=Path, required=True, help=".jsonl with turns, messages or prompt")
    add("--ways", nargs="+", choices=(*OURS, *OPENVINO), help="default: all of ours")
    add("--openvino", action="store_true", help="OpenVINO's ways, too")
    add("--limit", type=positive, default=4, help="prompts, spread evenly over the file")
    add("--max-new-tokens", type=positive, default=96)
    add("--dtype", type=dtype, help="auto, float32 (the default), bfloat16 or float16")
    add("--threads", type=positive, default=torch.get_num_threads(), help="CPU threads; default: as torch chooses")
    return execute(parser, arguments, run)


if __name__ == "__main__":
    sys.exit(main())
