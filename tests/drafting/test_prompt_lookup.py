"""Lookup drafts against a scan of the whole text, and their own record of success."""

import pytest
import torch
from transformers import set_seed

from tests.targets import VOCABULARY, Architecture
from transformers_resps import DraftHead, FixedPolicy, TreeShape, attach
from transformers_resps.drafting import Committed, DraftRequest
from transformers_resps.drafting.prompt_lookup import (
    LONGEST_KEY,
    LONGEST_MATCH,
    NO_MATCH,
    Lookup,
    LookupDrafter,
    SuffixIndex,
)
from transformers_resps.tree import FIRST, SECOND, CandidatePool, DraftTree


NEWEST = torch.empty(0)  # levels are drafted from what was observed


def scan(tokens: list[int]) -> tuple[int, int]:
    """The longest n-gram of up to `LONGEST_KEY` at the end that occurred before, where it last did."""
    for size in range(LONGEST_KEY, 0, -1):
        for place in range(len(tokens) - 1, size - 1, -1):
            if len(tokens) > size and tokens[place - size : place] == tokens[-size:]:
                length = size
                while length < min(place, LONGEST_MATCH) and tokens[place - length - 1] == tokens[-length - 1]:
                    length += 1
                return length, place
    return 0, 0


@pytest.mark.parametrize("seed", range(10))
def test_the_index_finds_what_a_scan_finds(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 4, (80,), generator=generator).tolist()
    index = SuffixIndex()
    for end, token in enumerate(tokens, start=1):
        index.extend([token])
        assert index.find() == scan(tokens[:end])


def test_a_match_that_runs_into_the_end_repeats_itself() -> None:
    lookup = Lookup()
    lookup.extend([1, 2, 3, 1, 2, 3, 1])
    assert lookup.match(7).tokens == [2, 3, 1, 2, 3, 1, 2]


def test_a_text_that_repeats_nothing_has_no_match() -> None:
    lookup = Lookup()
    lookup.extend([1, 2, 3])
    assert lookup.match() is NO_MATCH


def test_hope_follows_the_record() -> None:
    """Twice the same prompt; then the text repeats itself, or never does what it did before."""
    faithful, fickle = Lookup(), Lookup()
    for lookup in (faithful, fickle):
        lookup.extend([1, 2, 3, 4])
    before = _hope(faithful)
    faithful.extend([1, 2, 3, 4] * 10)
    for step in range(20):
        fickle.extend([1, 5 + step])
    assert _hope(fickle) < before < _hope(faithful)


def _hope(lookup: Lookup) -> float:
    lookup.extend([1])
    return lookup.match().prefix_accept_probs[0]


def test_survival_falls_along_the_draft() -> None:
    lookup = Lookup()
    lookup.extend([1, 2, 3, 4, 5, 1, 2])
    prefix_accept_probs = lookup.match(6).prefix_accept_probs
    assert all(
        0 < later < earlier <= 1 for earlier, later in zip(prefix_accept_probs, prefix_accept_probs[1:], strict=False)
    )


def read(drafter: LookupDrafter, *rows: list[int]) -> None:
    drafter.observe(
        Committed(torch.tensor([row + row[-1:] * (max(map(len, rows)) - len(row)) for row in rows]), rows=rows)
    )


def test_rows_start_after_their_padding() -> None:
    drafter = LookupDrafter([0, 2])
    drafter.observe(Committed(torch.tensor([[7, 8, 7], [0, 0, 9]])))
    read(drafter, [8], [9, 9])
    assert [match.tokens[:1] for match in drafter.matches] == [[7], [9]]


def test_a_text_goes_on_as_its_source_does() -> None:
    drafter = LookupDrafter([0, 1, 0], origins=[[4, 5, 6, 2], [7, 8], []])
    drafter.observe(Committed(torch.tensor([[0, 4, 5], [0, 9, 8], [1, 3, 1]])))
    assert [match.tokens[:2] for match in drafter.matches] == [[6, 2], [9, 8], [3, 1]]
    drafter.keep_rows([2, 0])
    read(drafter, [3], [6])
    assert [match.tokens[:2] for match in drafter.matches] == [[1, 3], [2, 0]]


def test_rows_may_be_dropped_before_their_prompt_was_read() -> None:
    drafter = LookupDrafter([0, 2, 1])
    drafter.observe(Committed(torch.tensor([[7, 8, 7], [0, 0, 9], [0, 5, 5]])))
    drafter.keep_rows([2])
    assert [match.tokens[:1] for match in drafter.matches] == [[5]]


def test_nothing_follows_a_token_that_is_never_drafted() -> None:
    drafter = LookupDrafter([0, 0], never_drafted=frozenset([0]))
    drafter.observe(Committed(torch.tensor([[5, 0, 6, 5], [0, 6, 3, 0]])))
    assert [match.tokens for match in drafter.matches] == [[], []]


def test_neither_source_nor_prompt_is_evidence() -> None:
    drafter, whole = LookupDrafter([0], origins=[[5, 6] * 20]), Lookup()
    drafter.observe(Committed(torch.tensor([[5, 6, 5]])))
    whole.extend([5, 6] * 21 + [5])
    assert drafter.matches == [whole.match()]


def test_a_pool_holds_a_chain_of_each_row_with_the_probabilities_of_its_paths() -> None:
    drafter, shape = LookupDrafter([0, 0]), TreeShape(1, 0, 1, lookup=3)
    drafter.observe(Committed(torch.tensor([[1, 2, 1], [5, 6, 7]])))
    pool = drafter.draft(NEWEST, DraftRequest(shape))
    assert pool.tokens[0].tolist() == [2, 1, 2] and pool.parents.tolist() == [[-1, 0, 1]] * 2
    assert pool.scores[0].exp().tolist() == pytest.approx(drafter.matches[0].prefix_accept_probs[:3])
    assert pool.scores[1].tolist() == [-torch.inf] * 3, "the other row repeats nothing"


def test_a_chain_shares_the_nodes_the_tree_has() -> None:
    tree = DraftTree.from_parents(torch.tensor([[5, 1, 2, 3]]), torch.tensor([[0, 0, 0, 1]]))
    merged = tree.with_pool(CandidatePool.from_chains([[1, 3, 9, 9]], [[0.9, 0.8, 0.5, 0.4]]))
    assert merged.tokens.tolist() == [[5, 1, 2, 3, 9, 9]]
    assert merged.parents.tolist() == [[0, 0, 0, 1, 3, 4]]
    assert merged.depths.tolist() == [[0, 1, 1, 2, 3, 4]]
    assert merged.proposers == [[FIRST, FIRST | SECOND, FIRST, FIRST | SECOND, SECOND, SECOND]]


def test_rows_with_shorter_chains_are_filled_up_without_effect() -> None:
    tree = DraftTree.root_only(torch.tensor([5, 6])).with_pool(
        CandidatePool.from_chains([[1, 2], []], [[0.5, 0.4], []])
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
