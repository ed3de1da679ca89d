"""The planted bugs: each function takes the right one and returns the wrong one."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from transformers_resps.tree import CandidatePool, DraftTree

from .planting import Function, Mutation


# --- trees ----------------------------------------------------------------------------------------------------------


def order_by_score(from_pool: Function) -> Function:
    def wrong(
        cls: type[DraftTree], root: Tensor, pool: CandidatePool, total_tokens: int, level_count: int | None = None
    ) -> DraftTree:
        order = pool.scores.sort(dim=-1, descending=True, stable=True).indices
        rank = torch.cat([torch.full_like(order[:, :1], -1), order.argsort(dim=-1)], dim=1)  # -1 stays -1
        parents = rank.gather(1, pool.parents.gather(1, order) + 1)
        by_score = (pool.tokens.gather(1, order), parents, pool.scores.gather(1, order))
        return from_pool(cls, root, CandidatePool(*by_score, pool.levels), total_tokens, level_count)

    return wrong


def children_of_any_node(children: Function) -> Function:
    def wrong(self: DraftTree) -> list[dict[tuple[int, int], int]]:
        return [
            {(0, at[1]): own[at] for at in sorted(own, key=own.__getitem__, reverse=True)} for own in children(self)
        ]

    return wrong


def root_among_its_children(children: Function) -> Function:
    def wrong(self: DraftTree) -> list[dict[tuple[int, int], int]]:
        return [own | {(0, root): 0} for own, root in zip(children(self), self.tokens[:, 0].tolist(), strict=True)]

    return wrong


def half_the_levels(derive: Function) -> Function:
    def wrong(cls: type[DraftTree], tokens: Tensor, parents: Tensor, scores: Tensor, level_count: int) -> DraftTree:
        return derive(cls, tokens, parents, scores, level_count // 2)

    return wrong


def nodes_without_themselves(derive: Function) -> Function:
    def wrong(cls: type[DraftTree], tokens: Tensor, parents: Tensor, scores: Tensor, level_count: int) -> DraftTree:
        tree = derive(cls, tokens, parents, scores, level_count)
        return replace(tree, ancestors=tree.ancestors & ~torch.eye(tree.node_count, dtype=torch.bool))

    return wrong


def chain_as_a_star(merged: Function) -> Function:
    def wrong(tokens: list[int], parents: list[int], chain: list[int]) -> tuple[list[int], list[int]]:
        count = len(parents)
        tokens, parents = merged(tokens, parents, chain)
        parents[count:] = [0] * (len(parents) - count)
        return tokens, parents

    return wrong


def followed_through_cousins(followed: Function) -> Function:
    def wrong(tokens: list[int], parents: list[int], path: list[int], root: int) -> list[int]:
        nodes: list[int] = []
        for token in path:
            node = nodes[-1] if nodes else root
            found = followed(tokens, [node] * len(tokens), [token], node)  # as if all were its children
            if not found:
                break
            nodes += found
        return nodes

    return wrong


# --- acceptance -----------------------------------------------------------------------------------------------------


def descend_from_the_root(next_nodes: Function) -> Function:
    def wrong(children: Any, nodes: list[int], tokens: list[int], live: list[bool]) -> list[int] | None:
        return next_nodes(children, [0] * len(nodes), tokens, live)

    return wrong


def one_row_is_enough(next_nodes: Function) -> Function:
    def wrong(children: Any, nodes: list[int], tokens: list[int], live: list[bool]) -> list[int] | None:
        rows = [own.get(at) for own, at in zip(children, zip(nodes, tokens, strict=True), strict=True)]
        return None if all(node is None for node in rows) else [node or 0 for node in rows]

    return wrong


def pick_at_the_root(accept: Function) -> Function:
    def wrong(tree: DraftTree, logits: Tensor, text: Any) -> Any:
        return accept(tree, logits[:, :1].expand_as(logits), text)

    return wrong


class _Endless:
    """A text that never says that it is finished."""

    finished = False

    def __init__(self, text: Any) -> None:
        self._text = text

    def __getattr__(self, name: str) -> Any:
        return getattr(self._text, name)


def go_on_after_the_end(accept: Function) -> Function:
    def wrong(tree: DraftTree, logits: Tensor, text: Any) -> Any:
        return accept(tree, logits, _Endless(text))

    return wrong


def no_end(is_end: Function) -> Function:
    def wrong(text: Any, token: int, count: int) -> bool:
        return False

    return wrong


def one_end_token_of_several(of: Function) -> Function:
    def wrong(cls: Any, criteria: Any) -> Any:
        conditions = of(cls, criteria)
        return conditions and replace(conditions, token_ids=frozenset(sorted(conditions.token_ids)[:1]))

    return wrong


def sample_unprocessed(init: Function) -> Function:
    def wrong(self: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, **options: Any) -> None:
        kept = LogitsProcessorList() if options["do_sample"] else logits_processor
        init(self, input_ids, kept, stopping_criteria, **options)

    return wrong


def decode_padding(drop_finished: Function) -> Function:
    def wrong(self: Any) -> None:
        return None

    return wrong


# --- the target's cache and attention -------------------------------------------------------------------------------


def ask_the_first_row_alone(compact: Function) -> Function:
    def wrong(cache: Any, path: Tensor, node_count: int, **options: Any) -> None:
        is_in_place = torch.equal(path[0], torch.arange(path.shape[1]))
        compact(cache, path[:1].expand_as(path) if is_in_place else path, node_count, **options)

    return wrong


def keep_the_root_alone(compact: Function) -> Function:
    def wrong(cache: Any, path: Tensor, node_count: int, **options: Any) -> None:
        compact(cache, path[:, :1], node_count, **options)

    return wrong


def keep_the_first_rows_path(compact_ragged: Function) -> Function:
    def wrong(cache: Any, path: Tensor, *rest: Any, **options: Any) -> None:
        compact_ragged(cache, path[:1].expand_as(path), *rest, **options)

    return wrong


def move_from_the_prefix(move_forward: Function) -> Function:
    def wrong(states: Tensor, path: Tensor, start: int) -> None:
        if len(path) > 1:
            move_forward(states, path, start)
        else:
            states[..., start : start + path.shape[1], :] = states.index_select(3, path[0])

    return wrong


def see_children(tree_attention_mask: Function) -> Function:
    def wrong(config: Any, cache: Any, prefix_mask: Any, tree: DraftTree, *rest: Any, **options: Any) -> Any:
        upside_down = replace(tree, ancestors=tree.ancestors.mT)
        return tree_attention_mask(config, cache, prefix_mask, upside_down, *rest, **options)

    return wrong


def see_the_text_as_padding(tree_attention_mask: Function) -> Function:
    def wrong(config: Any, cache: Any, prefix_mask: Tensor | None, *rest: Any, **options: Any) -> Any:
        inverted = None if prefix_mask is None else 1 - prefix_mask
        return tree_attention_mask(config, cache, inverted, *rest, **options)

    return wrong


def count_nodes_as_positions(tree_positions: Function) -> Function:
    def wrong(tree: DraftTree, root_positions: Tensor | int) -> Tensor:
        return torch.arange(tree.node_count).expand_as(tree.tokens) + root_positions

    return wrong


def one_position_more(window_of: Function) -> Function:
    def wrong(cache: Any, layer_index: int) -> int | None:
        window = window_of(cache, layer_index)
        return None if window is None else window + 1

    return wrong


def none_before_the_prefix_fills_it(window_of: Function) -> Function:
    def wrong(cache: Any, layer_index: int) -> int | None:
        window = window_of(cache, layer_index)
        return None if window is None or cache.get_seq_length() <= window - 1 else window

    return wrong


POOL = "tests/test_tree.py::test_a_tree_keeps_the_best_of_a_pool_and_orphans_nobody"
CHILD = "tests/test_tree.py::test_a_child_is_the_first_that_carries_the_token"
CHAIN = "tests/test_tree.py::test_a_merged_chain_adds_its_texts_and_nothing_else"
MATCH = "tests/test_tree.py::test_the_drafted_match_is_the_longest_path_along_the_tokens"
WALK = "tests/decoding/test_acceptance.py::test_acceptance_is_the_brute_force_walk"
ROWS = "tests/decoding/test_acceptance.py::test_rows_commit_what_the_shortest_run_allows"
GREEDY = "tests/decoding/test_acceptance.py::test_greedy_rows_accept_what_each_would_alone"
FINISHED = "tests/decoding/test_finished_rows.py::test_finished_rows_cost_nothing"
DRAWS = "tests/decoding/test_draws.py::test_a_path_through_the_levels_draws_what_multinomial_draws"
NODES = "tests/decoding/test_tree_logits_processor.py::test_every_node_gets_what_its_own_text_gets"
SIGHT = "tests/target/test_attention.py::test_a_node_sees_the_prefix_and_its_own_path"
WINDOW = "tests/target/test_attention.py::test_a_sliding_layer_shows_the_end_of_a_nodes_own_text"
KEPT = "tests/target/test_tree_cache.py::test_the_cache_keeps_the_accepted_path_and_forgets_the_rest"
RAGGED = "tests/target/test_tree_cache.py::test_accepted_nodes_are_placed_behind_each_rows_own_entries"
CALLS = "tests/generation/test_any_call.py"

MUTATIONS = (
    Mutation("kept nodes stand in order of score", "tree:DraftTree.from_pool", order_by_score, POOL),
    Mutation("a child of any node will do", "tree:DraftTree.children", children_of_any_node, CHILD),
    Mutation("the root is its own child", "tree:DraftTree.children", root_among_its_children, CHILD),
    Mutation("the deepest nodes lack an ancestor", "tree:DraftTree._derive", half_the_levels, POOL),
    Mutation("a node is no ancestor of itself", "tree:DraftTree._derive", nodes_without_themselves, SIGHT),
    Mutation("a merged chain becomes a star", "tree.draft_tree:_merged", chain_as_a_star, CHAIN),
    Mutation("a merged chain is shared with cousins", "tree.pool:followed", followed_through_cousins, CHAIN),
    Mutation("cousins count as drafted", "tree.pool:followed", followed_through_cousins, MATCH),
    Mutation("each pick is sought below the root", "decoding.acceptance:_next_nodes", descend_from_the_root, WALK),
    Mutation("every pick is the root's", "decoding.acceptance:accept", pick_at_the_root, WALK),
    Mutation("acceptance goes on after the end", "decoding.acceptance:accept", go_on_after_the_end, WALK),
    Mutation("one row with the draft is enough", "decoding.acceptance:_next_nodes", one_row_is_enough, ROWS),
    Mutation("greedy rows pass their end", "decoding.acceptance:_is_end", no_end, GREEDY),
    Mutation(
        "one end token of several is heeded",
        "decoding.stop_conditions:StopConditions.of",
        one_end_token_of_several,
        GREEDY,
    ),
    Mutation("finished rows are decoded on", "decoding.batch:Batch.drop_finished", decode_padding, FINISHED),
    Mutation("sampling forgets the processors", "decoding.text:Text.__init__", sample_unprocessed, CALLS),
    Mutation(
        "every level draws the root's numbers",
        "decoding.draws:Draws.pick",
        lambda pick: lambda self, scores, levels: pick(self, scores, levels * 0),
        DRAWS,
    ),
    Mutation(
        "unused numbers are lost", "decoding.draws:Draws.give_back", lambda give_back: lambda self, used: None, DRAWS
    ),
    Mutation(
        "no processor reads texts",
        "decoding.tree_logits_processor:is_stateless",
        lambda is_stateless: lambda processor, names=None: True,
        NODES,
    ),
    Mutation("only the first row's path is moved", "target.tree_cache:compact", ask_the_first_row_alone, KEPT),
    Mutation("the path is looked up in the prefix", "target.tree_cache:_move_forward", move_from_the_prefix, KEPT),
    Mutation(
        "ragged rows keep the first row's path", "target.tree_cache:compact_ragged", keep_the_first_rows_path, RAGGED
    ),
    Mutation("only the root is kept", "target.tree_cache:compact", keep_the_root_alone, KEPT),
    Mutation("nodes see their children", "target.attention:tree_attention_mask", see_children, SIGHT),
    Mutation(
        "padding is seen, and the text is not", "target.attention:tree_attention_mask", see_the_text_as_padding, SIGHT
    ),
    Mutation("positions count nodes", "target.attention:tree_positions", count_nodes_as_positions, SIGHT),
    Mutation("a window is one too wide", "target.tree_cache:window_of", one_position_more, WINDOW),
    Mutation("a window is noticed too late", "target.tree_cache:window_of", none_before_the_prefix_fills_it, WINDOW),
)
