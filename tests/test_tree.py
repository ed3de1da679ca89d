"""Trees against brute force."""

from itertools import product
from math import inf

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trees import VOCABULARY, batches, path_of, pools, random_tokens, texts_of, trees
from transformers_resps.tree import Branches, CandidatePool, DraftTree, TreeShape, moved


@settings(max_examples=500)
@given(pools(), st.integers(2, 30))
def test_a_tree_keeps_the_best_of_a_pool_and_orphans_nobody(pool: CandidatePool, total_tokens: int) -> None:
    tree = DraftTree.from_pool(torch.tensor([7, 8]), pool, total_tokens)
    for row, root in enumerate([7, 8]):
        scores, above = pool.scores[row].tolist(), pool.parents[row].tolist()
        best = sorted(sorted(range(len(scores)), key=lambda node: (-scores[node], node))[: total_tokens - 1])
        order = [-1, *best]
        assert tree.node_count == len(order)
        assert tree.tokens[row].tolist() == [root] + pool.tokens[row, best].tolist()
        assert [order[parent] for parent in tree.parents[row].tolist()[1:]] == [above[node] for node in best]
        assert tree.scores[row].tolist() == [0.0] + [scores[node] for node in best]
        assert tree.depths[row].tolist() == [0] + pool.levels[best].tolist()
        for node in range(tree.node_count):
            path = path_of(tree.parents[row].tolist(), node)
            assert tree.ancestors[row, node].nonzero().flatten().tolist() == sorted(path)


def test_a_tree_of_a_pool_is_built_without_asking_for_a_value() -> None:
    """So that code which drafts and builds can be captured as one."""
    pool = CandidatePool(
        torch.tensor([[5, 6, 7]]), torch.tensor([[-1, -1, 1]]), torch.tensor([[-1.0, -0.1, -0.2]]), torch.empty(3)
    )
    build = torch.compile(DraftTree.from_pool, fullgraph=True, backend="eager")
    tree = build(torch.tensor([4]), pool, 3, 2)
    assert tree.tokens.tolist() == [[4, 6, 7]] and tree.parents.tolist() == [[0, 0, 1]]


def test_a_child_is_found_by_its_token_and_the_root_is_nobodys_child() -> None:
    tree = DraftTree.from_parents(torch.tensor([[5, 5, 6, 5]]), torch.tensor([[0, 0, 0, 1]]))
    assert tree.children() == [{(0, 5): 1, (0, 6): 2, (1, 5): 3}]


def chains_of(chains: list[list[int]]) -> list[Branches]:
    return [
        Branches(chain, range(-1, len(chain) - 1), [0.5**length for length in range(1, len(chain) + 1)])
        for chain in chains
    ]


@given(trees(8), st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=4))
def test_no_node_lies_deeper_than_a_tree_says(tree: DraftTree, chain: list[int]) -> None:
    merged = tree.with_branches(chains_of([chain]))
    for one in (tree, merged, merged.row(0), merged.padded(20)):
        assert int(one.depths.max()) <= one.level_count < one.node_count


@settings(max_examples=300)
@given(st.one_of(trees(8), batches(8)))
def test_a_child_is_the_first_that_carries_the_token(tree: DraftTree) -> None:
    count = tree.node_count
    for row, found in enumerate(tree.children()):
        above, own = tree.parents[row].tolist(), tree.tokens[row].tolist()
        for at in product(range(count), range(VOCABULARY)):
            below = [node for node in range(1, count) if (above[node], own[node]) == at]
            assert found.get(at) == (below[0] if below else None)


@settings(max_examples=500)
@given(trees(), st.lists(st.integers(0, VOCABULARY - 1), max_size=6))
def test_a_merged_chain_adds_its_texts_and_nothing_else(tree: DraftTree, chain: list[int]) -> None:
    merged = tree.with_branches(chains_of([chain]))
    count = tree.node_count
    assert texts_of(merged) == texts_of(tree) | {tuple(chain[:length]) for length in range(len(chain) + 1)}
    assert torch.equal(merged.tokens[:, :count], tree.tokens) and torch.equal(merged.parents[:, :count], tree.parents)
    assert merged.node_count - count <= len(chain)
    rebuilt = DraftTree.from_parents(merged.tokens, merged.parents)
    assert torch.equal(merged.ancestors, rebuilt.ancestors) and torch.equal(merged.depths, rebuilt.depths)
    assert merged.scores.shape == merged.tokens.shape


@settings(max_examples=300)
@given(batches(), st.data())
def test_rows_that_gain_chains_of_different_lengths_keep_nodes_of_their_own(
    tree: DraftTree, data: st.DataObject
) -> None:
    chains = [data.draw(st.lists(st.integers(0, VOCABULARY - 1), max_size=5)) for _ in tree.tokens]
    merged = tree.with_branches(chains_of(chains))
    sizes = merged.row_sizes
    for row, chain in enumerate(chains):
        expected = texts_of(tree, row) | {tuple(chain[:length]) for length in range(len(chain) + 1)}
        assert texts_of(merged.row(row)) == expected
        assert all(node < sizes[row] for node in merged.children()[row].values()), "the others are never accepted"
    assert max(sizes) == merged.node_count


@settings(max_examples=300)
@given(pools(), st.data())
def test_each_row_of_a_pool_has_as_many_of_its_best_nodes_as_it_is_given(
    pool: CandidatePool, data: st.DataObject
) -> None:
    most = pool.tokens.shape[1] + 1
    sizes = [data.draw(st.integers(1, most)) for _ in pool.tokens]
    root = torch.tensor([1, 2])
    whole = DraftTree.from_pool(root, pool, max(sizes), sizes=sizes)
    assert whole.row_sizes == sizes
    for row, size in enumerate(sizes):
        alone = DraftTree.from_pool(root, pool, size)
        assert texts_of(whole.row(row)) == texts_of(alone, row)
        assert torch.equal(whole.row(row).scores[0], alone.scores[row])


def test_parents_must_come_first() -> None:
    with pytest.raises(ValueError, match="a parent must be an earlier node"):
        DraftTree.from_parents(torch.tensor([[1, 2, 3]]), torch.tensor([[0, 2, 0]]))


@pytest.mark.parametrize("sizes", [(0, 1, 1), (1, -1, 1), (1, 0, 0), (2.0, 1, 1), (True, 1, 1)])
def test_a_shape_of_impossible_size_is_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="must be an integer of at least"):
        TreeShape(*sizes)


def test_published_shapes_count_one_level_less() -> None:
    assert TreeShape.from_eagle(60, 7, 10) == TreeShape(60, 8, 10)


def test_plain_shapes_draft_nothing() -> None:
    assert TreeShape.plain().is_plain and TreeShape(9, 0, 3).is_plain and TreeShape(1, 4, 3).is_plain
    assert TreeShape(9, 4, 2).within(2) == TreeShape(9, 2, 2)
    assert TreeShape(9, 4, 2).within(-1).is_plain


@settings(max_examples=300)
@given(pools(), random_tokens(2, 4))
def test_the_drafted_match_is_the_longest_path_along_the_tokens(pool: CandidatePool, tokens: list[list[int]]) -> None:
    longest, path = [], torch.full((2, 4), -1)
    for row, above in enumerate(pool.parents.tolist()):
        node, run = -1, 0
        for token in tokens[row]:
            found = [i for i, parent in enumerate(above) if parent == node and pool.tokens[row, i] == token]
            if not found:
                break
            path[row, run] = node = found[0]
            run += 1
        longest.append(run)
    assert pool.drafted_match(tokens) == longest
    assert pool.nodes_along(torch.tensor(tokens)).tolist() == path.tolist()
    whole = DraftTree.from_pool(torch.tensor([1, 2]), pool, pool.tokens.shape[1] + 1)
    assert whole.drafted_match(tokens) == longest


def test_tensors_that_move_together_stay_what_they_were() -> None:
    parts = [torch.tensor([[7, 8]]).expand(2, -1), torch.tensor([-0.5, -torch.inf]), torch.eye(3, dtype=torch.bool)]
    for part, there in zip(parts, moved(parts, torch.device("cpu")), strict=True):
        assert there.dtype == part.dtype and there.is_contiguous() and torch.equal(there, part)


@settings(max_examples=200)
@given(st.integers(1, 3), st.data())
def test_merged_pools_hold_every_path_once_with_its_best_score(count: int, data: st.DataObject) -> None:
    pools = [pool_of(data.draw(trees(6)), data.draw(st.floats(-3.0, -0.1))) for _ in range(count)]
    merged = CandidatePool.merged(pools)
    best: dict[tuple[int, ...], float] = {}
    for pool in pools:
        for path, score in zip(paths_of(pool), pool.scores[0].tolist(), strict=True):
            best[path] = max(score, best.get(path, -inf))
    scores = zip(paths_of(merged), merged.scores[0].tolist(), strict=True)
    assert {path: score for path, score in scores if score > -inf} == best
    assert merged.levels.tolist() == sorted(map(len, paths_of(merged)))
    assert bool((merged.parents < torch.arange(merged.tokens.shape[1])).all())


def pool_of(tree: DraftTree, score: float) -> CandidatePool:
    """The nodes below a tree's root, in the order of their levels, each level less likely than the one above."""
    order = tree.depths[0].sort(stable=True).indices
    places = order.argsort()
    levels = tree.depths[0, order][1:]
    return CandidatePool(
        tree.tokens[:, order[1:]], places[tree.parents[0, order[1:]]][None] - 1, score * levels[None].float(), levels
    )


def paths_of(pool: CandidatePool) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = []
    for token, parent in zip(pool.tokens[0].tolist(), pool.parents[0].tolist(), strict=True):
        found.append((*(found[parent] if parent >= 0 else ()), token))
    return found
