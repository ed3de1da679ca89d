"""Bugs in acceptance, sampling and the rows of a batch."""

from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import LogitsProcessorList

from transformers_resps.tree import DraftTree

from ..planting import Function, Mutation


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
    def wrong(tree: DraftTree, logits: Tensor, text: Any, *reached: Any) -> Any:
        return accept(tree, logits[:, :1].expand_as(logits), text, *reached)

    return wrong


class _Endless:
    """A text that never says that it is finished."""

    finished = False

    def __init__(self, text: Any) -> None:
        self._text = text

    def __getattr__(self, name: str) -> Any:
        return getattr(self._text, name)


def go_on_after_the_end(accept: Function) -> Function:
    def wrong(tree: DraftTree, logits: Tensor, text: Any, *reached: Any) -> Any:
        return accept(tree, logits, _Endless(text), *reached)

    return wrong


def no_end(ends_with: Function) -> Function:
    def wrong(self: Any, token: int, count: int) -> bool:
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


WALK = "tests/decoding/test_acceptance.py::test_acceptance_is_the_brute_force_walk"
ROWS = "tests/decoding/test_acceptance.py::test_rows_commit_what_the_shortest_run_allows"
GREEDY = "tests/decoding/test_acceptance.py::test_greedy_rows_accept_what_each_would_alone"
FINISHED = "tests/decoding/test_batch.py::test_finished_rows_cost_nothing"
DRAWS = "tests/decoding/test_acceptance_draws.py::test_a_path_through_the_levels_draws_what_multinomial_draws"
NODES = "tests/decoding/test_processors.py::test_every_node_gets_what_its_own_text_gets"
CALLS = "tests/lossless/test_any_call.py"

MUTATIONS = (
    Mutation("each pick is sought below the root", "decoding.acceptance:_next_nodes", descend_from_the_root, WALK),
    Mutation("every pick is the root's", "decoding.acceptance:accept", pick_at_the_root, WALK),
    Mutation("acceptance goes on after the end", "decoding.acceptance:accept", go_on_after_the_end, WALK),
    Mutation("one row with the draft is enough", "decoding.acceptance:_next_nodes", one_row_is_enough, ROWS),
    Mutation("greedy rows pass their end", "decoding.text:Text.ends_with", no_end, GREEDY),
    Mutation(
        "one end token of several is heeded",
        "decoding.text:StopConditions.of",
        one_end_token_of_several,
        GREEDY,
    ),
    Mutation("finished rows are decoded on", "decoding.text:Batch.drop_finished", decode_padding, FINISHED),
    Mutation("sampling forgets the processors", "decoding.text:Text.__init__", sample_unprocessed, CALLS),
    Mutation(
        "every level draws the root's numbers",
        "decoding.acceptance:Draws.pick",
        lambda pick: lambda self, scores, levels: pick(self, scores, levels * 0),
        DRAWS,
    ),
    Mutation(
        "unused numbers are lost",
        "decoding.acceptance:Draws.give_back",
        lambda give_back: lambda self, used: None,
        DRAWS,
    ),
    Mutation(
        "no processor reads texts",
        "decoding.processors:is_stateless",
        lambda is_stateless: lambda processor, names=None: True,
        NODES,
    ),
)
