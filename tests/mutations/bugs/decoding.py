"""Bugs in acceptance, sampling and the rows of a batch."""

from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import LogitsProcessorList

from transformers_resps.tree import DraftTree

from ..planting import Function, bug


WALK = "tests/decoding/test_acceptance.py::test_acceptance_is_the_brute_force_walk"
ROWS = "tests/decoding/test_acceptance.py::test_rows_commit_what_the_shortest_run_allows"
GREEDY = "tests/decoding/test_acceptance.py::test_greedy_rows_accept_what_each_would_alone"
FINISHED = "tests/decoding/test_batch.py::test_finished_rows_cost_nothing"
DRAWS = "tests/decoding/test_acceptance_draws.py::test_a_path_through_the_levels_draws_what_multinomial_draws"
NODES = "tests/decoding/test_processors.py::test_every_node_gets_what_its_own_text_gets"
CALLS = "tests/lossless/test_any_call.py"


@bug("each pick is sought below the root", "decoding.acceptance:_next_nodes", WALK)
def descend_from_the_root(
    next_nodes: Function, children: Any, nodes: list[int], tokens: list[int], live: list[bool]
) -> list[int] | None:
    return next_nodes(children, [0] * len(nodes), tokens, live)


@bug("one row with the draft is enough", "decoding.acceptance:_next_nodes", ROWS)
def one_row_is_enough(
    next_nodes: Function, children: Any, nodes: list[int], tokens: list[int], live: list[bool]
) -> list[int] | None:
    rows = [own.get(at) for own, at in zip(children, zip(nodes, tokens, strict=True), strict=True)]
    return None if all(node is None for node in rows) else [node or 0 for node in rows]


@bug("every pick is the root's", "decoding.acceptance:accept", WALK)
def pick_at_the_root(accept: Function, tree: DraftTree, logits: Tensor, text: Any, *reached: Any) -> Any:
    return accept(tree, logits[:, :1].expand_as(logits), text, *reached)


class _Endless:
    """A text that never says that it is finished."""

    finished = False

    def __init__(self, text: Any) -> None:
        self._text = text

    def __getattr__(self, name: str) -> Any:
        return getattr(self._text, name)


@bug("acceptance goes on after the end", "decoding.acceptance:accept", WALK)
def go_on_after_the_end(accept: Function, tree: DraftTree, logits: Tensor, text: Any, *reached: Any) -> Any:
    return accept(tree, logits, _Endless(text), *reached)


@bug("greedy rows pass their end", "decoding.text:Text.ends_with", GREEDY)
def no_end(ends_with: Function, self: Any, token: int, count: int) -> bool:
    return False


@bug("one end token of several is heeded", "decoding.text:StopConditions.of", GREEDY)
def one_end_token_of_several(of: Function, cls: Any, criteria: Any) -> Any:
    conditions = of(cls, criteria)
    return conditions and replace(conditions, token_ids=frozenset(sorted(conditions.token_ids)[:1]))


@bug("sampling forgets the processors", "decoding.text:Text.__init__", CALLS)
def sample_unprocessed(
    init: Function, self: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, **options: Any
) -> None:
    kept = LogitsProcessorList() if options["do_sample"] else logits_processor
    init(self, input_ids, kept, stopping_criteria, **options)


@bug("finished rows are decoded on", "decoding.text:Batch.drop_finished", FINISHED)
def decode_padding(drop_finished: Function, self: Any) -> None:
    return None


@bug("every level draws the root's numbers", "decoding.acceptance:Draws.pick", DRAWS)
def draw_the_roots_numbers(pick: Function, self: Any, scores: Any, levels: Any) -> Any:
    return pick(self, scores, levels * 0)


@bug("unused numbers are lost", "decoding.acceptance:Draws.give_back", DRAWS)
def lose_unused_numbers(give_back: Function, self: Any, used: Any) -> Any:
    """Nothing is given back."""


@bug("no processor reads texts", "decoding.processors:is_stateless", NODES)
def believe_that_no_processor_reads_texts(is_stateless: Function, processor: Any, names: Any = None) -> Any:
    return True
