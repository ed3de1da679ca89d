"""Compare draft trees, policies and Transformers' own assistants with plain decoding, in turn, on your prompts.

Exit status: 0; 1 when an answer differs from the plain one and rounding does not explain it; 2 when nothing could be
measured; 130 after Ctrl-C. The same command goes on where it was stopped.
"""

import argparse
import sys
from dataclasses import asdict
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from ..compat import check_extra
from .methods import fixed_tree
from .models import BenchModels, load_models
from .noise import check_load
from .options import add_options
from .peers import check_installed
from .profile import profile
from .prompts import Prompt, read_dialogues, spread, to_tokens
from .protocol import Bench
from .provenance import command_line, other_load
from .results import write_results
from .session import Session, first_shape
from .table import markdown_table


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser("resps bench", description=__doc__)
    add_options(parser)
    try:
        return run(parser.parse_args(arguments))
    except (ValueError, OSError) as error:
        print(f"resps bench: {error}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace) -> int:
    """Measure, judge, report.

    Raises:
        ValueError: something is missing, does not fit, or would make the figures worthless.
    """
    check_extra("bench")
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    check_installed(args.peers)
    load_before = other_load()
    if not args.accept_noise:
        check_load(load_before)
    if args.threads:
        torch.set_num_threads(args.threads)
    models = load_models(
        args.target,
        args.head,
        args.policy,
        draft_model=args.draft_model,
        dtype=args.dtype,
        device=args.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        packed=args.pack,
    )
    if args.profile:
        return print_profile(args, models)
    return measure(args, models, load_before)


def measure(args: argparse.Namespace, models: BenchModels, load_before: float | None) -> int:
    """Decode everything in turn; what is there at Ctrl-C is reported as partial."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("Loading", total=None)
        session = Session(args, models, lambda doing: progress.update(task, description=doing))
        try:
            schedule = session.prepare()
        except KeyboardInterrupt:
            console.print("Stopped before anything was measured. The same command goes on from here.")
            return 130
        partial = True
        try:
            progress.update(task, description="Decoding", total=schedule.total)
            for prompt, runs in schedule.run(session.bench, session.journal):
                progress.update(task, description=prompt.name, advance=len(runs), total=schedule.total)
                session.add(prompt, runs)
            partial = False
        except KeyboardInterrupt:
            console.print("Stopped. The same command goes on from here.")
        finally:
            results = session.results(command_line(), load_before, schedule.cut, partial=partial)
            file = write_results(args.output, results)
    report(results, args)
    print(f"\nWritten to {file}{', marked as partial' if partial else ''}")
    return 130 if partial else int(bool(results["unexplained"]))


def report(results: dict[str, Any], args: argparse.Namespace) -> None:
    """Table, plots, what went wrong, and what to do."""
    from .plots import draw_plots  # needs matplotlib

    table = markdown_table(results)
    (args.output / "table.md").write_text(table + "\n", encoding="utf-8")
    print(table)
    if results["measurements"]:
        draw_plots(results, args.output)
    if results["noise"]["accepted"]:
        print("\nMeasured on a machine that was allowed to be busy: do not publish these figures.")
    for line in results["unexplained"]:
        print(f"NOT explained by rounding: {line}")
    print(f"\n{results['advice']}")


def print_profile(args: argparse.Namespace, models: BenchModels) -> int:
    """One line per finding."""
    dialogues = [one for source in args.dataset for one in spread(read_dialogues(source, args.split), args.limit)]
    prompts = [Prompt(one.name, to_tokens(one.asked([]), models.tokenizer)) for one in dialogues]
    tree = fixed_tree(models.head, first_shape(args, models))
    found = profile(Bench(models.target, args.max_new_tokens), models.head, tree, prompts)
    for name, value in asdict(found).items():
        print(f"{name:20}{value / 2**20:8.0f} MiB" if name.startswith("peak") else f"{name:20}{value:8.3f}")
    print(f"{'head_bytes':20}{sum(p.nbytes for p in models.head.parameters()) / 2**20:8.0f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
