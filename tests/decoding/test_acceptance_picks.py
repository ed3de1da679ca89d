"""Picks at all nodes at once: the same texts, random numbers, scores and streams as in commit order."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    EosTokenCriteria,
    LogitsProcessorList,
    MaxLengthCriteria,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    set_seed,
)

from tests.trees import VOCABULARY, trees
from transformers_resps.decoding.acceptance import Picks, ProcessedPicks, accept, accept_batch, accept_picks
from transformers_resps.decoding.text import Batch, Text
from transformers_resps.tree import DraftTree


class Streamer:
    def __init__(self) -> None:
        self.heard: list[list[int]] = []

    def put(self, tokens: torch.Tensor) -> None:
        assert tokens.device.type == "cpu"
        self.heard.append(tokens.tolist())


PROCESSORS = {
    "none": LogitsProcessorList(),
    "warpers": LogitsProcessorList([TemperatureLogitsWarper(0.8), TopKLogitsWarper(3)]),
    "penalty": LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.5)]),
}


def text_of(processors: str, ends: list[int], length: int, *, do_sample: bool) -> tuple[Text, Streamer]:
    criteria = StoppingCriteriaList([MaxLengthCriteria(length)] + [EosTokenCriteria(ends)] * bool(ends))
    hooks: dict[str, Any] = {"streamer": Streamer(), "keep_scores": True, "keep_logits": True}
    text = Text(
        torch.zeros(1, 2, dtype=torch.long),
        PROCESSORS[processors],
        criteria,
        do_sample=do_sample,
        pad_token=torch.tensor(0),
        **hooks,
    )
    return text, hooks["streamer"]


def accept_at_once(tree: DraftTree, logits: torch.Tensor, text: Text) -> tuple[list[int], list[int]]:
    picks = Picks.read(tree, logits, ProcessedPicks.of(text, tree, logits))
    acceptance = accept_picks(picks, [text])
    return acceptance.paths[0], acceptance.picks[0]


@settings(max_examples=400)
@given(trees(), st.sampled_from(sorted(PROCESSORS)), st.booleans(), st.data())
def test_picks_at_once_are_those_of_commit_order(
    tree: DraftTree, processors: str, do_sample: bool, data: st.DataObject
) -> None:
    seed = data.draw(st.integers(0, 10**6))
    ends = data.draw(st.lists(st.integers(1, VOCABULARY - 1), max_size=1))
    length = data.draw(st.integers(3, 9))
    shape = (1, tree.node_count, VOCABULARY)
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()
    (alone, heard), (together, heard_too) = (text_of(processors, ends, length, do_sample=do_sample) for _ in range(2))
    set_seed(seed)
    expected = accept(tree, logits, alone)
    state = torch.get_rng_state()
    set_seed(seed)
    path, picks = accept_at_once(tree, logits, together)
    assert expected.path[0].tolist() == path and expected.tokens[0].tolist() == picks
    assert torch.equal(torch.get_rng_state(), state)
    assert alone.input_ids.tolist() == together.input_ids.tolist()
    assert alone.finished == together.finished and alone.unfinished.tolist() == together.unfinished.tolist()
    assert heard.heard == heard_too.heard
    for mine, theirs in ((together.scores, alone.scores), (together.logits, alone.logits)):
        assert mine is not None and theirs is not None and len(mine) == len(theirs)
        assert all(torch.equal(one, other) for one, other in zip(mine, theirs, strict=True))


def test_no_token_is_committed_where_none_can_be_drawn() -> None:
    """As in plain decoding; nodes off the path change nothing."""
    tree = DraftTree.from_parents(torch.tensor([[0, 1, 2]]), torch.tensor([[0, 0, 0]]))
    logits = torch.full((1, 3, VOCABULARY), -torch.inf)
    logits[0, 0, 1] = 0.0
    logits[0, 1, 3] = 0.0
    text, _ = text_of("none", [], 9, do_sample=True)
    assert accept_at_once(tree, logits, text) == ([0, 1], [1, 3])
    logits[0, 1] = torch.nan
    with pytest.raises(RuntimeError, match="No token can be drawn"):
        accept_at_once(tree, logits, text)


def silent_text(processors: LogitsProcessorList, *, do_sample: bool) -> Text:
    criteria = StoppingCriteriaList([MaxLengthCriteria(9), EosTokenCriteria([1])])
    start = torch.zeros(1, 2, dtype=torch.long)
    return Text(start, processors, criteria, do_sample=do_sample, pad_token=torch.tensor(0))


@settings(max_examples=200)
@given(trees(), st.sampled_from(["none", "warpers"]), st.booleans(), st.integers(0, 10**6))
def test_a_row_that_scores_alone_decide_on_draws_as_in_commit_order(
    tree: DraftTree, processors: str, do_sample: bool, seed: int
) -> None:
    shape = (1, tree.node_count, VOCABULARY)
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()
    alone, fast = (silent_text(PROCESSORS[processors], do_sample=do_sample) for _ in range(2))
    set_seed(seed)
    expected = accept(tree, logits, alone)
    state = torch.get_rng_state()
    set_seed(seed)
    batch = Batch([fast], drops_finished=False)
    assert batch.picks_by_scores(tree.node_count)
    found = accept_batch(batch, tree, logits, None)
    assert (found.paths, found.picks, found.emitted) == (expected.paths, expected.picks, expected.emitted)
    assert torch.equal(torch.get_rng_state(), state)
    assert fast.input_ids.tolist() == alone.input_ids.tolist() and fast.finished == alone.finished


@pytest.mark.parametrize("do_sample", [False, True])
def test_rows_that_advance_apart_are_processed_together_level_by_level(
    do_sample: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores leave one token each, so that a draw is known; one of two chains is right to its end."""
    stock, asked = TemperatureLogitsWarper.__call__, list[int]()

    def noted(warper: TemperatureLogitsWarper, input_ids: Any, scores: Any) -> Any:
        asked.append(len(scores))
        return stock(warper, input_ids, scores)

    monkeypatch.setattr(TemperatureLogitsWarper, "__call__", noted)
    tree = DraftTree.from_parents(torch.tensor([[0, 2, 3, 2], [0, 2, 2, 2]]), torch.tensor([[0, 0, 1, 2]] * 2))
    logits = torch.full((2, 4, VOCABULARY), -torch.inf)
    for row, tokens in enumerate(([2, 3, 2, 3], [2, 3, 3, 3])):
        logits[row, range(4), tokens] = 0.0
    processors = LogitsProcessorList([TemperatureLogitsWarper(0.5)])
    texts = [silent_text(processors, do_sample=do_sample) for _ in range(2)]
    found = accept_batch(Batch(texts, drops_finished=True), tree, logits, None)
    assert found.picks == [[2, 3, 2, 3], [2, 3]] and found.paths == [[0, 1, 2, 3], [0, 1]]
    assert [text.input_ids[0, 2:].tolist() for text in texts] == found.picks
    assert asked == [2, 2, 1, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("vocabulary", [7, 64, 1000, 2048])
def test_a_pick_is_the_first_of_the_largest_logits_in_a_vocabulary_of_any_size(
    vocabulary: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    for kind in ("values", "ties", "infinite", "missing", "without"):
        logits = torch.randn(2, 3, vocabulary, generator=generator).to(dtype)
        match kind:
            case "ties":
                logits = logits.round()
            case "infinite":
                logits[:, :, vocabulary // 3 :: 2] = torch.inf
            case "missing":
                logits[:, :, vocabulary // 2] = torch.nan
            case "without":
                logits.fill_(-torch.inf)
        picks = Picks([{}, {}], None, logits)
        for rows, nodes in (([0, 1], [2, 2]), ([0, 1], [0, 1]), ([1], [2])):
            expected = torch.stack([logits[row, node].argmax() for row, node in zip(rows, nodes, strict=True)])
            assert picks.at(rows, nodes) == expected.tolist(), kind
