r"""Measure the five claims of training/PROTOCOL.md, and write the page.

    make evidence                                             # from a bare clone; goes on where it was stopped
    make evidence EVIDENCE_OPTIONS="--qwen QWEN --sets EVAL"  # with a second target, and EAGLE's sets
    make evidence-quick                                       # five prompts, ten minutes: proves nothing

Each experiment runs in fresh processes, and each process writes a results file. A file of the present code that was
measured on a quiet machine is kept; all others are measured again.

Exit status: 0; 1 when something is still missing; 2 when an option is wrong; 130 after Ctrl-C.
"""

import argparse
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from training.benchmarking.provenance import code
from transformers_resps.calibration import device_name
from transformers_resps.tools.quiet import BusyMachineError, check_load, other_load

from .experiments import ANSWERS, EXACT_PLAIN, Experiment, experiments
from .page import PAGE, REASONS, write_page
from .prompts import CATEGORIES
from .sealed import Measured, UnfitResultsError


MEASURED = Path("training/evidence/measured")
WORK = Path("results/evidence")
_LEFT_OUT, _BUSY = 3, 4  # exit statuses of a process


def parser() -> argparse.ArgumentParser:
    """Return the options of the command."""
    made = argparse.ArgumentParser("make evidence", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = made.add_argument
    add("--target", help="folder of SmolLM2-135M-Instruct; default: as `make demo` unpacks it")
    add("--qwen", help="folder of Qwen2.5-Coder-0.5B-Instruct")
    add("--block-head", help="folder of a block head of SmolLM2")
    add("--vllm", help="Python of an environment with vLLM, see `make vllm`")
    add(
        "--prompts",
        help="other prompts: a .jsonl file, a folder with EAGLE's sets, SPEED-Bench's files, `speed-bench`",
    )
    add("--sets", help="folder with EAGLE's five sets, to find the best fixed tree on")
    add("--gsm8k", help=".jsonl with questions and answers of GSM8K")
    add("--each", type=int, help="prompts of each category, in place of the protocol's; the files say so")
    add("--only", nargs="+", metavar="NAME", help="experiments, or the beginnings of their names")
    add("--threads", type=int, help="default: as torch chooses")
    add("--accept-noise", action="store_true", help="measure on a busy machine; such figures are not shown")
    add("--quick", action="store_true", help="five prompts, one process, a few experiments")
    add("--list", action="store_true", help="print what is measured, and what is missing")
    add("--measured", type=Path, default=MEASURED, help="folder of the results files")
    add("--page", type=Path, default=PAGE, help="page to write")
    add("--work", type=Path, default=WORK, help="folder of journals")
    add("--render", action="store_true", help="only write the page, of the code that it says")
    add("--process", nargs=2, metavar=("NAME", "NUMBER"), help=argparse.SUPPRESS)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser().parse_args(given)
    if options.render:
        return render(options)
    if options.quick:
        options.measured, options.work = options.work / "quick" / "measured", options.work / "quick"
        options.page = options.work / "benchmarks.md" if options.page == PAGE else options.page
    try:
        if options.process:
            return measure_one(options)
        if options.list:
            return print_list(options)
        missing = measure_all(options, given)
        write_page(options.page, options.measured, code()["code_sha256"], quick=options.quick)
    except (ValueError, OSError) as error:
        print(f"make evidence: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped. The same command goes on from here.", file=sys.stderr)
        return 130
    print(f"Written: {options.page}")
    return 1 if missing else 0


def render(options: argparse.Namespace) -> int:
    """Write the page of the code that it says; a page from before the protocol is left alone."""
    said = re.search(r"<!-- evidence of code (\w+) -->", options.page.read_text("utf-8"))
    if said is None:
        return 0
    try:
        write_page(options.page, options.measured, said[1], quick=False)
    except UnfitResultsError as error:
        print(f"make docs: {error}", file=sys.stderr)
        return 2
    return 0


def chosen(options: argparse.Namespace) -> list[Experiment]:
    """Return the experiments that are asked for. Raises `ValueError` for a name that none has."""
    known = experiments(quick=options.quick)
    for name in options.only or ():
        if not any(one.name.startswith(name) for one in known):
            raise ValueError(f"--only got {name}, but the experiments are {', '.join(one.name for one in known)}.")
    return [one for one in known if not options.only or one.name.startswith(tuple(options.only))]


def folder_of(options: argparse.Namespace) -> Path:
    """Return the folder of this processor's results: two processors never share a row."""
    slug: str = re.sub(r"[^a-z0-9]+", "-", device_name(torch.device("cpu")).lower()).strip("-")
    return Path(options.measured) / slug


def files_of(experiment: Experiment, folder: Path) -> list[Path]:
    return [folder / f"{experiment.name}-{number}.json" for number in range(experiment.processes)]


def is_valid(file: Path, code_sha256: str, experiment: Experiment) -> bool:
    """Whether a file is whole, of the present code, with all arms, and measured on a quiet machine."""
    try:
        found = Measured.read(file)
        found.check_code(code_sha256, "the checkout")
        found.check_arms(experiment.arms)
    except (OSError, UnfitResultsError):
        return False
    return not found.reasons


def missing_files(options: argparse.Namespace) -> Iterator[tuple[Experiment, int, Path]]:
    now = code()["code_sha256"]
    for experiment in chosen(options):
        for number, file in enumerate(files_of(experiment, folder_of(options))):
            if not is_valid(file, now, experiment):
                yield experiment, number, file


def measure_all(options: argparse.Namespace, given: Sequence[str]) -> int:
    """Run a process for each missing file, in order; returns how many are missing then.

    Where one cannot be measured the others of its experiment are not tried, and the next experiment begins.
    """
    given_up: set[str] = set()
    for experiment, number, _ in list(missing_files(options)):
        if experiment.name in given_up:
            continue
        command = [sys.executable, "-m", "training.evidence", *given, "--process", experiment.name, str(number)]
        status = subprocess.run(command, check=False).returncode
        if status in (130, -signal.SIGINT):
            raise KeyboardInterrupt
        if status:
            given_up.add(experiment.name)
            print(f"{experiment.name}, process {number} ended with {status}; see its own lines.", file=sys.stderr)
    return len(list(missing_files(options)))


def measure_one(options: argparse.Namespace) -> int:
    """Measure one experiment in this process."""
    from examples.demo.target import prepared_target

    from .arms import LeftOut
    from .measuring import run

    name, number = options.process
    experiment = next(one for one in experiments(quick=options.quick) if one.name == name)
    options.target = options.target or str(prepared_target())
    try:
        if experiment.is_timed and not options.accept_noise:
            check_load(other_load())
        run(experiment, int(number), options, files_of(experiment, folder_of(options))[int(number)])
    except BusyMachineError as error:
        print(f"{name}: {error}", file=sys.stderr)
        note_reason(folder_of(options), name, str(error).partition(",")[0])
        return _BUSY
    except LeftOut as reason:
        print(f"{name}: left out, {reason}", file=sys.stderr)
        note_reason(folder_of(options), name, str(reason))
        return _LEFT_OUT
    return 0


def note_reason(folder: Path, name: str, reason: str) -> None:
    """Keep why an experiment has no file, for the page."""
    file = folder / REASONS
    known = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(known | {name: reason}, indent=1) + "\n", "utf-8")


def print_list(options: argparse.Namespace) -> int:
    """Print every experiment with the processes that it still needs, and about how long each takes on two cores."""
    needed = [experiment.name for experiment, _, _ in missing_files(options)]
    for one in chosen(options):
        each = options.each or one.each
        categories = len(CATEGORIES) if one.kind != ANSWERS and EXACT_PLAIN not in one.arms else 1
        prompts = 2 if one.context else each * (categories if one.name != "other-domain" else 1)
        timed = "" if one.is_timed else ", not timed"
        print(
            f"{one.name:24} question {one.question}: {needed.count(one.name)} of {one.processes} processes missing, "
            f"about {one.minutes(prompts):.0f} minutes each{timed}"
        )
    return 1 if needed else 0


if __name__ == "__main__":
    sys.exit(main())
