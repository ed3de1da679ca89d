"""Draw `docs/speed.svg`, the README's bars: speed over plain decoding, from the results of both heads: `make docs`."""

import json
from html import escape
from pathlib import Path
from typing import Any


CHART = Path(__file__).with_name("speed.svg")
CARDS = CHART.parent.parent / "model_cards"
TARGETS = {
    "SmolLM2-135M-Instruct": "smollm2-135m-instruct-head",
    "Qwen2.5-Coder-0.5B-Instruct": "qwen2.5-coder-0.5b-instruct-head",
}
METHODS = {  # as a reader knows it -> how its name begins in the results
    "Transformers' prompt lookup": "prompt lookup",
    "EAGLE-3's tree of 60 nodes": "EAGLE-3 60/5/10",
    "Re-SpS, trained for this machine": "Re-SpS ",
    "best fixed tree, found on other prompts": "best fixed",
    'policy="auto"': "auto",
}

LABELS, UNIT, BAR, ROW, TITLE, MOST = 300, 130, 17, 25, 38, 3.2  # pixels; the last: speed at the right end
HALO = 'paint-order="stroke" stroke="#fcfbf8" stroke-width="4"'  # where a figure stands on the line
INK, SOFT, OURS, OTHERS = "#1d2126", "#5b636c", "#0b62a8", "#b9b4a9"


def measured(card: str) -> dict[str, Any]:
    """Method -> its row over all prompts."""
    results = json.loads((CARDS / card / "results.json").read_text(encoding="utf-8"))
    prompts = len({measurement["prompt"] for measurement in results["measurements"]})
    rows = {
        name: next(r for r in results["pooled"] if r["method"].startswith(start)) for name, start in METHODS.items()
    }
    processor, _, _ = results["device"].rpartition(",")  # without its vector units
    return {"prompts": prompts, "rows": rows, "processor": processor}


def text(x: float, y: float, words: str, colour: str = INK, more: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" fill="{colour}" font-size="13" {more}>{escape(words)}</text>'


def bar(y: float, name: str, row: dict[str, Any]) -> list[str]:
    """A method: its bar, its 95% interval as a whisker, its figure."""
    colour = OURS if name.startswith("policy") else OTHERS
    low, high, end = (LABELS + UNIT * row[value] for value in ("low", "high", "ratio"))
    middle = y + BAR / 2
    whisker = f"M{low:.1f} {middle - 4:g}v8 M{low:.1f} {middle:g}H{high:.1f} M{high:.1f} {middle - 4:g}v8"
    bold = 'font-weight="bold"' if colour == OURS else ""
    return [
        text(LABELS - 10, middle + 4, name, INK, f'text-anchor="end" {bold}'),
        f'<rect x="{LABELS}" y="{y:g}" width="{end - LABELS:.1f}" height="{BAR}" rx="3" fill="{colour}"/>',
        f'<path d="{whisker}" stroke="{INK}" stroke-width="1.2" fill="none"/>',
        text(max(end, high) + 8, middle + 4, f"{row['ratio']:.2f}", INK, f"{bold} {HALO}"),
    ]


def draw() -> str:
    """The chart as SVG."""
    parts, y = [], 58.0
    for target, card in TARGETS.items():
        found = measured(card)
        parts.append(text(20, y - 7, f"{target}, {found['prompts']} prompts, {found['processor']}", SOFT))
        for name, row in found["rows"].items():
            parts += bar(y, name, row)
            y += ROW
        y += TITLE - 8
    height, width, plain = y - 6, LABELS + UNIT * MOST + 50, LABELS + UNIT
    title = "Speed, prepacked plain decoding = 1.00; greedy, bfloat16, two cores; whiskers: 95% intervals"
    frame = [
        f'<rect width="{width:g}" height="{height:g}" rx="10" fill="#fcfbf8"/>',
        text(20, 24, title),
        f'<path d="M{plain} 40V{height - 14:g}" stroke="{INK}" stroke-dasharray="3 3"/>',
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        'font-family="system-ui, -apple-system, Segoe UI, Roboto, Helvetica, Arial, sans-serif">\n'
        + "\n".join(frame + parts)
        + "\n</svg>\n"
    )


if __name__ == "__main__":
    CHART.write_text(draw(), encoding="utf-8")
