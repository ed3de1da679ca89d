"""Writes `results.json` as a Markdown table."""

from typing import Any

from .results import ALL
from .timing import COMPILED_PLAIN, PLAIN


_SPEED = ("tokens/s", "ratio to plain", "95% interval", "tau")
_EFFICIENCY = ("ratio / tau", "ratio to compiled plain", "that / tau")
_COLUMNS = ("dataset", "method", *_SPEED, *_EFFICIENCY, "nodes", "same text")


def markdown_table(results: dict[str, Any]) -> str:
    """Return a row per dataset, temperature and method; ceilings are in italics, since they are estimated."""
    several = len(results["settings"]["temperatures"]) > 1
    columns = [*_COLUMNS[:1], "temperature", *_COLUMNS[1:]] if several else list(_COLUMNS)
    left = columns.index("method") + 1
    lines = [table_row(columns), table_row(["---"] * left + ["---:"] * (len(columns) - left))]
    for dataset, rows in results["summaries"].items():
        for row in rows:
            cells = _cells(dataset, row, results)
            lines.append(table_row([*cells[:1], f"{row['temperature']:g}", *cells[1:]] if several else cells))
    if results.get("not_compiled"):
        lines += ["", f"{COMPILED_PLAIN}: not measured. {results['not_compiled']}"]
    return "\n".join(lines)


def _cells(dataset: str, row: dict[str, Any], results: dict[str, Any]) -> list[str]:
    steps = results["steps"].get(row["method"])
    nodes = f"{steps['mean_nodes']:.1f}" if steps and row["measured"] else ""
    same = same_text(row, results) if dataset == ALL else ""
    return [dataset, *summary_cells(row), *_efficiency_cells(row), nodes, same]


def _efficiency_cells(row: dict[str, Any]) -> list[str]:
    """Return what `_EFFICIENCY` names; empty where older results lack it, or where it is estimated."""
    names = ("efficiency", "compiled_ratio", "compiled_efficiency")
    told = [row.get(name) if row["measured"] or name == "compiled_ratio" else None for name in names]
    return ["" if value is None else f"{value:.2f}" for value in told]


def summary_cells(row: dict[str, Any]) -> list[str]:
    """Return method, tokens per second, ratio to plain, its interval and tau of one row of `summaries`."""
    return [
        method_cell(row),
        f"{row['tokens_per_second']:.1f}",
        f"{row['ratio']:.2f}",
        "" if row["method"] == PLAIN else f"{row['low']:.2f} to {row['high']:.2f}",
        f"{row['tau']:.2f}" if row["measured"] else "",
    ]


def method_cell(row: dict[str, Any]) -> str:
    """Return the method; in italics if it is estimated, not measured."""
    return str(row["method"]) if row["measured"] else f"*{row['method']}*"


def same_text(row: dict[str, Any], results: dict[str, Any]) -> str:
    """Count answers that equal plain decoding's; empty over several temperatures, which are counted together."""
    if not row["measured"] or len(results["settings"]["temperatures"]) > 1:
        return ""
    return f"{results['same_text'][row['method']]} of {results['same_text'].get(PLAIN, 0)}"


def table_row(cells: list[str]) -> str:
    """Return one line of Markdown."""
    return f"| {' | '.join(cells)} |"
