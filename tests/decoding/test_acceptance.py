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
    StoppingCriteria,
    StoppingCriteriaList,
    set_seed,
)

from tests.trees import VOCABULARY, batches, random_tokens, trees
from transformers_resps.decoding.acceptance import Acceptance, Picks, accept, accept_picks
from transformers_resps.decoding.text import Text
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
