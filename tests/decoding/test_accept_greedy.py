"""The fast path of acceptance accepts what the general rule does, and is taken only where nothing looks."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    EosTokenCriteria,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
)

from transformers_resps.decoding.acceptance import Acceptance, accept, accept_greedy
from transformers_resps.decoding.stop_conditions import StopConditions
from transformers_resps.decoding.text import Text
from transformers_resps.tree import DraftTree

from .trees import VOCABULARY, trees


def text_of(length: int, criteria: list[StoppingCriteria], rows: int = 1, **options: Any) -> Text:
    options = {"logits_processor": LogitsProcessorList(), "do_sample": False} | options
    prompt = torch.zeros(rows, length, dtype=torch.long)
    return Text(prompt, stopping_criteria=StoppingCriteriaList(criteria), pad_token=torch.tensor(0), **options)


@settings(max_examples=800)
@given(st.data())
def test_rows_accept_what_each_would_alone(data: st.DataObject) -> None:
    """Several steps over random trees, with picks that tie, end tokens and lengths that stop rows anywhere."""
    count = data.draw(st.integers(1, 6))
    rows = [data.draw(trees(8).filter(lambda tree: tree.node_count >= count)).first(count) for _ in range(3)]
    tree = DraftTree.from_parents(torch.cat([row.tokens for row in rows]), torch.cat([row.parents for row in rows]))
    numbers = st.lists(st.integers(0, 2), min_size=3 * count * VOCABULARY, max_size=3 * count * VOCABULARY)
    logits = torch.tensor(data.draw(numbers)).reshape(3, count, VOCABULARY).bfloat16()
    ends = data.draw(st.lists(st.integers(0, VOCABULARY - 1), max_size=2))
    lengths = data.draw(st.lists(st.integers(1, 4), min_size=3, max_size=3))
    criteria: list[StoppingCriteria] = [MaxLengthCriteria(data.draw(st.integers(5, 12)))]
    criteria += [EosTokenCriteria(ends)] if ends else []
    alone, together = ([text_of(length, criteria) for length in lengths] for _ in range(2))
    expected = [accept(tree.row(row), logits[row : row + 1], text) for row, text in enumerate(alone)]
    paths, picks = accept_greedy(tree, logits, together)
    for row, found in enumerate(expected):
        assert found.path[0].tolist() == paths[row] and found.tokens[0].tolist() == picks[row]
        assert found.counts == found.emitted == [len(paths[row])]
        assert torch.equal(alone[row].input_ids, together[row].input_ids)
        assert torch.equal(alone[row].unfinished, together[row].unfinished)
        assert alone[row].finished == together[row].finished


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
def test_whoever_looks_is_asked(criteria: list[StoppingCriteria], options: dict[str, Any]) -> None:
    assert text_of(3, [MaxLengthCriteria(9)]).is_plain_greedy(4)
    assert not text_of(3, [MaxLengthCriteria(9), *criteria], **options).is_plain_greedy(4)
    assert StopConditions.of(StoppingCriteriaList([EosTokenCriteria(2)])) is None


def test_transformers_may_warn_of_a_text_that_gets_too_long() -> None:
    text = text_of(3, [MaxLengthCriteria(20, max_position_embeddings=9), EosTokenCriteria([4, 5])])
    assert text.stop_conditions == StopConditions(frozenset({4, 5}), 20, 9)
    assert text.is_plain_greedy(6) and not text.is_plain_greedy(7)


def test_shorter_rows_repeat_their_last_number() -> None:
    acceptance = Acceptance.from_rows([[0], [0, 3, 4]], [[5], [6, 7, 8]], [1, 3], torch.device("cpu"))
    assert acceptance.path.tolist() == [[0, 0, 0], [0, 3, 4]] and acceptance.tokens.tolist() == [[5, 5, 5], [6, 7, 8]]
    assert acceptance.counts == [1, 3]
