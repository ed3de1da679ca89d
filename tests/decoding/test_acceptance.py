"""Acceptance against brute force, and against the distribution it must preserve."""

import pytest
import torch
from transformers import LogitsProcessorList, MaxLengthCriteria, StoppingCriteriaList, set_seed

from transformers_resps.decoding.acceptance import accept
from transformers_resps.decoding.text import Text
from transformers_resps.tree import DraftTree


def text_of(prompt: torch.Tensor, max_length: int = 99, do_sample: bool = False) -> Text:
    criteria = StoppingCriteriaList([MaxLengthCriteria(max_length)])
    return Text(prompt, LogitsProcessorList(), criteria, do_sample=do_sample, pad_token=None)


def random_tree(generator: torch.Generator, vocabulary: int) -> DraftTree:
    """Any tree: chains, stars, one node, duplicate tokens below different parents and below the same one."""
    count = int(torch.randint(1, 12, (), generator=generator))
    kind = int(torch.randint(0, 3, (), generator=generator))
    parents = [0]
    for node in range(1, count):
        low = (node - 1, 0, 0)[kind]
        high = (node, 1, node)[kind]
        parents.append(int(torch.randint(low, high, (), generator=generator)))
    tokens = torch.randint(0, vocabulary, (1, count), generator=generator)
    return DraftTree.from_parents(tokens, torch.tensor([parents]))


def brute_force(tree: DraftTree, picks: list[int]) -> list[int]:
    """The path, by trying every child in order."""
    parents, tokens, path = tree.parents[0].tolist(), tree.tokens[0].tolist(), [0]
    while True:
        children = [n for n in range(1, len(tokens)) if parents[n] == path[-1] and tokens[n] == picks[path[-1]]]
        if not children:
            return path
        path.append(children[0])


def test_acceptance_is_the_brute_force_walk_on_a_thousand_trees() -> None:
    generator = torch.Generator().manual_seed(0)
    longest = 0
    for _ in range(1000):
        tree = random_tree(generator, vocabulary=3)
        logits = torch.randn(1, tree.node_count, 3, generator=generator)
        picks = logits.argmax(-1)[0].tolist()
        path = brute_force(tree, picks)
        text = text_of(torch.tensor([[0]]))
        acceptance = accept(tree, logits, text)
        assert acceptance.path[0].tolist() == path
        assert acceptance.tokens[0].tolist() == [picks[node] for node in path]
        assert text.input_ids[0].tolist() == [0, *(picks[node] for node in path)]
        assert acceptance.emitted == [len(path)]
        longest = max(longest, len(path))
    assert longest > 3


def test_acceptance_stops_where_the_text_is_finished() -> None:
    tree = DraftTree.from_parents(torch.tensor([[0, 1, 1, 1]]), torch.tensor([[0, 0, 1, 2]]))
    logits = torch.nn.functional.one_hot(torch.ones(1, 4, dtype=torch.long), 3).float()
    assert accept(tree, logits, text_of(torch.zeros(1, 1, dtype=torch.long), max_length=3)).path.tolist() == [[0, 1]]


def test_rows_advance_by_the_shortest_run() -> None:
    tokens = torch.tensor([[0, 1, 2], [0, 1, 1]])
    tree = DraftTree.from_parents(tokens, torch.tensor([[0, 0, 1], [0, 0, 1]]))
    logits = torch.nn.functional.one_hot(torch.tensor([[1, 2, 0], [1, 2, 0]]), 3).float()
    acceptance = accept(tree, logits, text_of(torch.zeros(2, 1, dtype=torch.long)))
    assert acceptance.path.tolist() == [[0, 1], [0, 1]], "row 1 proposed 1 after 1, the target says 2"
    assert acceptance.tokens.tolist() == [[1, 2], [1, 2]]


# --- the distribution -----------------------------------------------------------------------------------------------

DRAWS = 4000
TARGET = torch.tensor([0.35, 0.25, 0.2, 0.12, 0.08])  # p of the next token
DRAFT = torch.tensor([0.1, 0.45, 0.25, 0.15, 0.05])  # q of a head that is wrong


def first_tokens(children: list[int]) -> torch.Tensor:
    """Counts of the first emitted token when `children` hang below the root."""
    tree = DraftTree.from_parents(torch.tensor([[0, *children]]), torch.zeros(1, len(children) + 1, dtype=torch.long))
    logits = TARGET.log().expand(1, len(children) + 1, -1)
    set_seed(0)
    picks = [
        int(accept(tree, logits, text_of(torch.tensor([[0]]), do_sample=True)).tokens[0, 0]) for _ in range(DRAWS)
    ]
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
