"""Draws four plots of a `results.json`."""

import json
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

from transformers_resps.tools.plots import (
    AUTO_COLOUR,
    COLOURS,
    GREY,
    MARKS,
    figure_of,
    put_legend,
    ratios,
    save_figure,
    style_of,
)


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
