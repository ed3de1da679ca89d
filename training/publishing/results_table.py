"""Render `results.json` as the tables of a card."""

from typing import Any

from transformers_resps.bench.results import ALL
from transformers_resps.bench.table import method_cell, same_text, summary_cells, table_row
from transformers_resps.bench.timing import PLAIN


def overall_table(results: dict[str, Any]) -> str:
    """One row per method over all prompts, with its interval; estimated ceilings are in italics."""
    several = len(results["settings"]["temperatures"]) > 1
    columns = ["method", "tokens/s", "ratio to plain", "95% interval", "tau", "same text as plain"]
    lines = [table_row([*_temperature("temperature", several), *columns]), _rule(len(columns) + several, several + 1)]
    for row in results["summaries"][ALL]:
        cells = [*summary_cells(row), same_text(row, results)]
        lines.append(table_row([*_temperature(f"{row['temperature']:g}", several), *cells]))
    return "\n".join(lines)


def dataset_table(results: dict[str, Any]) -> str:
    """Ratio to plain of every method on every dataset, tau in brackets; empty for a single dataset."""
    datasets = [name for name in results["summaries"] if name != ALL]
    if len(datasets) < 2:
        return ""
    several = len(results["settings"]["temperatures"]) > 1
    methods = list(dict.fromkeys(method_cell(row) for row in results["summaries"][ALL] if row["method"] != PLAIN))
    lines = [
        table_row(["dataset", *_temperature("temperature", several), *methods]),
        _rule(1 + several + len(methods), 1 + several),
    ]
    for dataset in datasets:
        for temperature in results["settings"]["temperatures"]:
            rows = [row for row in results["summaries"][dataset] if row["temperature"] == temperature]
            found = {method_cell(row): _ratio(row) for row in rows}
            cells = [found.get(method, "") for method in methods]
            lines.append(table_row([dataset, *_temperature(f"{temperature:g}", several), *cells]))
    return "\n".join(lines)


def circumstances(results: dict[str, Any]) -> str:
    """The conditions of the benchmark, as one line."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    threads = f"{results['threads']} thread{'s' if results['threads'] != 1 else ''}"
    prompts = len({measurement["prompt"] for measurement in results["measurements"]})
    return (
        f"{prompts} prompts, {sampling(results)}, at most {results['settings']['max_new_tokens']} new tokens, "
        f"{results['settings']['repeats']} repeat{'s' if results['settings']['repeats'] != 1 else ''}; "
        f"{results['dtype']}{', prepacked weights' if results.get('packed') else ''}, {results['device']}, {threads}; "
        f"{versions}." + _busy(results)
    )


def _busy(results: dict[str, Any]) -> str:
    """A warning about results measured with `--accept-noise`, which are not published."""
    if not results["noise"]["accepted"]:
        return ""
    spread = results.get("plain_spread")
    told = "" if spread is None else f"; the speed of plain decoding varied by {spread:.0%}"
    return f" Measured with `--accept-noise`: the machine may have been busy{told}."


def sampling(results: dict[str, Any]) -> str:
    """How the tokens were chosen: greedy, or the temperatures."""
    temperatures = results["settings"]["temperatures"]
    return " and ".join("greedy" if value == 0 else f"temperature {value:g}" for value in temperatures)


def _ratio(row: dict[str, Any]) -> str:
    return f"{row['ratio']:.2f} ({row['tau']:.2f})" if row["measured"] else f"{row['ratio']:.2f}"


def _temperature(text: str, several: bool) -> list[str]:
    """A column that exists only with several temperatures."""
    return [text] if several else []


def _rule(columns: int, words: int) -> str:
    """The line below the table's heading; columns of numbers are right-aligned."""
    return f"|{'---|' * words}{'---:|' * (columns - words)}"
