from dataclasses import replace

import pytest

from transformers_resps.bench.timing import AnswerTiming, compare, summarise, token_count


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
