from dataclasses import replace
from itertools import cycle

import pytest

from transformers_resps.bench.timing import (
    AnswerTiming,
    bootstrap_interval,
    compare,
    plain_spread,
    rate,
    summarise,
    token_count,
)


def measured(
    method: str, prompt: str, tokens: int, seconds: float, repeat: int = 0, forwards: int = 10
) -> AnswerTiming:
    return AnswerTiming(method, prompt, repeat, tokens, forwards, seconds)


@pytest.mark.parametrize(
    ("answer", "most", "count"),
    [([5, 6, 7], 8, 3), ([5, 2, 7, 2], 8, 2), ([2], 8, 1), ([5, 6, 7, 8], 3, 3), ([5, 6, 7, 2], 3, 3), ([], 8, 0)],
)
def test_tokens_count_to_the_first_end_token_and_the_budget(answer: list[int], most: int, count: int) -> None:
    assert token_count(answer, {2}, most) == count


def test_the_rate_is_total_over_total_not_a_mean_of_rates() -> None:
    assert rate([measured("a", "x", 10, 1.0), measured("a", "y", 10, 4.0)]) == 4.0


def test_a_summary_compares_with_plain_decoding_on_the_same_prompts() -> None:
    rows = []
    for prompt, plain_seconds in (("x", 10.0), ("y", 30.0)):
        for repeat in (0, 1):
            rows.append(measured("plain", prompt, 100, plain_seconds, repeat, forwards=100))
            rows.append(measured("tree", prompt, 100, plain_seconds / 2 * (1 + 0.2 * repeat), repeat, forwards=40))
    found = summarise(rows, "tree")
    assert found.ratio == pytest.approx(2 / 1.1)
    assert found.tokens_per_second == pytest.approx(400 / 44)
    assert found.tau == 2.5
    assert found.spread == pytest.approx(0.2)
    assert found.low == pytest.approx(found.ratio) == pytest.approx(found.high)  # the same gain on every prompt


def test_methods_are_compared_where_both_have_answered() -> None:
    rows = [measured("plain", "x", 10, 10.0), measured("tree", "x", 10, 5.0), measured("plain", "y", 10, 1000.0)]
    assert compare(rows, "tree", "plain").ratio == 2.0
    later = replace(measured("plain", "x", 10, 1000.0), turn=2)
    assert compare([*rows, later], "tree", "plain").ratio == 2.0
    assert compare([*rows, later], "plain", "tree").ratio == 0.5


def test_the_turns_of_a_conversation_are_drawn_together() -> None:
    turns = [replace(measured(m, "x", 10, s), turn=t) for t in (1, 2) for m, s in (("plain", 8.0), ("tree", 4.0 * t))]
    interval = compare(turns, "tree", "plain")
    assert interval.low == interval.ratio == interval.high == pytest.approx(16 / 12)  # one prompt: nothing to draw


def test_the_interval_is_paired_and_covers_the_ratios_of_the_prompts() -> None:
    own = [[measured("tree", "x", 10, 1.0)], [measured("tree", "y", 10, 10.0)]]
    base = [[measured("plain", "x", 10, 3.0)], [measured("plain", "y", 10, 10.0)]]
    draws = cycle([[0, 0], [1, 1]])
    assert bootstrap_interval(own, base, draws=100, choose=lambda count: next(draws)) == (1.0, 3.0)
    low, high = bootstrap_interval(own, base)
    assert 1.0 <= low < high <= 3.0
    assert bootstrap_interval(own, base) == (low, high)  # the same every time


def plain_answers(seconds: list[float], *, prompts: bool, prefill: float = 0.0) -> list[AnswerTiming]:
    return [
        replace(
            measured("plain", f"x/{number if prompts else 0}", 11, value + prefill, 0 if prompts else number),
            prefill_seconds=prefill,
        )
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
