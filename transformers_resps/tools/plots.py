"""The plot of `resps bench --plot`: how much faster each method is, with intervals; and what plots have in common."""

import io
from collections import Counter
from pathlib import Path
from typing import Any

from .loading import short_name
from .results import ALL, PLAIN


# Okabe and Ito's colours, told apart by everyone, but for their yellow, which is hard to see on white. `auto` is blue
# everywhere; the ceiling and plain decoding are grey.
AUTO_COLOUR = "#0072B2"
COLOURS = ("#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C510A", "#882255", "#000000")
GREY = "#777777"
MARKS = "s^Dv<>pX"
_OURS = "auto"
_DOTS = 120  # per inch
_SHADES = 64  # colours of a file: a quarter of the bytes, and nothing to see of it


def ratios(results: dict[str, Any]) -> Any:
    """Plot speed over plain decoding: a block of methods per benchmark, all prompts first, a panel per temperature.

    Bars are 95% intervals over prompts; a benchmark of one prompt has none. `None` where nothing was compared.
    """
    summaries = {ALL: results["summaries"][ALL]} | results["summaries"]
    prompts = _prompt_counts(results)
    temperatures = sorted({row["temperature"] for row in summaries[ALL]})
    methods = [row["method"] for row in summaries[ALL] if row["temperature"] == temperatures[0]]
    methods = [method for method in methods if method != PLAIN]
    if not methods:
        return None
    block = len(methods) + 1.5
    size = 8.5 * max(1, 0.7 * len(temperatures)), 2.2 + 0.17 * block * len(summaries)
    bars = "; bars: 95% intervals over prompts" if prompts[ALL] > 1 else ""
    figure = figure_of(*size, f"How much faster than plain decoding{bars}", results)
    panels = figure.subplots(1, len(temperatures), sharey=True, squeeze=False)[0]
    for axes, temperature in zip(panels, temperatures, strict=True):
        for place, (name, rows) in enumerate(summaries.items()):
            found = {row["method"]: row for row in rows if row["temperature"] == temperature}
            for number, method in enumerate(methods):
                if method in found:
                    style = style_of(results, method)
                    _ratio(axes, found[method], place * block + number, style, has_interval=prompts[name] > 1)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.axhline(block - 1.25, color=GREY, linewidth=0.5)
        middles = [place * block + (len(methods) - 1) / 2 for place in range(len(summaries))]
        axes.set_yticks(middles, [f"{name}\n{_counted(prompts[name])}" for name in summaries], fontsize=9)
        axes.set_ylim(len(summaries) * block - 0.75, -1)
        axes.set_xlim(0, axes.get_xlim()[1])
        axes.set_xlabel("tokens per second, over plain decoding")
        axes.set_title(f"temperature {temperature:g}" if temperature else "greedy", fontsize=10)
        axes.grid(axis="x", alpha=0.3)
    handles = [panels[0].plot([], [], **style_of(results, m), label=m, linestyle="")[0] for m in methods]
    put_legend(figure, handles)
    return figure


def save_figure(figure: Any, file: Path) -> None:
    """Write it as a small PNG."""
    from PIL import Image  # matplotlib needs it, too

    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=_DOTS)
    Image.open(drawn).convert("RGB").quantize(_SHADES).save(file, optimize=True)


def figure_of(width: float, height: float, title: str, results: dict[str, Any]) -> Any:
    """Make a figure that belongs to no window and no global state; below its title stands what was measured."""
    from matplotlib.figure import Figure  # the extra `bench`

    figure = Figure(figsize=(width, height), layout="constrained")
    head = f" with {short_name(results['head'])}" if results["head"] else ""
    where = f"{short_name(results['target'])}{head}, {results['dtype']}, {results['device']}"
    figure.suptitle(f"{title}\n", fontsize=11)
    figure.text(0.5, 1 - 0.36 / height, where, ha="center", va="center", fontsize=8, color=GREY)
    return figure


def put_legend(figure: Any, handles: Any, title: str | None = None) -> None:
    """Put a legend below, in as many columns as the longest label leaves room for."""
    longest = max(len(handle.get_label()) for handle in handles)
    columns = int(figure.get_figwidth() / (0.55 + 0.06 * longest))  # inches
    columns = max(1, min(columns, len(handles)))
    figure.legend(handles=handles, title=title, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)


def _ratio(axes: Any, row: dict[str, Any], place: float, style: dict[str, Any], *, has_interval: bool) -> None:
    """Caps reach above and below the mark, so that an interval shorter than it is seen, too."""
    if has_interval:
        axes.plot([row["low"], row["high"]], [place, place], "|-", color=style["color"], linewidth=1.5, markersize=9)
    axes.plot(row["ratio"], place, **style, markersize=5, clip_on=False)


def _prompt_counts(results: dict[str, Any]) -> Counter[str]:
    """How many prompts each dataset has, and `all`."""
    prompts = {measurement["prompt"] for measurement in results["measurements"]}
    return Counter(prompt.rpartition("/")[0] for prompt in prompts) + Counter({ALL: len(prompts)})


def _counted(prompts: int) -> str:
    return f"{prompts} prompt{'s' if prompts != 1 else ''}"


def style_of(results: dict[str, Any], method: str) -> dict[str, Any]:
    """Choose colour and mark: the same for a method in every plot."""
    if method.startswith("oracle"):
        return {"color": GREY, "marker": "*"}
    if method == _OURS:
        return {"color": AUTO_COLOUR, "marker": "o"}
    others = [row["method"] for row in results["pooled"] if row["method"] not in (PLAIN, _OURS)]
    number = others.index(method)
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKS[number % len(MARKS)]}
