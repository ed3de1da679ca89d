"""Draw bar charts with confidence intervals as SVG, for `resps bench --plot` and for the pages with figures."""

from collections.abc import Sequence
from html import escape
from typing import Any

from .results import ALL, PLAIN, Interval


_LABELS, _UNIT, _ROW = 430, 130, 22  # pixels: width of labels, width of a ratio of 1, height of a bar


def ratios(results: dict[str, Any]) -> str:
    """Return an SVG of each method's speed relative to plain decoding: overall, then per dataset and temperature."""
    summaries = {ALL: results["summaries"][ALL]} | results["summaries"]
    several = len(results["settings"]["temperatures"]) > 1
    values = [
        (
            ", ".join([name, row["method"], *([f"temperature {row['temperature']:g}"] if several else [])]),
            Interval(row["ratio"], row["low"], row["high"]),
        )
        for name, rows in summaries.items()
        for row in rows
        if row["method"] != PLAIN
    ]
    return bars(values, "Tokens per second, over plain decoding")


def bars(values: Sequence[tuple[str, Interval]], title: str) -> str:
    """Return an SVG with a labelled bar and interval for each ratio in `values`, and a line at ratio 1."""
    most = max(1.2, *(value.high for _, value in values))
    unit = min(_UNIT, 420 / most)
    height, width, one = 44 + _ROW * len(values), _LABELS + unit * most + 60, _LABELS + unit
    parts = [f'<rect width="{width:.0f}" height="{height}" rx="10" fill="#fcfbf8"/>', _words(20, 22, title)]
    for place, (label, value) in enumerate(values):
        y = 36 + _ROW * place
        low, high, end = (_LABELS + unit * size for size in (value.low, value.high, value.ratio))
        colour = "#0b62a8" if "auto" in label else "#b9b4a9"
        parts += [
            _words(_LABELS - 8, y + 11, label.replace("`", ""), 'text-anchor="end"'),
            f'<rect x="{_LABELS}" y="{y}" width="{end - _LABELS:.1f}" height="14" rx="3" fill="{colour}"/>',
            f'<path d="M{low:.1f} {y + 7}H{high:.1f}" stroke="#1d2126" stroke-width="1.2"/>',
            _words(max(end, high) + 6, y + 11, f"{value.ratio:.2f}"),
        ]
    parts.append(f'<path d="M{one:.1f} 32V{height - 6}" stroke="#1d2126" stroke-dasharray="3 3"/>')
    frame = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" font-family="sans-serif">'
    return frame + "\n" + "\n".join(parts) + "\n</svg>\n"


def _words(x: float, y: float, words: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="#1d2126" font-size="12" {more}>{escape(words)}</text>'
