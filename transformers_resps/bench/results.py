"""`results.json` and the table: what was measured, on what, with which command."""

import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from .measurement import Measurement, Summary


SCHEMA = 1


def circumstances(model: Any) -> dict[str, Any]:
    """Everything a reader needs to repeat the measurement."""
    device = model.device.type
    return {
        "schema": SCHEMA,
        "command": [Path(sys.executable).name, "-m", "transformers_resps.bench", *sys.argv[1:]],
        "commit": _commit(),
        "device": torch.cuda.get_device_name(model.device) if device == "cuda" else _processor(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def write_results(
    folder: Path, facts: dict[str, Any], summaries: dict[str, list[Summary]], measurements: Sequence[Measurement]
) -> Path:
    """Write `results.json` into `folder`: `facts`, one summary list per dataset, every single measurement."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "results.json"
    results = {
        **facts,
        "summaries": {dataset: [asdict(summary) for summary in rows] for dataset, rows in summaries.items()},
        "measurements": [asdict(measurement) for measurement in measurements],
    }
    file.write_text(json.dumps(results, indent=1), encoding="utf-8")
    return file


def markdown_table(summaries: dict[str, list[Summary]], same_text: dict[str, str]) -> str:
    """One row per dataset and method. `same_text` says for each method how many answers equal plain ones."""
    lines = [
        "| dataset | method | tokens/s | ratio to plain | 95% interval | tau | repeats within | same text |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for dataset, rows in summaries.items():
        for row in rows:
            numbers = (
                f"{row.tokens_per_second:.1f} | {row.ratio:.2f} | {row.low:.2f} to {row.high:.2f} | {row.tau:.2f}"
            )
            same = same_text.get(row.method, "") if dataset == "all" else ""
            lines.append(f"| {dataset} | {row.method} | {numbers} | {row.spread:.0%} | {same} |")
    return "\n".join(lines)


def _commit() -> str | None:
    """Of the checkout this package runs from; marked when files differ from it; `None` outside a checkout."""
    here = Path(__file__).parent
    found = subprocess.run(
        ["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() or None


def _processor() -> str:
    """The model name of the processor, as Linux tells it."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
