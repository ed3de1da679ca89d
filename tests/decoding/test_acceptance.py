"""Acceptance against brute force, its fast path against the rule, and both against the distribution to preserve."""

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
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    set_seed,
)

from tests.trees import VOCABULARY, batches, random_tokens, trees
from transformers_resps.decoding.acceptance import (
    Acceptance,
    Picks,
    ProcessedPicks,
    accept,
    accept_batch,
    accept_picks,
)
from transformers_resps.decoding.text import Batch, Text
from transformers_resps.tree import DraftTree


def text_of(length: int, *criteria: StoppingCriteria, rows: int = 1, do_sample: bool = False) -> Text:
    """Rows of zeros, without processors."""
    prompt = torch.zeros(rows, length, dtype=torch.long)
    ends = StoppingCriteriaList(criteria or [MaxLengthCriteria(99)])
    return Text(prompt, LogitsProcessorList(), ends, do_sample=do_sample, pad_token=torch.tensor(0))


def logits_of(picks: list[list[int]]) -> torch.Tensor:
    """`[b, n, v]` with the largest at the picks `[b, n]`."""
    return torch.nn.functional.one_hot(torch.tensor(picks), VOCABULARY).float()


def brute_force(tree: DraftTree, picks: list[int], most: int = 99) -> list[int]:
    """Descend to the first child that carries the pick, until there is none or `most` tokens are written."""
    above, tokens, path = tree.parents[0].tolist(), tree.tokens[0].tolist(), [0]
    while len(path) < most:
        below = [node for node in range(1, len(tokens)) if above[node] == path[-1] and tokens[node] == picks[path[-1]]]
        if not below:
            break
        path.append(below[0])
    return path


@settings(max_examples=800)
@given(trees(), st.data())
def test_acceptance_is_the_brute_force_walk(tree: DraftTree, data: st.DataObject) -> None:
    [picks] = data.draw(random_tokens(1, tree.node_count))
    most = data.draw(st.integers(1, 6))
    text = text_of(1, MaxLengthCriteria(1 + most))
    acceptance = accept(tree, logits_of([picks]), text)
    path = brute_force(tree, picks, most)
    assert acceptance.path[0].tolist() == path
    assert acceptance.tokens[0].tolist() == [picks[node] for node in path]
    assert text.input_ids[0].tolist() == [0] + [picks[node] for node in path]
    assert acceptance.counts == acceptance.emitted == [len(path)]
    assert text.finished == (len(path) == most)


@settings(max_examples=300)
@given(batches(), st.data())
def test_rows_commit_what_the_shortest_run_allows(tree: DraftTree, data: st.DataObject) -> None:
    picks = data.draw(random_tokens(*tree.tokens.shape))
    acceptance = accept(tree, logits_of(picks), text_of(1, rows=len(picks)))
    paths = [brute_force(tree.row(row), own) for row, own in enumerate(picks)]
    shortest = min(map(len, paths))
    assert acceptance.path.tolist() == [path[:shortest] for path in paths]
    assert acceptance.tokens.tolist() == [
        [own[node] for node in path[:shortest]] for own, path in zip(picks, paths, strict=True)
    ]


def asked(tree: DraftTree, logits: torch.Tensor) -> Picks:
    """Picks that are made one by one, as on a CPU."""
    return Picks(tree.children(), None, logits)


@settings(max_examples=800)
@given(batches(rows=3), st.sampled_from([asked, Picks.read]), st.data())
def test_greedy_rows_accept_what_each_would_alone(tree: DraftTree, how: Any, data: st.DataObject) -> None:
    """Several steps over random trees, with picks that tie, end tokens and lengths that stop rows anywhere."""
    size = 3 * tree.node_count * VOCABULARY
    numbers = data.draw(st.lists(st.integers(0, 2), min_size=size, max_size=size))
    logits = torch.tensor(numbers).reshape(3, tree.node_count, VOCABULARY).bfloat16()
    ends = data.draw(st.lists(st.integers(0, VOCABULARY - 1), max_size=2))
    lengths = data.draw(st.lists(st.integers(1, 4), min_size=3, max_size=3))
    criteria: list[StoppingCriteria] = [MaxLengthCriteria(data.draw(st.integers(5, 12)))]
    criteria += [EosTokenCriteria(ends)] if ends else []
    alone, together = ([text_of(length, *criteria) for length in lengths] for _ in range(2))
    expected = [accept(tree.row(row), logits[row : row + 1], text) for row, text in enumerate(alone)]
    acceptance = accept_picks(how(tree, logits), together)
    paths, picks = acceptance.paths, acceptance.picks
    for row, found in enumerate(expected):
        assert found.path[0].tolist() == paths[row] and found.tokens[0].tolist() == picks[row]
        assert found.counts == found.emitted == [len(paths[row])]
        assert torch.equal(alone[row].input_ids, together[row].input_ids)
        assert torch.equal(alone[row].unfinished, together[row].unfinished)
        assert alone[row].finished == together[row].finished


def test_shorter_rows_repeat_their_last_number() -> None:
    acceptance = Acceptance.from_rows([[0], [0, 3, 4]], [[5], [6, 7, 8]], torch.device("cpu"))
    assert acceptance.path.tolist() == [[0, 0, 0], [0, 3, 4]] and acceptance.tokens.tolist() == [[5, 5, 5], [6, 7, 8]]
    assert acceptance.counts == [1, 3]


# --- the distribution -----------------------------------------------------------------------------------------------

DRAWS = 4000
TARGET = torch.tensor([0.35, 0.25, 0.2, 0.12, 0.08])  # p of the next token
DRAFT = torch.tensor([0.1, 0.45, 0.25, 0.15, 0.05])  # q of a head that is wrong


def first_tokens(children: list[int]) -> torch.Tensor:
    """Counts of the first emitted token when `children` hang below the root."""
    tree = DraftTree.from_parents(torch.tensor([[0, *children]]), torch.zeros(1, len(children) + 1, dtype=torch.long))
    logits = TARGET.log().expand(1, len(children) + 1, -1)
    set_seed(0)
    picks = [int(accept(tree, logits, text_of(1, do_sample=True)).tokens[0, 0]) for _ in range(DRAWS)]
    return torch.bincount(torch.tensor(picks), minlength=len(TARGET))


def lossy_first_tokens(children: list[int]) -> torch.Tensor:
    """The rule that is wrong for chosen children: accept c with min(1, p/q), else draw from (p - q)+."""
    generator = torch.Generator().manual_seed(0)
    residual = (TARGET - DRAFT).clamp(min=0)
    picks = []
    for _ in range(DRAWS):
        for child in children:
            if torch.rand((), generator=generator) < TARGET[child] / DRAFT[child]:
                picks.append(child)
                break
        else:
            picks.append(int(torch.multinomial(residual, 1, generator=generator)))
    return torch.bincount(torch.tensor(picks), minlength=len(TARGET))


def chi_square(counts: torch.Tensor) -> float:
    expected = TARGET * DRAWS
    return float(((counts - expected) ** 2 / expected).sum())


CRITICAL = 18.47  # chi-square of 4 degrees of freedom at 0.001


@pytest.mark.parametrize("children", [[], [1], [1, 2], [1, 2, 3, 0], [4, 3, 2, 1, 0]])
def test_the_emitted_token_has_the_targets_distribution(children: list[int]) -> None:
    assert chi_square(first_tokens(children)) < CRITICAL


def test_min_p_over_q_on_chosen_children_does_not() -> None:
    best = DRAFT.topk(2).indices.tolist()
    assert chi_square(lossy_first_tokens(best)) > 10 * CRITICAL


# Picks at all nodes at once: the same texts, random numbers, scores and streams as in commit order.
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


def heard_text_of(processors: str, ends: list[int], length: int, *, do_sample: bool) -> tuple[Text, Streamer]:
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
    (alone, heard), (together, heard_too) = (
        heard_text_of(processors, ends, length, do_sample=do_sample) for _ in range(2)
    )
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
    text, _ = heard_text_of("none", [], 9, do_sample=True)
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
