"""Results, table and plots of measurements made up by hand."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from transformers_resps.bench.advice import advice_of
from transformers_resps.bench.headroom import ceiling_of
from transformers_resps.bench.methods import Method
from transformers_resps.bench.plots import costs, draw_plots, ratios, sizes_over_time, tau_and_nodes, time_parts
from transformers_resps.bench.results import measured_part, read_results, write_results
from transformers_resps.bench.runs import Run
from transformers_resps.bench.steps import BUCKETS, Step, bucket_of, summarise_steps
from transformers_resps.bench.table import markdown_table
from transformers_resps.bench.timing import AnswerTiming


METHODS = [
    Method("plain"),
    Method("prompt lookup", effort=1),
    Method("tree 8/3/2", effort=3),
    Method("auto", effort=4),
]


def made_up(temperatures: tuple[float, ...] = (0.0,)) -> list[Run]:
    """Two datasets of three prompts: the tree twice as fast as plain decoding, auto three times."""
    runs = []
    for temperature in temperatures:
        for prompt in ("a/0", "a/1", "a/2", "b/0", "b/1", "b/2"):
            for method, forwards, seconds in zip(METHODS, (12, 10, 6, 5), (12.0, 11.0, 6.0, 4.0), strict=True):
                m = AnswerTiming(method.name, prompt, 0, 12, forwards, seconds, 1, temperature, 1.0)
                runs.append(Run(m, torch.arange(12), steps_for(method.name)))
    return runs


def steps_for(name: str) -> list[Step]:
    prefill = Step((1, 0, 1, 0), 1, 1, 0.0, 0.8, 1.0)
    if name == "tree 8/3/2":
        return [prefill] + [Step((8, 3, 2, 0), 8, 2, 0.2, 0.6, 0.9)] * 5
    if name == "auto":
        return [prefill, Step((1, 0, 1, 0), 1, 1, 0.0, 0.5, 0.6)] + [Step((17, 5, 4, 2), 12, 4, 0.2, 0.4, 0.7)] * 3
    return []


def results_of(runs: list[Run], **changes: Any) -> dict[str, Any]:
    ceilings = [ceiling_of(run.timing, 0.2) for run in runs if run.timing.method == "plain"]
    names = [method.name for method in METHODS]
    return {
        "schema_version": 2,
        "target": "work/tiny",
        "head": "runs/chat/head",
        "dtype": "float32",
        "device": "Ash Tray 9",
        "settings": {"temperatures": sorted({run.timing.temperature for run in runs})},
        "same_text": dict.fromkeys(names, 6),
        "costs": {"verify": {"128": {"1": 0.01, "8": 0.02}, "768": {"1": 0.02, "8": 0.03}}, "draft": {"1": 0.001}},
        **measured_part(METHODS, runs, ceilings),
        **changes,
    }


def test_summaries_stand_by_dataset_and_over_all() -> None:
    found = results_of(made_up())
    assert list(found["summaries"]) == ["a", "b", "all"]
    rows = {row["method"]: row for row in found["summaries"]["a"]}
    assert rows["tree 8/3/2"]["ratio"] == 2.0 and rows["tree 8/3/2"]["tau"] == 2.0
    assert rows["oracle (ceiling)"]["ratio"] == pytest.approx(12 / 3.2) and not rows["oracle (ceiling)"]["measured"]
    assert len(found["measurements"]) == 24 and len(found["ceilings"]) == 6


def test_two_methods_are_compared_on_texts_that_both_wrote_alike() -> None:
    runs = made_up()
    slow = [run for run in runs if run.timing.method == "auto" and run.timing.prompt != "a/0"]
    for run in slow:  # five texts of its own, which took it long
        runs[runs.index(run)] = Run(replace(run.timing, seconds=90.0), torch.zeros(12), run.steps)
    found = {(row["method"], row["base"]): row for row in results_of(runs)["same_texts"]}
    assert found["tree 8/3/2", "prompt lookup"]["texts"] == 6
    assert found["tree 8/3/2", "prompt lookup"]["ratio"] == pytest.approx(11 / 6)
    own = found["auto", "plain"]
    assert (own["texts"], own["of"], own["ratio"]) == (1, 6, 3.0)
    assert ("plain", "auto") not in found


def test_temperatures_have_rows_of_their_own() -> None:
    found = results_of(made_up((0.0, 1.0)))
    assert [row["temperature"] for row in found["summaries"]["all"]] == [0.0] * 5 + [1.0] * 5
    assert [row["temperature"] for row in found["pooled"]] == [None] * 5


def test_steps_say_where_the_time_goes() -> None:
    steps = results_of(made_up())["steps"]
    assert list(steps) == ["tree 8/3/2", "auto"]
    tree = steps["tree 8/3/2"]  # twelve tokens, six seconds
    assert tree["mean_nodes"] == 8
    parts = [tree[f"{part}_seconds"] * 12 for part in ("prefill", "draft", "verify", "rest")]
    assert parts == pytest.approx([1.0, 1.0, 3.0, 1.0])
    assert tree["shapes"] == {"8/3/2": 30}
    assert steps["auto"]["sizes"] == [[6, 0, 0, 18, 0, 0]]


def test_sizes_are_counted_by_eight_steps() -> None:
    steps = [Step((1, 0, 1, 0), nodes, 1, 0, 0, 1) for nodes in [1, *[8] * 9]]
    assert summarise_steps([steps], 10, 10.0).sizes == [[0, 0, 8, 0, 0, 0], [0, 0, 1, 0, 0, 0]]


@pytest.mark.parametrize(
    ("nodes", "bucket"),
    [(1, "plain"), (2, "2 to 4"), (4, "2 to 4"), (5, "5 to 8"), (16, "9 to 16"), (33, "above 32")],
)
def test_nodes_fall_into_buckets(nodes: int, bucket: str) -> None:
    assert BUCKETS[bucket_of(nodes)] == bucket


def test_the_table_has_a_row_for_everything_and_marks_what_nobody_measured() -> None:
    lines = markdown_table(results_of(made_up())).splitlines()
    assert len(lines) == 2 + 3 * 5
    assert lines[2] == "| a | plain | 1.0 | 1.00 |  | 1.00 | 1.00 |  |  |  |  |"
    assert "| all | auto | 3.0 | 3.00 | 3.00 to 3.00 | 2.40 | 1.25 |  |  | 9.2 | 6 of 6 |" in lines
    assert lines[-1].startswith("| all | *oracle (ceiling)* | 3.8 |")
    assert "| dataset | temperature | method |" in markdown_table(results_of(made_up((0.0, 1.0))))


def test_efficiency_is_the_share_of_tau_that_became_speed_against_each_plain() -> None:
    runs = made_up()
    for run in [run for run in runs if run.timing.method == "plain"]:
        runs.append(Run(replace(run.timing, method="plain, compiled", seconds=8.0), run.token_ids))
    names = [Method("plain"), Method("plain, compiled"), *METHODS[1:]]
    rows = {row["method"]: row for row in measured_part(names, runs, [])["pooled"]}
    assert rows["plain, compiled"]["ratio"] == 1.5 and rows["plain"]["compiled_ratio"] == pytest.approx(8 / 12)
    auto = rows["auto"]
    assert (auto["ratio"], auto["tau"], auto["compiled_ratio"]) == (3.0, 2.4, 2.0)
    assert auto["efficiency"] == pytest.approx(3 / 2.4) and auto["compiled_efficiency"] == pytest.approx(2 / 2.4)
    table = markdown_table({**results_of(runs), "summaries": {"a": list(rows.values())}})
    assert "| a | auto | 3.0 | 3.00 | 3.00 to 3.00 | 2.40 | 1.25 | 2.00 | 0.83 | 9.2 |  |" in table.splitlines()


def test_results_of_older_releases_are_shown_without_what_they_lack_and_a_refusal_in_one_line() -> None:
    old = results_of(made_up())
    for row in (row for rows in old["summaries"].values() for row in rows):
        for name in ("efficiency", "compiled_ratio", "compiled_efficiency"):
            del row[name]
    assert "| all | auto | 3.0 | 3.00 | 3.00 to 3.00 | 2.40 |  |  |  | 9.2 | 6 of 6 |" in markdown_table(old)
    last = markdown_table(old | {"not_compiled": "No C++ compiler was found."}).splitlines()[-1]
    assert last == "plain, compiled: not measured. No C++ compiler was found."


def test_the_advice_is_over_everything_that_was_measured() -> None:
    timings = [run.timing for run in made_up((0.0, 1.0))]
    advice = advice_of(METHODS, timings, 1.5)
    assert advice.startswith("NOT ENOUGH EVIDENCE: 6 prompts say little about others.")
    assert advice.endswith("Use auto: 3.00 times plain decoding (3.00 to 3.00).")
    equal = [replace(m, seconds=4.0) if m.method == "tree 8/3/2" else m for m in timings]
    assert "on these: Use tree 8/3/2" in advice_of(METHODS, equal, 1.5)
    assert "no prompt was answered" in advice_of(METHODS, [], None)


def test_results_keep_seven_digits_and_a_line_for_each_run(tmp_path: Path) -> None:
    runs = [{"seconds": 1.23456789, "tokens": 123456789}, {"seconds": 1.0e-7 / 3, "tokens": 2}]
    file = write_results(tmp_path, {"schema_version": 2, "costs": {"1": [0.1 + 0.2]}, "runs": runs})
    assert file.read_text().splitlines() == [
        "{",
        '"schema_version": 2,',
        '"costs": {"1":[0.3]},',
        '"runs": [',
        '{"seconds":1.234568,"tokens":123456789},',
        '{"seconds":3.333333e-08,"tokens":2}',
        "]",
        "}",
    ]


def test_results_are_read_back_and_an_old_schema_is_refused(tmp_path: Path) -> None:
    file = write_results(tmp_path, {"schema_version": 2, "x": 1})
    assert read_results(file) == {"schema_version": 2, "x": 1}
    for text, found in (('{"schema": 1}', "schema 1"), ("{}", "schema None"), ("[", "cannot be read")):
        file.write_text(text)
        with pytest.raises(ValueError, match=found):
            read_results(file)


@pytest.mark.parametrize("temperatures", [(0.0,), (0.0, 1.0)])
def test_every_plot_is_drawn(tmp_path: Path, temperatures: tuple[float, ...]) -> None:
    results = json.loads(json.dumps(results_of(made_up(temperatures))))
    files = draw_plots(results, tmp_path)
    assert [file.name for file in files] == ["ratios.png", "tau.png", "sizes.png", "time.png", "costs.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)


@pytest.mark.parametrize("draw", [ratios, tau_and_nodes, sizes_over_time, time_parts, costs])
def test_a_plot_has_a_title_and_cuts_nothing_off(draw: Any) -> None:
    runs = [
        replace(run, timing=replace(run.timing, method=long_name(run.timing.method))) for run in made_up((0.0, 1.0))
    ]
    figure = draw(results_of(runs))
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
    whole = results_of(made_up())
    alone = results_of([run for run in made_up() if run.timing.method in ("plain", "auto")])
    colours = [
        {line.get_label(): line.get_color() for line in tau_and_nodes(found).axes[0].get_lines()}
        for found in (whole, alone)
    ]
    assert colours[0]["auto"] == colours[1]["auto"] == "#0072B2"
    assert list(colours[0].values()).count("#0072B2") == 1


def test_marks_at_one_place_do_not_hide_each_other() -> None:
    lines = tau_and_nodes(results_of(made_up())).axes[0].get_lines()
    marks = [line for line in lines if line.get_label() != "plain"]
    assert len({line.get_marker() for line in marks}) == len(marks) > 1
    assert all(line.get_fillstyle() == "none" for line in marks)


def test_costs_have_error_bars_where_the_spread_is_known() -> None:
    told = results_of(made_up())
    assert "repeats" not in costs(told).get_suptitle()
    told["costs"] = {"verify": {128: {1: 0.01, 8: 0.02}}, "draft": {}}  # sizes are numbers before they are in a file
    told["costs"]["verify_range"] = {128: {1: [0.008, 0.011], 8: [0.02, 0.025]}}
    figure = costs(told)
    [bars] = figure.axes[0].containers[0].lines[2]
    assert [tuple(round(y, 6) for _, y in ends) for ends in bars.get_segments()] == [(8.0, 11.0), (20.0, 25.0)]
    assert "middle half of its repeats" in figure.get_suptitle()


def test_a_plot_without_data_is_left_out(tmp_path: Path) -> None:
    runs = [run for run in made_up() if run.timing.method == "plain"]
    names = [file.name for file in draw_plots(results_of(runs), tmp_path)]
    assert "tau.png" not in names and "sizes.png" not in names and "costs.png" in names
