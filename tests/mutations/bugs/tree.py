"""Bugs in trees."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from transformers_resps.tree import CandidatePool, DraftTree

from ..planting import Function, bug


POOL = "tests/test_tree.py::test_a_tree_keeps_the_best_of_a_pool_and_orphans_nobody"
CHILD = "tests/test_tree.py::test_a_child_is_the_first_that_carries_the_token"
CHAIN = "tests/test_tree.py::test_a_merged_chain_adds_its_texts_and_nothing_else"
MERGED = "tests/test_tree.py::test_merged_pools_hold_every_path_once_with_its_best_score"
MATCH = "tests/test_tree.py::test_the_drafted_match_is_the_longest_path_along_the_tokens"
SIGHT = "tests/verifying/test_masks.py::test_a_node_sees_the_prefix_and_its_own_path"


@bug("kept nodes stand in order of score", "tree:DraftTree.from_pool", POOL)
def order_by_score(
    from_pool: Function,
    cls: type[DraftTree],
    root: Tensor,
    pool: CandidatePool,
    total_tokens: int,
    level_count: int | None = None,
) -> DraftTree:
    order = pool.scores.sort(dim=-1, descending=True, stable=True).indices
    rank = torch.cat([torch.full_like(order[:, :1], -1), order.argsort(dim=-1)], dim=1)  # -1 stays -1
    parents = rank.gather(1, pool.parents.gather(1, order) + 1)
    by_score = (pool.tokens.gather(1, order), parents, pool.scores.gather(1, order))
    return from_pool(cls, root, CandidatePool(*by_score, pool.levels), total_tokens, level_count)


@bug("a child of any node will do", "tree:DraftTree.children", CHILD)
def children_of_any_node(children: Function, self: DraftTree) -> list[dict[tuple[int, int], int]]:
    return [{(0, at[1]): own[at] for at in sorted(own, key=own.__getitem__, reverse=True)} for own in children(self)]


@bug("the root is its own child", "tree:DraftTree.children", CHILD)
def root_among_its_children(children: Function, self: DraftTree) -> list[dict[tuple[int, int], int]]:
    return [own | {(0, root): 0} for own, root in zip(children(self), self.tokens[:, 0].tolist(), strict=True)]


@bug("the deepest nodes lack an ancestor", "tree:DraftTree._derive", POOL)
def half_the_levels(
    derive: Function, cls: type[DraftTree], tokens: Tensor, parents: Tensor, scores: Tensor, level_count: int
) -> DraftTree:
    return derive(cls, tokens, parents, scores, level_count // 2)


@bug("a node is no ancestor of itself", "tree:DraftTree._derive", SIGHT)
def nodes_without_themselves(
    derive: Function, cls: type[DraftTree], tokens: Tensor, parents: Tensor, scores: Tensor, level_count: int
) -> DraftTree:
    tree = derive(cls, tokens, parents, scores, level_count)
    return replace(tree, ancestors=tree.ancestors & ~torch.eye(tree.node_count, dtype=torch.bool))


@bug("a looked-up node lacks its ancestors", "tree:_lines", CHAIN)
def blind_to_all_above(lines: Function, rows: list[list[int]]) -> tuple[list[list[int]], Tensor]:
    depths, ancestors = lines(rows)
    return depths, ancestors & torch.eye(len(rows[0]), dtype=torch.bool)


@bug("a merged chain becomes a star", "tree:_Nodes._append", CHAIN)
def chain_as_a_star(append: Function, self: Any, token: int, parent: int, score: float, proposers: int) -> None:
    append(self, token, 0, score, proposers)


@bug("a merged chain is shared with cousins", "tree:_Nodes.__init__", CHAIN)
def shared_with_cousins(init: Function, self: Any, tokens: list[int], parents: list[int], scores: list[float]) -> None:
    init(self, tokens, parents, scores)
    nodes = range(len(tokens) - 1, 0, -1)
    self._children = {(above, tokens[node]): node for node in nodes for above in range(len(tokens))}


@bug("a pool's better score is lost", "tree:CandidatePool.merged", MERGED)
def the_first_ones_score(merged: Function, cls: type[CandidatePool], pools: list[CandidatePool]) -> CandidatePool:
    found = merged(cls, pools)
    alone = merged(cls, [pools[0], *(replace(pool, scores=pool.scores - 50.0) for pool in pools[1:])])
    return replace(found, scores=torch.where(found.scores > -torch.inf, alone.scores, found.scores))


@bug("cousins count as drafted", "tree:followed", MATCH)
def followed_through_cousins(
    followed: Function, tokens: list[int], parents: list[int], path: list[int], root: int
) -> list[int]:
    nodes: list[int] = []
    for token in path:
        node = nodes[-1] if nodes else root
        found = followed(tokens, [node] * len(tokens), [token], node)  # as if all were its children
        if not found:
            break
        nodes += found
    return nodes
