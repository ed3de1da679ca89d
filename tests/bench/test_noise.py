from dataclasses import replace

import pytest

from transformers_resps.bench.noise import BusyMachine, check_load, check_spread, plain_spread
from transformers_resps.bench.timing import AnswerTiming


def answers(rates: list[float]) -> list[AnswerTiming]:
    return [AnswerTiming("plain", f"x/{number}", 0, 11, 11, 10 / rate) for number, rate in enumerate(rates)]


def test_a_machine_that_others_use_is_refused_before_the_start() -> None:
    for quiet in (None, 0.0, 0.5):
        check_load(quiet)
    with pytest.raises(BusyMachine, match="use 1.7 CPUs, but at most 0.5 .*--accept-noise"):
        check_load(1.7)


def test_a_wide_spread_of_plain_decoding_stops_the_measurement() -> None:
    check_spread(answers([10, 10, 11, 10, 12, 11, 10, 11]), "j")
    with pytest.raises(BusyMachine, match=r"spread by 50%.*8 answers.*more than 25%.*Delete j.*--accept-noise"):
        check_spread(answers([5, 5, 5, 10, 10, 10, 10, 10]), "j")


def test_few_answers_are_not_judged() -> None:
    check_spread(answers([1, 10, 1, 10, 1, 10, 1]), "j")


def plain_answers(seconds: list[float], *, prompts: bool, prefill: float = 0.0) -> list[AnswerTiming]:
    return [
        AnswerTiming(
            "plain",
            f"x/{number if prompts else 0}",
            0 if prompts else number,
            11,
            11,
            value + prefill,
            prefill_seconds=prefill,
        )  # fmt: skip
        for number, value in enumerate(seconds)
    ]


def test_the_spread_of_plain_decoding_is_its_interquartile_range_over_its_median() -> None:
    seconds = [10 / rate for rate in (8, 9, 10, 11, 12)]  # ten tokens after the first: quartiles 9, 10, 11
    assert plain_spread(plain_answers(seconds, prompts=True)) == pytest.approx(0.2)
    assert plain_spread(plain_answers(seconds, prompts=True, prefill=50.0)) == pytest.approx(0.2)
    assert plain_spread(plain_answers(seconds, prompts=False)) == pytest.approx(0.2)


def test_the_second_repeat_is_no_noise_while_it_is_under_way() -> None:
    """Found live: on a quiet machine every benchmark of three repeats was stopped soon after the first."""
    first = plain_answers([10 / rate for rate in (26, 27, 28, 28, 29, 29, 30, 30, 31, 31)], prompts=True)
    second = [replace(m, repeat=1) for m in first]
    once = plain_spread(first)
    assert once is not None and once < 0.1
    for done in range(1, 4):
        assert plain_spread([*first, *second[:done]]) == pytest.approx(once)
    for done in range(4, 11):
        assert plain_spread([*first, *second[:done]]) == 0.0


def test_slow_prompts_are_no_noise_when_each_was_repeated() -> None:
    rows = [
        replace(m, prompt=f"x/{p}", seconds=m.seconds * p)
        for p in (1, 9)
        for m in plain_answers([2, 2], prompts=False)
    ]
    assert plain_spread(rows) == 0.0
    assert plain_spread(rows[:3]) is None  # too few to tell
    assert plain_spread([replace(m, tokens=3) for m in rows]) is None
