r"""Measure the five claims of training/PROTOCOL.md for the present version, and write the page.

    make evidence                                             # from a bare clone; goes on where it was stopped
    make evidence EVIDENCE_OPTIONS="--qwen QWEN --sets EVAL"  # with a second target, and EAGLE's sets
    make evidence-drift EVIDENCE_OPTIONS="--qwen QWEN"        # ten minutes: do the published figures still hold?
    make evidence-quick                                       # five prompts, ten minutes: proves nothing

Each experiment runs in fresh processes, and each process writes a results file. A file of this version that was
measured on a quiet machine is kept; files of other versions stay as they are, in tables of their own.

Exit status: 0; 1 when something is still missing, or has drifted; 2 when an option is wrong; 3 when nothing has
drifted, but not everything could be compared; 130 after Ctrl-C.
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

from transformers_resps.calibration import device_name
from transformers_resps.tools.quiet import BusyMachineError, checked_load

from .drift import MOVED, compared, drift_of
from .experiments import QUICK, Experiment, experiments
from .page import PAGE, REASONS, Table, noise_of, read_tables, write_page
from .sealed import Measured, UnfitResultsError, Version


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
    add("--prompts", help="other prompts: a .jsonl file, a folder with EAGLE's sets, SPEED-Bench's files")
    add("--sets", help="folder with EAGLE's five sets, to find the best fixed tree on")
    add("--gsm8k", help=".jsonl with questions and answers of GSM8K")
    add("--each", type=int, help="prompts of each category, in place of the protocol's; the files say so")
    add("--only", nargs="+", metavar="NAME", help="experiments, or the beginnings of their names")
    add("--threads", type=int, help="default: as torch chooses")
    add("--accept-noise", action="store_true", help="measure on a busy machine; such figures are not shown")
    add("--list", action="store_true", help="print what is measured, and what is missing")
    add("--measured", type=Path, default=MEASURED, help="folder of the results files")
    add("--page", type=Path, default=PAGE, help="page to write")
    add("--work", type=Path, default=WORK, help="folder of journals")
    other = made.add_mutually_exclusive_group()
    other.add_argument("--quick", action="store_true", help="five prompts, one process, a few experiments")
    other.add_argument("--drift", action="store_true", help="measure four ratios of the page again, and compare")
    other.add_argument("--render", action="store_true", help="only write the page")
    add("--process", nargs=2, metavar=("NAME", "NUMBER"), help=argparse.SUPPRESS)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser().parse_args(given)
    try:
        if options.process:
            return measure_one(options)
        if options.render:
            write_page(options.page, options.measured)
            return 0
        if options.list:
            return print_list(options)
        if options.drift:
            return check_drift(options, given)
        missing = measure_all(options, given)
        page = options.work / "quick" / PAGE.name if options.quick and options.page == PAGE else options.page
        write_page(page, files_folder(options).parent.parent, quick=options.quick)
    except (ValueError, OSError) as error:
        print(f"make evidence: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped. The same command goes on from here.", file=sys.stderr)
        return 130
    print(f"Written: {page}")
    return 1 if missing else 0


def chosen(options: argparse.Namespace) -> list[Experiment]:
    """Return the experiments that are asked for. Raises `ValueError` for a name that none has."""
    known = experiments("quick" if options.quick else "drift" if options.drift else "")
    for name in options.only or ():
        if not any(one.name.startswith(name) for one in known):
            raise ValueError(f"--only got {name}, but the experiments are {', '.join(one.name for one in known)}.")
    only = tuple(options.only or (QUICK if options.quick else [""]))
    return [one for one in known if one.name.startswith(only)]


def files_folder(options: argparse.Namespace) -> Path:
    """Return the folder of this version's results on this processor; a quick or drift check has one of its own."""
    measured = options.measured
    if options.quick or options.drift:
        measured = options.work / ("quick" if options.quick else "drift") / "measured"
    slug: str = re.sub(r"[^a-z0-9]+", "-", device_name(torch.device("cpu")).lower()).strip("-")
    return Path(measured) / Version.here().folder / slug


def missing_files(options: argparse.Namespace) -> Iterator[tuple[Experiment, int, Path]]:
    """Yield each process that has no whole, quiet file with all arms."""
    folder = files_folder(options)
    for experiment in chosen(options):
        files = {number: folder / f"{experiment.name}-{number}.json" for number in range(experiment.processes)}
        read = [found for file in files.values() if (found := _whole(file, experiment))]
        noise = noise_of(experiment, read)
        valid = {one.file for one in read} - noise.keys()
        yield from ((experiment, number, file) for number, file in files.items() if file not in valid)


def _whole(file: Path, experiment: Experiment) -> Measured | None:
    try:
        found = Measured.read(file)
        found.check_arms(experiment.arms)
    except (OSError, UnfitResultsError):
        return None
    return found


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
    experiment = next(one for one in chosen(options) if one.name == name)
    options.target = options.target or str(prepared_target())
    folder = files_folder(options)
    try:
        if experiment.is_timed:
            checked_load(options.accept_noise)
        run(experiment, int(number), options, folder / f"{name}-{number}.json")
    except BusyMachineError as error:
        print(f"{name}: {error}", file=sys.stderr)
        note_reason(folder, name, str(error).partition(",")[0])
        return _BUSY
    except LeftOut as reason:
        print(f"{name}: left out, {reason}", file=sys.stderr)
        note_reason(folder, name, str(reason))
        return _LEFT_OUT
    return 0


def note_reason(folder: Path, name: str, reason: str) -> None:
    """Keep why an experiment has no file, for the page."""
    file = folder / REASONS
    known = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(known | {name: reason}, indent=1) + "\n", "utf-8")


def check_drift(options: argparse.Namespace, given: Sequence[str]) -> int:
    """Measure the ratios of `drift` anew, and print how they stand to the published ones."""
    folder = files_folder(options)
    for file in folder.glob("*.json"):  # each check measures anew
        file.unlink()
    measure_all(options, given)
    measured = Table.read(folder)
    ratios = drift_of(measured, read_tables(options.measured), chosen(options))
    print("\n".join(compared(ratios, Version.here(), measured.processor)))
    if any(one.verdict == MOVED for one in ratios):
        return 1
    return 0 if all(one.is_compared for one in ratios) else 3


def print_list(options: argparse.Namespace) -> int:
    """Print every experiment with the processes that it still needs, and about how long it takes on two cores."""
    needed = [experiment.name for experiment, _, _ in missing_files(options)]
    asked = chosen(options)
    for one in asked:
        timed = "" if one.is_timed else ", not timed"
        print(
            f"{one.name:24} question {one.question}: {needed.count(one.name)} of {one.processes} processes missing, "
            f"about {one.minutes:.0f} minutes in all{timed}"
        )
    print(f"{Version.here()}: about {sum(one.minutes for one in asked):.0f} minutes")
    return 1 if needed else 0


if __name__ == "__main__":
    sys.exit(main())
