"""Plots of measurements made up by hand."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarking.plots import costs, draw_plots, ratios, tau_and_nodes, time_parts
from tests.tools.measured import made_up, results_of
from transformers_resps.tools.results import Run


def detailed(runs: Sequence[Run]) -> dict[str, Any]:
    return results_of(runs, list(dict.fromkeys(run.timing.method for run in runs)))


@pytest.mark.parametrize("temperatures", [(0.0,), (0.0, 1.0)])
def test_every_plot_is_drawn(tmp_path: Path, temperatures: tuple[float, ...]) -> None:
    results = json.loads(json.dumps(detailed(made_up(temperatures))))
    files = draw_plots(results, tmp_path)
    assert [file.name for file in files] == ["ratios.png", "tau.png", "time.png", "costs.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)


@pytest.mark.parametrize("draw", [ratios, tau_and_nodes, time_parts, costs])
def test_a_plot_has_a_title_and_cuts_nothing_off(draw: Any) -> None:
    runs = [
        replace(run, timing=replace(run.timing, method=long_name(run.timing.method))) for run in made_up((0.0, 1.0))
    ]
    figure = draw(detailed(runs))
    figure.canvas.draw()
    assert figure.get_suptitle().strip()
    assert "tiny with chat, float32, Ash Tray 9" in [text.get_text() for text in figure.texts]
    [legend] = figure.legends
    drawn, page = legend.get_window_extent(), figure.bbox
    assert page.x0 <= drawn.x0 and drawn.x1 <= page.x1 and page.y0 <= drawn.y0
    for axes in figure.axes:
        (left, right), (low, high) = sorted(axes.get_xlim()), sorted(axes.get_ylim())
        for line in axes.get_lines():
            if line.get_transform() == axes.transData:  # not a line across the whole plot
                assert all(left <= x <= right for x in line.get_xdata())
                assert all(low <= y <= high for y in line.get_ydata())


def long_name(method: str) -> str:
    return f"policy-of-a-run-with-quite-a-long-name-{method}" if method == "prompt lookup" else method


def test_auto_has_its_own_colour_whatever_stands_beside_it() -> None:
    whole = detailed(made_up())
    alone = detailed([run for run in made_up() if run.timing.method in ("plain", "auto")])
    colours = [
        {line.get_label(): line.get_color() for line in tau_and_nodes(found).axes[0].get_lines()}
        for found in (whole, alone)
    ]
    assert colours[0]["auto"] == colours[1]["auto"]
    assert list(colours[0].values()).count(colours[0]["auto"]) == 1


def test_marks_at_one_place_do_not_hide_each_other() -> None:
    lines = tau_and_nodes(detailed(made_up())).axes[0].get_lines()
    marks = [line for line in lines if line.get_label() != "plain"]
    assert len({line.get_marker() for line in marks}) == len(marks) > 1
    assert all(line.get_fillstyle() == "none" for line in marks)


def test_costs_have_error_bars_where_the_spread_is_known() -> None:
    told = detailed(made_up())
    assert "repeats" not in costs(told).get_suptitle()
    told["costs"] = {"verify": {128: {1: 0.01, 8: 0.02}}, "draft": {}}  # sizes are numbers before they are in a file
    told["costs"]["verify_range"] = {128: {1: [0.008, 0.011], 8: [0.02, 0.025]}}
    figure = costs(told)
    [bars] = figure.axes[0].containers[0].lines[2]
    assert [tuple(round(y, 6) for _, y in ends) for ends in bars.get_segments()] == [(8.0, 11.0), (20.0, 25.0)]
    assert "middle half of its repeats" in figure.get_suptitle()


def test_all_prompts_come_first_and_what_one_prompt_gave_has_no_interval() -> None:
    runs = [run for run in made_up() if run.timing.prompt not in ("b/1", "b/2")]
    figure = ratios(detailed(runs))
    [axes] = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["all\n4 prompts", "a\n3 prompts", "b\n1 prompt"]
    methods = len(detailed(runs)["pooled"]) - 1
    intervals = [line for line in axes.get_lines() if line.get_marker() == "|" and len(line.get_xdata()) == 2]
    assert len(intervals) == 2 * methods
    assert "95% intervals" in figure.get_suptitle()
    alone = ratios(detailed([run for run in runs if run.timing.prompt == "a/0"]))
    assert "interval" not in alone.get_suptitle()


def test_costs_shade_what_is_noise_and_nothing_where_more_nodes_cost_more() -> None:
    told = detailed(made_up())
    assert not costs(told).axes[0].collections
    told["costs"] = {"verify": {128: {1: 0.01, 2: 0.014, 4: 0.012, 8: 0.02}}, "draft": {}}
    figure = costs(told)
    shade = figure.axes[0].collections[0]
    corners = {tuple(point) for point in shade.get_paths()[0].vertices.round(6).tolist()}
    assert corners == {(1, 10), (2, 12), (2, 14), (4, 12), (4, 14), (8, 20)}
    assert "noise" in " ".join(text.get_text() for text in figure.legends[0].get_texts())


def test_a_plot_without_data_is_left_out(tmp_path: Path) -> None:
    runs = [run for run in made_up() if run.timing.method == "plain"]
    names = [file.name for file in draw_plots(detailed(runs), tmp_path)]
    assert "tau.png" not in names and "costs.png" in names
