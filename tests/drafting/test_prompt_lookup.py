"""Lookup drafts against a scan of the whole text, and their own record of success."""

import pytest
import torch
from transformers import set_seed

from tests.targets import VOCABULARY, Architecture
from transformers_resps import DraftHead, FixedPolicy, TreeShape, attach
from transformers_resps.drafting import Committed, DraftRequest
from transformers_resps.drafting.prompt_lookup import (
    Lookup,
    LookupDrafter,
)
from transformers_resps.tree import DRAFTED, LOOKED_UP, Branches, CandidatePool, DraftTree


NEWEST = torch.empty(0)  # levels are drafted from what was observed


def likeliest(lookup: Lookup, most: int = 16) -> list[int]:
    """The tokens of the path of best children, as far as a tree of `most` nodes has it."""
    found, tokens, node = lookup.found.grow(most), list[int](), -1
    while node in found.parents[:most]:
        node = found.parents.index(node)
        tokens.append(found.tokens[node])
    return tokens


def first_tokens(drafter: LookupDrafter, count: int = 1) -> list[list[int]]:
    drafter.read()
    return [likeliest(lookup)[:count] for lookup in drafter._lookups]


def test_a_match_that_runs_into_the_end_repeats_itself() -> None:
    lookup = Lookup()
    lookup.extend([1, 2, 3, 1, 2, 3, 1])
    assert likeliest(lookup)[:7] == [2, 3, 1, 2, 3, 1, 2]


def test_a_text_that_repeats_nothing_has_no_match() -> None:
    lookup = Lookup()
    lookup.extend([1, 2, 3])
    assert lookup.odds == likeliest(lookup) == []


def test_hope_follows_the_record() -> None:
    """Twice the same prompt; then the text repeats itself, or never does what it did before."""
    faithful, fickle = Lookup(), Lookup()
    for lookup in (faithful, fickle):
        lookup.extend([1, 2, 3, 4])
    before = _hope(faithful)
    for step in range(20):
        faithful.extend([2, 3, 4])
        fickle.extend([5 + step])
        hopes = _hope(fickle), _hope(faithful)
    assert hopes[0] < before < hopes[1]


def _hope(lookup: Lookup) -> float:
    lookup.extend([1])
    return max(lookup.odds, default=0.0)


def test_odds_fall_and_a_parent_comes_before_its_children() -> None:
    lookup = Lookup()
    lookup.extend([1, 2, 3, 4, 1, 2, 3, 5, 6, 1, 2, 7, 1, 2])
    found = lookup.found.grow(16)
    assert 0 < len(found.tokens) <= 16
    assert all(0 < later <= earlier <= 1 for earlier, later in zip(found.odds, found.odds[1:], strict=False))
    assert all(parent < node for node, parent in enumerate(found.parents))
    assert {(3, -1), (7, -1)} < set(zip(found.tokens, found.parents, strict=True)), "both that followed"


def test_without_branches_it_is_the_chain_of_the_likeliest() -> None:
    tree, chain = Lookup(), Lookup(branches=False)
    for one in (tree, chain):
        one.extend([1, 2, 3, 4, 1, 2, 3, 5, 6, 1, 2, 7, 1, 2])
    assert chain.found.grow(16).parents == list(range(-1, len(chain.found.tokens) - 1))
    assert likeliest(tree)[:3] == chain.found.tokens[:3]


def test_a_tree_grows_by_its_next_best_nodes() -> None:
    whole, lookup = Lookup(), Lookup()
    for one in (whole, lookup):
        one.extend([1, 2, 3, 4, 1, 2, 3, 5, 6, 1, 2, 7, 1, 2])
    tokens = list(whole.found.grow(12).tokens)
    for most in range(1, 13):
        assert lookup.found.grow(most).tokens[:most] == tokens[:most]


def beside(lookup: Lookup, tokens: list[int], parents: list[int], most: int = 8) -> dict[int, float]:
    """The odds of the nodes that a drafter with these nodes lacks, by token."""
    found = lookup.found.grow(most)
    found.weigh_beside(tokens, parents, most)
    assert found.odds_beside is not None
    return {token: odds for token, odds in zip(found.tokens, found.odds_beside, strict=True) if odds}


def test_what_a_drafter_does_not_propose_is_less_likely_and_what_it_does_is_not_counted_twice() -> None:
    lookup = Lookup()
    lookup.extend([1, 2, 3, 9, 1])  # so 2, 3, 9 may follow
    alone = dict(zip(lookup.found.grow(3).tokens, lookup.found.odds, strict=True))
    assert beside(lookup, [8, 7], [-1, 0], 3)[2] < 0.5 * alone[2], "the drafter proposes 8 only"
    assert beside(lookup, [8, 2], [-1, -1], 3) == pytest.approx({3: alone[3], 9: alone[9]}), "nor does it go on"
    assert set(lookup.found.shared) == {1} and lookup.found.shared[1] == alone[2]
    further = beside(lookup, [8, 2, 6], [-1, -1, 1], 3)
    assert further[3] < 0.5 * alone[3], "it goes on otherwise"
    assert further[9] / further[3] == pytest.approx(alone[9] / alone[3])


@pytest.mark.parametrize(("token", "rises"), [(2, True), (8, False), (7, False)])
def test_how_likely_a_node_is_that_a_drafter_lacks_is_learned(token: int, rises: bool) -> None:
    lookup = Lookup()
    lookup.extend([1, 2, 3, 9, 1])
    before = beside(lookup, [8], [-1])[2]
    for _ in range(5):
        beside(lookup, [8], [-1])
        lookup.found.judge_beside([token])
    lookup._found = None
    assert (beside(lookup, [8], [-1])[2] > before) is rises


def test_the_rest_of_a_drafters_nodes_are_marked_alone() -> None:
    """Of the nodes that are looked up, those that pay join the tree, and those above them."""
    drafter = LookupDrafter([0])
    drafter.observe(Committed(torch.tensor([[1, 2, 3, 9, 1]])))
    pool = drafter.weigh_beside(CandidatePool.from_branches([Branches([2, 6], [-1, 0], [0.1, 0.05])]), 3)
    assert drafter.shared == [[0]] and pool.scores.exp()[0].tolist() == pytest.approx(
        [drafter._lookups[0].found.odds[0], 0.05]
    )
    shape, (left,) = TreeShape(1, 0, 1, lookup=3), drafter.odds
    tree = DraftTree.from_parents(torch.tensor([[1, 2]]), torch.tensor([[0, 0]]))
    for least, tokens in ((0.0, [1, 2, 3, 9]), (left[0], [1, 2, 3]), (1.0, [1, 2])):
        merged = tree.with_branches(drafter.branches(DraftRequest(shape, least_prob=least)))
        assert merged.tokens[0].tolist() == tokens
        assert merged.proposers[0][1] == DRAFTED | LOOKED_UP


def read(drafter: LookupDrafter, *rows: list[int]) -> None:
    drafter.observe(
        Committed(torch.tensor([row + row[-1:] * (max(map(len, rows)) - len(row)) for row in rows]), rows=rows)
    )


def test_rows_start_after_their_padding() -> None:
    drafter = LookupDrafter([0, 2])
    drafter.observe(Committed(torch.tensor([[7, 8, 7], [0, 0, 9]])))
    read(drafter, [8], [9, 9])
    assert first_tokens(drafter) == [[7], [9]]


def test_a_text_goes_on_as_its_source_does() -> None:
    drafter = LookupDrafter([0, 1, 0], origins=[[4, 5, 6, 2], [7, 8], []])
    drafter.observe(Committed(torch.tensor([[0, 4, 5], [0, 9, 8], [1, 3, 1]])))
    assert first_tokens(drafter, 2) == [[6, 2], [9, 8], [3, 1]]
    drafter.keep_rows([2, 0])
    read(drafter, [3], [6])
    assert first_tokens(drafter, 2) == [[1, 3], [2, 0]]


def test_rows_may_be_dropped_before_their_prompt_was_read() -> None:
    drafter = LookupDrafter([0, 2, 1])
    drafter.observe(Committed(torch.tensor([[7, 8, 7], [0, 0, 9], [0, 5, 5]])))
    drafter.keep_rows([2])
    assert first_tokens(drafter) == [[5]]


def test_nothing_follows_a_token_that_is_never_drafted() -> None:
    drafter = LookupDrafter([0, 0], never_drafted=frozenset([0]))
    drafter.observe(Committed(torch.tensor([[5, 0, 6, 5], [0, 6, 3, 0]])))
    assert first_tokens(drafter) == [[], []]


def test_neither_source_nor_prompt_is_evidence() -> None:
    drafter, whole = LookupDrafter([0], origins=[[5, 6] * 20]), Lookup()
    drafter.observe(Committed(torch.tensor([[5, 6, 5]])))
    whole.extend([5, 6] * 21 + [5])
    assert drafter.odds == [whole.odds]


def test_a_pool_holds_a_chain_of_each_row_with_the_probabilities_of_its_paths() -> None:
    drafter, shape = LookupDrafter([0, 0]), TreeShape(1, 0, 1, lookup=3)
    drafter.observe(Committed(torch.tensor([[1, 2, 1], [5, 6, 7]])))
    pool = drafter.draft(NEWEST, DraftRequest(shape))
    assert pool.tokens[0].tolist() == [2, 1, 2] and pool.parents.tolist() == [[-1, 0, 1]] * 2
    assert pool.scores[0].exp().tolist() == pytest.approx(drafter.odds[0][:3])
    assert pool.scores[1].tolist() == [-torch.inf] * 3, "the other row repeats nothing"


def test_a_chain_shares_the_nodes_the_tree_has() -> None:
    tree = DraftTree.from_parents(torch.tensor([[5, 1, 2, 3]]), torch.tensor([[0, 0, 0, 1]]))
    merged = tree.with_branches([Branches([1, 3, 9, 9], [-1, 0, 1, 2], [0.9, 0.8, 0.5, 0.4])])
    assert merged.tokens.tolist() == [[5, 1, 2, 3, 9, 9]]
    assert merged.parents.tolist() == [[0, 0, 0, 1, 3, 4]]
    assert merged.depths.tolist() == [[0, 1, 1, 2, 3, 4]]
    assert merged.proposers == [[DRAFTED, DRAFTED | LOOKED_UP, DRAFTED, DRAFTED | LOOKED_UP, LOOKED_UP, LOOKED_UP]]


def test_rows_with_shorter_chains_are_filled_up_without_effect() -> None:
    tree = DraftTree.root_only(torch.tensor([5, 6])).with_branches(
        [Branches([1, 2], [-1, 0], [0.5, 0.4]), Branches([], [], [])]
    )
    assert tree.tokens.shape == (2, 3)
    first, second = tree.children()
    assert first == {(0, 1): 1, (1, 2): 2} and (0, 7) not in second


@pytest.mark.parametrize(
    "shape", [TreeShape(1, 0, 1, lookup=6), TreeShape(12, 3, 4, lookup=6), TreeShape(1, 0, 1, 40)]
)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("do_sample", [False, True])
def test_lookups_give_the_tokens_of_plain_generate(shape: TreeShape, rows: int, do_sample: bool) -> None:
    target = attach(Architecture("llama").build("sdpa"))
    head = DraftHead.from_target(target) if shape.asks_head else None
    prompt = torch.randint(0, VOCABULARY, (rows, 9), generator=torch.Generator().manual_seed(1))
    options = {"do_sample": do_sample, "max_new_tokens": 40}
    set_seed(0)
    expected = target.generate(prompt, **options)
    set_seed(0)
    policy = FixedPolicy(shape)
    out = target.generate(prompt, assistant_model=head, policy=policy, return_dict_in_generate=True, **options)
    assert out.sequences.tolist() == expected.tolist()
    assert rows > 1 or out.speculation.tau > 1.05


def test_auto_needs_no_head() -> None:
    target = attach(Architecture("llama").build("sdpa"))
    prompt = torch.tensor([[3, 4, 5, 6, 3, 4, 5]])
    expected = target.generate(prompt, max_new_tokens=60)
    out = target.generate(prompt, max_new_tokens=60, policy="auto", return_dict_in_generate=True)
    assert out.sequences.tolist() == expected.tolist()
    assert not any(step.shape.asks_head for step in out.speculation.steps)
