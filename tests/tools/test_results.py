"""Rates, rows, table, advice and file, of measurements made up by hand."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.tools.measured import EFFORTS, made_up, results_of
from transformers_resps.tools.results import (
    AnswerTiming,
    BusyMachineError,
    Interval,
    Run,
    Standing,
    advice_of,
    advise,
    check_spread,
    compare,
    huge_page_mib,
    machine,
    markdown_table,
    peak_mib,
    plain_spread,
    reset_peak,
    summarise,
    summary_rows,
    write_results,
)


def test_summaries_stand_by_dataset_and_over_all() -> None:
    found = results_of(made_up())
    assert list(found["summaries"]) == ["a", "b", "all"]
    rows = {row["method"]: row for row in found["summaries"]["a"]}
    assert rows["tree 8/3/2"]["ratio"] == 2.0 and rows["tree 8/3/2"]["tau"] == 2.0
    assert rows["oracle (ceiling)"]["ratio"] == pytest.approx(12 / 3.2) and not rows["oracle (ceiling)"]["measured"]
    assert len(found["measurements"]) == 24


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


def test_the_table_has_a_row_for_everything_and_marks_what_was_estimated() -> None:
    lines = markdown_table(results_of(made_up())).splitlines()
    assert len(lines) == 2 + 3 * 5
    assert lines[2] == "| a | plain | 1.0 | 1.00 |  | 1.00 | 1.00 |  |  |"
    assert "| all | auto | 3.0 | 3.00 | 3.00 to 3.00 | 2.40 | 1.25 | 9.2 | 6 of 6 |" in lines
    rate = ("3.7", "3.8")  # sums of floats round otherwise since Python 3.12
    assert lines[-1].startswith(tuple(f"| all | *oracle (ceiling)* | {one} | 3.75 | 3.75 to 3.75 |" for one in rate))
    assert "| dataset | temperature | method |" in markdown_table(results_of(made_up((0.0, 1.0))))


def test_efficiency_is_the_share_of_tau_that_became_speed_against_each_plain() -> None:
    runs = made_up()
    for run in [run for run in runs if run.timing.method == "plain"]:
        runs.append(Run(replace(run.timing, method="plain, compiled", seconds=8.0), run.token_ids))
    names = ["plain", "plain, compiled", *list(EFFORTS)[1:]]
    rows = {row["method"]: row for row in summary_rows([run.timing for run in runs], names)["pooled"]}
    assert rows["plain, compiled"]["ratio"] == 1.5 and rows["plain"]["compiled_ratio"] == pytest.approx(8 / 12)
    auto = rows["auto"]
    assert (auto["ratio"], auto["tau"], auto["compiled_ratio"]) == (3.0, 2.4, 2.0)
    assert auto["efficiency"] == pytest.approx(3 / 2.4) and auto["compiled_efficiency"] == pytest.approx(2 / 2.4)
    table = markdown_table({**results_of(runs), "summaries": {"a": list(rows.values())}})
    assert "| a | auto | 3.0 | 3.00 | 3.00 to 3.00 | 2.40 | 1.25 | 2.00 | 0.83 | 9.2 |  |" in table.splitlines()
    assert "compiled plain" in table.splitlines()[0] and "compiled" not in markdown_table(results_of(made_up()))


def test_results_of_older_releases_are_shown_without_what_they_lack_and_a_refusal_in_one_line() -> None:
    old = results_of(made_up())
    for row in (row for rows in old["summaries"].values() for row in rows):
        for name in ("efficiency", "compiled_ratio", "compiled_efficiency"):
            del row[name]
    assert "| all | auto | 3.0 | 3.00 | 3.00 to 3.00 | 2.40 | 9.2 | 6 of 6 |" in markdown_table(old)
    last = markdown_table(old | {"not_compiled": "No C++ compiler was found."}).splitlines()[-1]
    assert last == "plain, compiled: not measured. No C++ compiler was found."


def test_the_most_memory_of_a_method_has_a_column_where_it_is_known() -> None:
    runs = [
        Run(replace(run.timing, peak_mib=700 + 10 * n), run.token_ids, run.steps) for n, run in enumerate(made_up())
    ]
    found = results_of(runs)
    assert found["pooled"][0]["peak_mib"] == 700 + 10 * (len(runs) - len(EFFORTS))
    lines = markdown_table(found).splitlines()
    assert lines[0].endswith("| nodes | peak MiB | same text |") and lines[2].endswith("|  | 780 |  |")
    assert "peak" not in markdown_table(results_of(made_up()))


def test_the_most_memory_since_the_last_reset_is_what_the_system_tells(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    assert peak_mib(cpu, tmp_path) is None
    reset_peak(cpu, tmp_path / "missing")
    (tmp_path / "status").write_text("Name:\tpython\nVmHWM:\t  331776 kB\nVmRSS:\t  1000 kB\n")
    assert peak_mib(cpu, tmp_path) == 324


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_memory_that_was_given_back_before_a_reset_is_forgotten() -> None:
    cpu = torch.device("cpu")
    large = torch.ones(2**26)
    before = peak_mib(cpu)
    del large
    reset_peak(cpu)
    after = peak_mib(cpu)
    assert before is not None and after is not None and after <= before - 200


def test_the_advice_is_over_everything_that_was_measured() -> None:
    timings = [run.timing for run in made_up((0.0, 1.0))]
    advice = advice_of(EFFORTS, timings, 1.5)
    assert advice.startswith("NOT ENOUGH EVIDENCE: 6 prompts say little about others.")
    assert advice.endswith("Use auto: 3.00 times plain decoding (3.00 to 3.00).")
    equal = [replace(m, seconds=4.0) if m.method == "tree 8/3/2" else m for m in timings]
    assert "on these: Use tree 8/3/2" in advice_of(EFFORTS, equal, 1.5)
    assert "no prompt was answered" in advice_of(EFFORTS, [], 1.5)


def test_results_keep_seven_digits_and_a_line_for_each_run(tmp_path: Path) -> None:
    runs = [{"seconds": 1.23456789, "tokens": 123456789}, {"seconds": 1.0e-7 / 3, "tokens": 2}]
    file = write_results(tmp_path / "results.json", {"schema_version": 2, "costs": {"1": [0.1 + 0.2]}, "runs": runs})
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


def measured(
    method: str, prompt: str, tokens: int, seconds: float, repeat: int = 0, forwards: int = 10
) -> AnswerTiming:
    return AnswerTiming(method, prompt, repeat, tokens, forwards, seconds)


def test_a_summary_compares_with_plain_decoding_on_the_same_prompts() -> None:
    rows = []
    for prompt, plain_seconds in (("x", 10.0), ("y", 30.0)):
        for repeat in (0, 1):
            rows.append(measured("plain", prompt, 100, plain_seconds, repeat, forwards=100))
            rows.append(measured("tree", prompt, 100, plain_seconds / 2 * (1 + 0.2 * repeat), repeat, forwards=40))
    found = summarise(rows, "tree")
    assert found["ratio"] == pytest.approx(2 / 1.1)
    assert found["tokens_per_second"] == pytest.approx(400 / 44)
    assert found["tau"] == 2.5
    assert found["spread"] == pytest.approx(0.2)
    assert (
        found["low"] == pytest.approx(found["ratio"]) == pytest.approx(found["high"])
    )  # the same gain on every prompt


def test_methods_are_compared_where_both_have_answered() -> None:
    rows = [measured("plain", "x", 10, 10.0), measured("tree", "x", 10, 5.0), measured("plain", "y", 10, 1000.0)]
    assert compare([rows], "tree", "plain").ratio == 2.0
    later = replace(measured("plain", "x", 10, 1000.0), turn=2)
    assert compare([[*rows, later]], "tree", "plain").ratio == 2.0
    assert compare([[*rows, later]], "plain", "tree").ratio == 0.5


def test_the_turns_of_a_conversation_are_drawn_together() -> None:
    turns = [replace(measured(m, "x", 10, s), turn=t) for t in (1, 2) for m, s in (("plain", 8.0), ("tree", 4.0 * t))]
    interval = compare([turns], "tree", "plain")
    assert [interval.low, interval.ratio, interval.high] == pytest.approx([16 / 12] * 3)  # one prompt: nothing to draw


def plain_answers(seconds: list[float], *, prompts: bool = True, prefill: float = 0.0) -> list[AnswerTiming]:
    places = ((f"x/{number}", 0) if prompts else ("x/0", number) for number in range(len(seconds)))
    return [
        AnswerTiming("plain", *place, 11, 11, value + prefill, prefill_seconds=prefill)
        for place, value in zip(places, seconds, strict=True)
    ]


def answers(rates: list[float]) -> list[AnswerTiming]:
    return plain_answers([10 / rate for rate in rates])


def test_a_wide_spread_of_plain_decoding_stops_the_measurement() -> None:
    check_spread(answers([10, 10, 11, 10, 12, 11, 10, 11]))
    with pytest.raises(BusyMachineError, match=r"spread by 50%.*8 answers.*more than 25%.*--accept-noise"):
        check_spread(answers([5, 5, 5, 10, 10, 10, 10, 10]))


@pytest.mark.parametrize("hit", ["plain", "tree"])
def test_one_answer_beside_a_busy_core_stops_the_measurement(hit: str) -> None:
    """It outweighs all others in total tokens over total seconds, and a spread of quartiles does not show it."""
    plain = answers([10.0] * 10)
    every = [*plain, *(replace(m, method="tree", target_forwards=6, seconds=m.seconds / 2) for m in plain)]
    check_spread(every)
    place = 3 if hit == "plain" else 13
    every[place] = replace(every[place], seconds=40 * every[place].seconds)
    assert plain_spread(every) == 0.0
    with pytest.raises(BusyMachineError, match=r"took 40 times as long as others of its method.*--accept-noise"):
        check_spread(every)


def test_few_answers_are_not_judged() -> None:
    check_spread(answers([1, 10, 1, 10, 1, 10, 1]))


def test_the_spread_of_plain_decoding_is_its_interquartile_range_over_its_median() -> None:
    seconds = [10 / rate for rate in (8, 9, 10, 11, 12)]  # ten tokens after the first: quartiles 9, 10, 11
    assert plain_spread(plain_answers(seconds)) == pytest.approx(0.2)
    assert plain_spread(plain_answers(seconds, prefill=50.0)) == pytest.approx(0.2)
    assert plain_spread(plain_answers(seconds, prompts=False)) == pytest.approx(0.2)


def test_the_second_repeat_is_no_noise_while_it_is_under_way() -> None:
    """Found live: on a quiet machine every benchmark of three repeats was stopped soon after the first."""
    first = answers([26, 27, 28, 28, 29, 29, 30, 30, 31, 31])
    second = [replace(m, repeat=1) for m in first]
    once = plain_spread(first)
    assert once is not None and once < 0.1
    for done in range(1, 10):
        assert plain_spread([*first, *second[:done]]) == once
    assert plain_spread([*first, *second]) == 0.0


def test_slow_prompts_are_no_noise_when_each_was_repeated() -> None:
    rows = [
        replace(m, prompt=f"x/{p}", seconds=m.seconds * p)
        for p in (1, 9)
        for m in plain_answers([2, 2], prompts=False)
    ]
    assert plain_spread(rows) == 0.0
    assert plain_spread(rows[:3]) is None  # too few to tell
    assert plain_spread([replace(m, tokens=3) for m in rows]) is None


EVEN = Interval(1.0, 1.0, 1.0)


def standing(name: str, effort: int, to_plain: tuple[float, float, float], to_fastest: Interval = EVEN) -> Standing:
    return Standing(name, effort, Interval(*to_plain), to_fastest)


BEHIND, WITHIN = Interval(0.8, 0.7, 0.9), Interval(0.97, 0.9, 1.05)
CASES = {
    "a policy that is surely fastest": (
        [standing("best fixed 12/4/4", 3, (1.2, 1.1, 1.3), BEHIND), standing("auto", 4, (1.5, 1.4, 1.6))],
        "Use auto: 1.50 ",
    ),
    "a fixed tree within noise of a policy": (
        [standing("best fixed 12/4/4", 3, (1.46, 1.3, 1.5), WITHIN), standing("Re-SpS mine", 5, (1.5, 1.4, 1.6))],
        "Best fixed 12/4/4 is as good ",
    ),
    "everything loses": (
        [standing("auto", 4, (0.97, 0.95, 0.99)), standing("best fixed 4/3/1", 3, (0.8, 0.7, 0.9), BEHIND)],
        "Speculation does not pay ",
    ),
    "a gain within noise is none": ([standing("auto", 4, (1.04, 0.98, 1.1))], "Decode plainly"),
    "a simpler method that is not surely better than plain does not replace one that is": (
        [standing("prompt lookup", 1, (1.1, 0.7, 1.6), WITHIN), standing("auto", 4, (1.2, 1.1, 1.3))],
        "Use auto: 1.20 ",
    ),
    "nothing to compare": ([], "Nothing was compared"),
}


@pytest.mark.parametrize(("standings", "advice"), CASES.values(), ids=CASES)
def test_the_advice_follows_from_the_intervals(standings: list[Standing], advice: str) -> None:
    assert advise(standings, 2.1, 10).startswith(advice)


def test_one_prompt_gives_no_advice_and_a_few_are_told_first() -> None:
    fast = [standing("auto", 4, (2.0, 1.9, 2.1))]
    assert advise(fast, 2.1, 1).startswith("NOT ENOUGH EVIDENCE: one prompt says nothing about others.")
    few = advise(fast, 2.1, 2)
    assert few.startswith("NOT ENOUGH EVIDENCE: 2 prompts") and few.endswith(advise(fast, 2.1, 8))
    assert advise(fast, 2.1, 8).startswith("Use auto")
    assert advise([], 2.1, 2).startswith("Nothing was compared")


def test_huge_pages_are_told_and_other_variables_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    model = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)
    for name in ("THP_MEM_ALLOC_ENABLE", "LD_PRELOAD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    assert machine(model)["environment"] == {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def test_the_memory_in_huge_pages_is_told_where_the_system_knows(tmp_path: Path) -> None:
    assert huge_page_mib(tmp_path) is None
    rollup = tmp_path / "smaps_rollup"
    rollup.write_text("55d0-7fff ---p 00000000 00:00 0    [rollup]\nRss:    1288724 kB\nAnonHugePages:    331776 kB\n")
    assert huge_page_mib(tmp_path) == 324
    rollup.write_text("Rss:    1288724 kB\n")
    assert huge_page_mib(tmp_path) is None
