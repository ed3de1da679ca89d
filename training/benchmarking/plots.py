"""Draws four plots of a `results.json`."""

import io
import json
from collections import Counter
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

from transformers_resps.tools.loading import short_name
from transformers_resps.tools.results import ALL, PLAIN


# Okabe and Ito's colours, told apart by everyone, but for their yellow, which is hard to see on white. `auto` is blue
# everywhere; the ceiling and plain decoding are grey.
AUTO_COLOUR = "#0072B2"
COLOURS = ("#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C510A", "#882255", "#000000")
GREY = "#777777"
MARKS = "s^Dv<>pX"
_OURS = "auto"
_DOTS = 120  # per inch
_SHADES = 64  # colours of a file: a quarter of the bytes, and nothing to see of it
_HOLLOW = {"fillstyle": "none", "markeredgewidth": 2, "clip_on": False}  # one mark does not hide another


def draw_plots(results: dict[str, Any], folder: Path) -> list[Path]:
    """Write the PNG files into `folder` and return them; one without data is left out."""
    drawings: dict[str, Callable[[dict[str, Any]], Any]] = {
        "ratios.png": ratios,
        "tau.png": tau_and_nodes,
        "time.png": time_parts,
        "costs.png": costs,
    }
    written = []
    for name, draw in drawings.items():
        figure = draw(results)
        if figure is not None:
            save_figure(figure, folder / name)
            written.append(folder / name)
    return written


def tau_and_nodes(results: dict[str, Any]) -> Any:
    """Plot tokens per target forward against the nodes that a forward verifies."""
    taus = _taus(results)
    told = {name: steps for name, steps in results["steps"].items() if name in taus}
    if not told:
        return None
    figure = figure_of(7, 5.2, "What a target forward verifies, and what it yields", results)
    axes = figure.subplots()
    for name, steps in told.items():
        style = style_of(results, name) | _HOLLOW | {"markersize": 9}
        axes.plot(steps["mean_nodes"], taus[name], **style, linestyle="", label=name)
    axes.plot(1, 1, "*", color=GREY, markersize=10, linestyle="", clip_on=False, label="plain")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlim(0.8, max(2.0, *(steps["mean_nodes"] for steps in told.values())) * 1.5)
    axes.set_ylim(bottom=min(0.9, *(0.95 * tau for tau in taus.values())))
    axes.set_xlabel("nodes verified in a target forward (mean)")
    axes.set_ylabel("tau: tokens per target forward")
    axes.grid(alpha=0.3)
    put_legend(figure, axes.get_legend_handles_labels()[0])
    return figure


def time_parts(results: dict[str, Any]) -> Any:
    """Plot milliseconds per token, and what they are spent on where the method tells."""
    rows = [row for row in results["pooled"] if row["measured"]]
    parts = ("prefill", "verify", "draft", "rest")
    figure = figure_of(8, 2.2 + 0.4 * len(rows), "What a token's time is spent on", results)
    axes = figure.subplots()
    colours = dict(zip(parts, ("#BBBBBB", "#0072B2", "#E69F00", "#009E73"), strict=True))
    shown: set[str] = set()
    for place, row in enumerate(rows):
        steps = results["steps"].get(row["method"])
        values = {"whole call (no breakdown)": 1e3 / row["tokens_per_second"]}
        if steps:
            values = {part: 1e3 * steps[f"{part}_seconds"] for part in parts}
        left = 0.0
        for part, value in values.items():
            label = None if part in shown else part
            axes.barh(place, value, left=left, color=colours.get(part, "#E5E5E5"), label=label)
            shown.add(part)
            left += max(value, 0.0)
    axes.set_yticks(range(len(rows)), [row["method"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds per token")
    axes.set_axisbelow(True)
    axes.grid(axis="x", alpha=0.3)
    put_legend(figure, axes.get_legend_handles_labels()[0])
    return figure


def costs(results: dict[str, Any]) -> Any:
    """Plot what a target forward costs by the nodes that it verifies, and a level of the head by its width.

    A forward over more nodes does more work, so where it took less time than a smaller one, the difference is noise:
    shaded. Bars hold the middle half of the repeats, where the results have it.
    """
    told = json.loads(json.dumps(results["costs"]))  # sizes as texts, as a file has them
    ranges = told.get("verify_range", {})
    repeats = ", and the middle half of its repeats" if ranges else ""
    figure = figure_of(7, 5.2, f"What a forward costs{repeats}", results)
    axes = figure.subplots()
    series: list[Any] = [(f"target forward, context {c}", row, ranges.get(c, {})) for c, row in told["verify"].items()]
    series += [("one level of the head", told["draft"], told.get("draft_range", {}))] if told["draft"] else []
    is_noisy = False
    for number, (label, row, spread) in enumerate(series):
        nodes = sorted(row, key=int)
        values = [1e3 * row[count] for count in nodes]
        ends = [[1e3 * seconds for seconds in spread.get(count, (row[count],) * 2)] for count in nodes]
        bars = [[abs(value - pair[end]) for value, pair in zip(values, ends, strict=True)] for end in (0, 1)]
        colour = (AUTO_COLOUR, *COLOURS)[number]
        style = {"marker": MARKS[number], "color": colour, "capsize": 4, "markersize": 5}
        style |= _HOLLOW | {"markeredgewidth": 1.5, "zorder": 3}
        axes.errorbar(list(map(int, nodes)), values, bars if spread else None, label=label, **style)
        is_noisy |= _shade_noise(axes, list(map(int, nodes)), values, colour)
    context, first = next(iter(told["verify"].items()))
    plain = 1e3 * (told.get("plain") or {}).get(context, first["1"])
    axes.axhline(plain, color="black", linewidth=0.8, linestyle=":", label=f"plain decoding, context {context}")
    steps = axes.secondary_yaxis("right", functions=(lambda value: value / plain, lambda value: value * plain))
    steps.set_ylabel("plain forwards")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("nodes; for the head, width of the level")
    axes.set_ylabel("milliseconds")
    axes.grid(alpha=0.3)
    if is_noisy:
        axes.fill_between([], [], color=GREY, alpha=0.3, label="shaded: noise, more nodes took less time")
    put_legend(figure, axes.get_legend_handles_labels()[0])
    return figure


def _shade_noise(axes: Any, nodes: list[int], values: list[float], colour: str) -> bool:
    """Shade between the two rising lines that enclose the values, if these fall anywhere; whether they do."""
    above = list(accumulate(values, max))
    below = list(accumulate(reversed(values), min))[::-1]
    if above == below:
        return False
    axes.fill_between(nodes, below, above, color=colour, alpha=0.2, linewidth=0)
    return True


def _taus(results: dict[str, Any]) -> dict[str, float]:
    return {row["method"]: row["tau"] for row in results["pooled"] if row["measured"]}


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
    """Draw a ratio; the caps of its interval reach above and below the mark, so that a short one is seen, too."""
    if has_interval:
        axes.plot([row["low"], row["high"]], [place, place], "|-", color=style["color"], linewidth=1.5, markersize=9)
    axes.plot(row["ratio"], place, **style, markersize=5, clip_on=False)


def _prompt_counts(results: dict[str, Any]) -> Counter[str]:
    """Count the prompts of each dataset, and of all."""
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
