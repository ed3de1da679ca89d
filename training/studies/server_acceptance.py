"""Let AIPerf ask `resps serve` the prompts of each category of SPEED-Bench, and print its matrix of accepted lengths.

Question: does AIPerf read what the server tells of its drafts, and what is accepted of each kind of prompt?
Answer: AIPerf 0.13.0 does. SmolLM2 with its head and the tree 8,3,4, our prompts: 1.59 tokens a step of multilingual
ones to 2.34 of mathematical ones, 2.00 over all. `training/studies/BENCHMARKS.md` has the matrix.

    python -m training.studies.server_acceptance TARGET HEAD --aiperf .../bin/aiperf --dtype bfloat16

Method: AIPerf has an environment of its own (`pip install aiperf`). One run for each category, as its report asks,
one request at a time, first turns only. The tree is fixed, so what is accepted does not hang on time: AIPerf's
processes share the processors with the server. Nothing is timed. Prompts are ours, in SPEED-Bench's rows; `--prompts`
takes SPEED-Bench itself where a machine has it.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import md5
from itertools import groupby
from pathlib import Path

from training.evidence.prompts import read_prompts
from transformers_resps.tools.cli import dtype, model, positive, shape
from transformers_resps.tools.session import Dialogue

from .experiment import execute


_NAME = "target"  # of the model in the server, and in AIPerf's report


@contextmanager
def served(args: argparse.Namespace) -> Iterator[str]:
    """Serve the target and its head from another process; yields the address."""
    tree = args.shape
    policy = f"{tree.total_tokens},{tree.depth},{tree.top_k},{tree.lookup}"
    command = [sys.executable, "-m", "resps", "serve", args.target, "--served-model-name", _NAME, "--head", args.head]
    command += ["--policy", policy, "--port", "0", *(["--dtype", args.dtype] if args.dtype else [])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            told = next((line for line in server.stdout if line.startswith("Serving")), None)
            if told is None:
                raise ValueError("The server did not start. Its own lines above say why.")
            yield told.partition(" at ")[2].partition("/v1")[0]
        finally:
            server.terminate()


def write_rows(dialogues: Sequence[Dialogue], file: Path) -> None:
    """Write first turns as rows of SPEED-Bench."""
    with file.open("w", encoding="utf-8") as rows:
        for one in dialogues:
            name, messages = md5(one.name.encode()).hexdigest(), one.asked([])
            category = one.name.rpartition("/")[0]
            rows.write(json.dumps({"question_id": name, "category": category, "messages": messages}) + "\n")


def run(args: argparse.Namespace) -> int:
    """Ask the prompts of each category in a run of its own, and print AIPerf's report of all."""
    asked = {
        category: list(own)
        for category, own in groupby(read_prompts(args.prompts, args.limit), lambda one: one.name.rpartition("/")[0])
    }
    args.output.mkdir(parents=True, exist_ok=True)
    with served(args) as address:
        for category, dialogues in asked.items():
            file = args.output / f"{category}.jsonl"
            write_rows(dialogues, file)
            options = {
                "--model": _NAME, "--url": address, "--endpoint-type": "chat", "--tokenizer": args.target,
                "--input-file": file, "--custom-dataset-type": f"speed_bench_{category}",
                "--request-count": len(dialogues), "--concurrency": 1, "--workers-max": 1, "--record-processors": 1,
                "--extra-inputs": f"max_completion_tokens:{args.max_new_tokens}",
                "--artifact-dir": args.output / category, "--ui": "none",
            }  # fmt: skip
            called([args.aiperf, "profile", *(str(part) for pair in options.items() for part in pair)])
    folders, matrix = (str(args.output / category) for category in asked), args.output / "matrix.csv"
    called([args.aiperf, "speed-bench-report", *folders, "--format", "csv", "--output", str(matrix)])
    print(matrix.read_text("utf-8"))
    return 0


def called(command: Sequence[str]) -> None:
    """Raises `ValueError` with the last lines of a command of AIPerf that failed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        told = " ".join((done.stdout + done.stderr).splitlines()[-8:])
        raise ValueError(f"`{' '.join(command[:2])}` failed: {told}")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=model, help="folder or Hub id of the target")
    parser.add_argument("head", type=model, help="folder or Hub id of a draft head for the target")
    parser.add_argument("--aiperf", required=True, help="AIPerf's command")
    parser.add_argument("--prompts", help="a .jsonl file with categories, SPEED-Bench's files, `speed-bench`")
    parser.add_argument("--limit", type=positive, default=10, help="prompts of each category")
    parser.add_argument("--max-new-tokens", type=positive, default=64)
    parser.add_argument("--shape", type=shape, default="8,3,4", help="total_tokens,depth,top_k[,lookup] of the tree")
    parser.add_argument("--dtype", type=dtype, help="auto, float32 (the default on a CPU), bfloat16 or float16")
    parser.add_argument("--output", type=Path, default=Path("results/aiperf"), help="folder of AIPerf's files")
    return parser


def main(arguments: list[str] | None = None) -> int:
    return execute(parser(), arguments, run)


if __name__ == "__main__":
    sys.exit(main())
