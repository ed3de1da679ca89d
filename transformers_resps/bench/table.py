"""`results.json` as a Markdown table. Knows its schema: nothing of how it was measured."""

from typing import Any

from .measurement import PLAIN


_COLUMNS = ("dataset", "method", "tokens/s", "ratio to plain", "95% interval", "tau", "nodes", "same text")


def markdown_table(results: dict[str, Any]) -> str:
    """One row per dataset, temperature and method; ceilings are in italics, since nobody measured them."""
    several = len(results["settings"]["temperatures"]) > 1
    columns = [*_COLUMNS[:1], "temperature", *_COLUMNS[1:]] if several else list(_COLUMNS)
    left = columns.index("method") + 1
    lines = [_row(columns), _row(["---"] * left + ["---:"] * (len(columns) - left))]
    for dataset, rows in results["summaries"].items():
        for row in rows:
            cells = _cells(dataset, row, results)
            lines.append(_row([*cells[:1], f"{row['temperature']:g}", *cells[1:]] if several else cells))
    return "\n".join(lines)


def _cells(dataset: str, row: dict[str, Any], results: dict[str, Any]) -> list[str]:
    method, measured = row["method"], row["measured"]
    steps = results["steps"].get(method)
    total = results["same_text"].get(PLAIN, 0)
    several = len(results["settings"]["temperatures"]) > 1  # the counts are of all temperatures together
    same = f"{results['same_text'][method]} of {total}" if dataset == "all" and measured and not several else ""
    return [
        dataset,
        method if measured else f"*{method}*",
        f"{row['tokens_per_second']:.1f}",
        f"{row['ratio']:.2f}",
        "" if method == PLAIN else f"{row['low']:.2f} to {row['high']:.2f}",
        f"{row['tau']:.2f}" if measured else "",
        f"{steps['mean_nodes']:.1f}" if steps and measured else "",
        same,
    ]


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
