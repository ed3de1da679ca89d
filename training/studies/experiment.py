"""Part of the studies `engine_speed`, `vllm_exports`: their table, `results.json` and exit status."""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from training.benchmarking.provenance import code
from transformers_resps.compat import check_extra
from transformers_resps.hub.upload import RESULTS
from transformers_resps.tools.results import machine


def report(
    args: argparse.Namespace, target: Any, rows: list[dict[str, Any]], runs: Sequence[Any], **more: Any
) -> None:
    """Print the rows, and write `results.json`: machine, code, options, the rows, `more` and every run."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        cells = ["" if (cell := row.get(name)) is None else cell for name in columns]
        print(f"| {' | '.join(f'{cell:.2f}' if isinstance(cell, float) else str(cell) for cell in cells)} |")
    facts = {**machine(target), **code(), "arguments": vars(args), **more, "rows": rows}
    args.output.mkdir(parents=True, exist_ok=True)
    file: Path = args.output / RESULTS
    file.write_text(json.dumps(facts | {"runs": [asdict(run) for run in runs]}, indent=1, default=str), "utf-8")
    print(f"\nWritten to {file}")


def execute(
    parser: argparse.ArgumentParser, arguments: list[str] | None, run: Callable[[argparse.Namespace], int]
) -> int:
    """Run a command with the extra `bench`; what stops it is one line and the exit status 2."""
    args = parser.parse_args(arguments)
    try:
        check_extra("bench")
        return run(args)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
