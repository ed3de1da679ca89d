"""Trees against brute force."""

import pytest
import torch

from transformers_resps.tree import CandidatePool, DraftTree, TreeShape


def random_pool(seed: int, batch_size: int = 2, levels: int = 3, ties: bool = False) -> CandidatePool:
    """A pool as drafters make it; with `ties`, many log probabilities are exactly 0."""
    generator = torch.Generator().manual_seed(seed)
    tokens, parents, scores, level_of = [], [], [], []
    first, width = 0, 0
    for level in range(1, levels + 1):
        count = int(torch.randint(1, 7, (), generator=generator))
        step = -torch.rand(batch_size, count, generator=generator)
        if ties:
            step = step * torch.randint(0, 2, step.shape, generator=generator)
        if level == 1:
            parent = torch.full((batch_size, count), -1)
            score = step
        else:
            parent = first + torch.randint(0, width, (batch_size, count), generator=generator)
            score = step + torch.cat(scores, dim=1).gather(1, parent)
        first, width = sum(part.shape[1] for part in tokens), count
        tokens.append(torch.randint(0, 9, (batch_size, count), generator=generator))
        parents.append(parent)
        scores.append(score)
        level_of.append(torch.full((count,), level))
        first = first if level > 1 else 0
    return CandidatePool(*(torch.cat(part, dim=1) for part in (tokens, parents, scores)), torch.cat(level_of))


def path_of(parents: list[int], node: int) -> list[int]:
    path = [node]
    while path[-1] != 0:
        path.append(parents[path[-1]])
    return path[::-1]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(40))
def test_the_kept_nodes_are_the_best_and_closed_under_parents(seed: int, ties: bool) -> None:
    pool = random_pool(seed, ties=ties)
    count = pool.tokens.shape[1]
    for total_tokens in range(2, count + 3):
        tree = DraftTree.from_pool(torch.tensor([7, 8]), pool, total_tokens)
        kept = min(total_tokens - 1, count)
        assert tree.tokens.shape == (2, kept + 1)
        for row in range(2):
            best = sorted(range(count), key=lambda node: (-pool.scores[row, node].item(), node))[:kept]
            order = [-1, *sorted(best)]
            for node, index in enumerate(order[1:], start=1):
                assert pool.parents[row, index] in order, "a node was kept without its parent"
                assert tree.tokens[row, node] == pool.tokens[row, index]
                assert order[tree.parents[row, node]] == pool.parents[row, index]
                assert tree.scores[row, node] == pool.scores[row, index]


@pytest.mark.parametrize("seed", range(20))
def test_ancestors_and_depths_are_those_of_the_paths(seed: int) -> None:
    pool = random_pool(seed, levels=5)
    tree = DraftTree.from_pool(torch.tensor([0, 1]), pool, 12)
    for row in range(2):
        parents = tree.parents[row].tolist()
        for node in range(tree.node_count):
            path = path_of(parents, node)
            assert tree.depths[row, node] == len(path) - 1
            assert tree.ancestors[row, node].nonzero().squeeze(-1).tolist() == sorted(path)


def test_a_child_is_found_by_its_token_and_the_root_is_nobodys_child() -> None:
    tree = DraftTree.from_parents(torch.tensor([[5, 5, 6, 5]]), torch.tensor([[0, 0, 0, 1]]))
    assert tree.children() == [{(0, 5): 1, (0, 6): 2, (1, 5): 3}]


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


@pytest.mark.parametrize("seed", range(20))
def test_what_a_pool_foresaw_is_the_longest_path_along_the_tokens(seed: int) -> None:
    pool = random_pool(seed)
    tokens = torch.randint(0, 9, (2, 4), generator=torch.Generator().manual_seed(seed))
    longest, path = [], torch.full((2, 4), -1)
    for row in range(2):
        nodes, run = {-1}, 0
        for token in tokens[row].tolist():
            found = [
                i for i, p in enumerate(pool.parents[row].tolist()) if p in nodes and pool.tokens[row, i] == token
            ]
            if not found:
                break
            path[row, run] = found[0]
            nodes, run = {found[0]}, run + 1  # siblings with one token do not happen: the first stands for both
        longest.append(run)
    assert pool.drafted_match(tokens) == longest
    assert pool.nodes_along(tokens).tolist() == path.tolist()
    whole = DraftTree.from_pool(torch.tensor([1, 2]), pool, pool.tokens.shape[1] + 1)
    assert whole.drafted_match(tokens) == longest
