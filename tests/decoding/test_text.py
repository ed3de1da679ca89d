"""A text is plain greedy only where nothing looks at its tokens."""

from typing import Any

import pytest
import torch
from transformers import (
    EosTokenCriteria,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
)

from transformers_resps.decoding.text import StopConditions, Text


def text_of(*criteria: StoppingCriteria, rows: int = 1, **options: Any) -> Text:
    """Three positions."""
    options = {"logits_processor": LogitsProcessorList(), "do_sample": False} | options
    prompt = torch.zeros(rows, 3, dtype=torch.long)
    return Text(prompt, stopping_criteria=StoppingCriteriaList(criteria), pad_token=torch.tensor(0), **options)


class EndsOnSeven(EosTokenCriteria):
    """A kind of end token of the caller's."""


@pytest.mark.parametrize(
    ("criteria", "options"),
    [
        ([MaxTimeCriteria(1.0)], {}),
        ([EndsOnSeven(7)], {}),
        ([], {"do_sample": True}),
        ([], {"streamer": object()}),
        ([], {"keep_scores": True}),
        ([], {"keep_logits": True}),
        ([], {"logits_processor": LogitsProcessorList([TemperatureLogitsWarper(2.0)])}),
        ([], {"rows": 2}),
    ],
)
def test_whatever_looks_at_tokens_is_asked(criteria: list[StoppingCriteria], options: dict[str, Any]) -> None:
    assert text_of(MaxLengthCriteria(9)).is_plain_greedy(4)
    assert not text_of(MaxLengthCriteria(9), *criteria, **options).is_plain_greedy(4)
    assert StopConditions.of(StoppingCriteriaList([EosTokenCriteria(2)])) is None


def test_transformers_may_warn_of_a_text_that_gets_too_long() -> None:
    text = text_of(MaxLengthCriteria(20, max_position_embeddings=9), EosTokenCriteria([4, 5]))
    assert text.stop_conditions == StopConditions(frozenset({4, 5}), 20, 9)
    assert text.is_plain_greedy(6) and not text.is_plain_greedy(7)


@pytest.mark.parametrize("positions", [9, 12, None])
def test_a_text_that_ends_in_time_is_warned_of_nowhere(positions: int | None) -> None:
    assert text_of(MaxLengthCriteria(9, max_position_embeddings=positions)).is_plain_greedy(50)
