"""Compare draft trees, policies and Transformers' own assistants with plain decoding, in turn, on your prompts.

Exit status: 0; 1 when an answer differs from the plain one and rounding does not explain it; 2 when nothing could be
measured; 130 after Ctrl-C. The same command goes on where it was stopped.
"""

import argparse
import sys
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from ..compat import check_extra
from .config import BenchConfig
from .models import BenchModels
from .noise import check_load, other_load
from .options import add_options, read_options
from .peers import check_installed
from .provenance import command_line
from .results import write_results
from .session import Session
from .table import markdown_table


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser("resps bench", description=__doc__)
    add_options(parser)
    try:
        return run(read_options(parser.parse_args(arguments)))
    except (ValueError, OSError) as error:
        print(f"resps bench: {error}", file=sys.stderr)
        return 2


def run(config: BenchConfig) -> int:
    """Measure, judge, report; returns the exit status.

    Raises:
        ValueError: something is missing, does not fit, or would make the figures worthless.
    """
    check_extra("bench")
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    check_installed(config.peers)
    load_before = other_load()
    if not config.accept_noise:
        check_load(load_before)
    if config.threads:
        torch.set_num_threads(config.threads)
    return measure(config, BenchModels.load(config), load_before)


def measure(config: BenchConfig, models: BenchModels, load_before: float | None) -> int:
    """Decode everything in turn, and report; after Ctrl-C what is there is reported as partial."""
    try:
        session = Session(config, models)
    except KeyboardInterrupt:
        print("Stopped before anything was measured. The same command goes on from here.", file=sys.stderr)
        return 130
    partial = True
    with transformers_logging.tqdm(total=session.schedule.total, desc="Decoding", unit="answer") as bar:
        try:
            for prompt, _ in session.run(bar.update):
                bar.total = session.schedule.total  # less, once a conversation is cut short
                bar.set_postfix_str(prompt.name)
            partial = False
        except KeyboardInterrupt:
            print("Stopped. The same command goes on from here.", file=sys.stderr)
        finally:
            results = session.results(command_line(), load_before, partial=partial)
            file = write_results(config.output, results)
    report(results, config)
    print(f"\nWritten to {file}{', marked as partial' if partial else ''}")
    return 130 if partial else int(bool(results["unexplained"]))


def report(results: dict[str, Any], config: BenchConfig) -> None:
    """Print and save the table, draw the plots, and say what went wrong and what to do."""
    from .plots import draw_plots  # needs matplotlib

    table = markdown_table(results)
    (config.output / "table.md").write_text(table + "\n", encoding="utf-8")
    print(table)
    if results["measurements"]:
        draw_plots(results, config.output)
    if results["noise"]["accepted"]:
        print("\nMeasured on a machine that was allowed to be busy: do not publish these figures.")
    for line in results["unexplained"]:
        print(f"NOT explained by rounding: {line}")
    print(f"\n{results['advice']}")


if __name__ == "__main__":
    sys.exit(main())
