"""Bugs in the invariant mode."""

import copy
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from transformers_resps.verifying.invariant import attention as invariant

from ..planting import Function, Mutation


def multiply_as_many_rows_as_there_are(step: Function) -> Function:
    def wrong(self: Any, rows: int) -> int:
        return 1

    return wrong


def leave_a_rest_of_rows(invariant_attention: Function) -> Function:
    def wrong(*arguments: Any, **options: Any) -> Any:
        with patch.object(invariant, "_MULTIPLE", 1):
            return invariant_attention(*arguments, **options)

    return wrong


def see_the_next_token(shown: Function) -> Function:
    def wrong(self: Any, keys: Tensor, places: Tensor, last: Tensor, *window: Any) -> Tensor:
        found: Tensor = shown(self, keys, places, last + 1, *window)
        return found

    return wrong


def count_the_window_from_the_block(shown: Function) -> Function:
    def wrong(self: Any, keys: Tensor, places: Tensor, *rest: Any) -> Tensor:
        found: Tensor = shown(self, keys, places.where(places < 0, places // invariant.BLOCK * invariant.BLOCK), *rest)
        return found

    return wrong


def read_nodes_by_their_number(slots: Function) -> Function:
    def wrong(roots: Tensor, nodes: Tensor, starts: Tensor) -> Tensor:
        return starts[..., None] + torch.arange(invariant.BLOCK)

    return wrong


def read_the_first_path(slots: Function) -> Function:
    def wrong(roots: Tensor, nodes: Tensor, starts: Tensor) -> Tensor:
        found: Tensor = slots(roots, nodes[:, :1].expand_as(nodes), starts)
        return found

    return wrong


def count_nodes_as_levels(positions: Function) -> Function:
    def wrong(roots: Tensor, depths: Tensor) -> Tensor:
        found: Tensor = positions(roots, torch.arange(depths.shape[1]).expand_as(depths))
        return found

    return wrong


def drop_sinks(invariant_attention: Function) -> Function:
    def wrong(*arguments: Any, **options: Any) -> Any:
        return invariant_attention(*arguments, **{**options, "s_aux": None})

    return wrong


def move_nothing(move: Function) -> Function:
    def wrong(self: Any, slots: Tensor, to: Tensor) -> None:
        return

    return wrong


def move_the_last_first(move: Function) -> Function:
    def wrong(self: Any, slots: Tensor, to: Tensor) -> None:
        move(self, slots, to.flip(1))

    return wrong


def move_to_the_first_rows_places(move: Function) -> Function:
    def wrong(self: Any, slots: Tensor, to: Tensor) -> None:
        move(self, slots, to[:1].expand_as(to))

    return wrong


def keep_the_padding(orders: Function) -> Function:
    def wrong(self: Any, length: int) -> list[Tensor]:
        return [torch.arange(length)] * len(orders(self, length))

    return wrong


def end_one_token_early(read: Function) -> Function:
    def wrong(self: Any, prompt: Any, *rest: Any) -> Any:
        shorter = copy.copy(prompt)
        shorter.counts = [max(count - 1, 1) for count in prompt.counts]
        return read(self, shorter, *rest)

    return wrong


def take_any_code(refuse: Function) -> Function:
    def wrong(self: Any, what: str) -> None:
        """Nothing is refused."""

    return wrong


def leave_features_at_the_front(padded: Function) -> Function:
    def wrong(self: Any, states: Tensor) -> Tensor:
        return states[:, : self.length]

    return wrong


def give_back_slots(give_back: Function) -> Function:
    def wrong(self: Any, orders: list[Tensor], first: int, cache: Any, length: int) -> None:
        give_back(self, [torch.arange(length)] * len(orders), first, cache, length)

    return wrong


def forget_the_mode_of_a_cache(note: Function) -> Function:
    def wrong(self: Any, cache: Any, is_invariant: bool) -> None:
        note(self, cache, True)

    return wrong


UNIT, SLOTS = "tests/verifying/test_invariant.py", "tests/verifying/test_verifier.py"
CALLS = "tests/lossless/test_invariant.py"
PATHS = f"{UNIT}::test_a_node_gets_the_bits_of_the_same_token_alone_at_every_border"
ONE_TEXT = f"{CALLS}::test_every_source_and_every_tree_write_one_text"
BATCH = f"{CALLS}::test_a_row_of_a_padded_batch_is_the_prompt_alone"
KEPT = f"{SLOTS}::test_over_slots_what_was_kept_lies_in_the_order_of_the_text"

MUTATIONS = (
    Mutation(
        "a lone row stays alone",
        "verifying.invariant.verifier:InvariantVerifier._step",
        multiply_as_many_rows_as_there_are,
        f"{SLOTS}::test_every_layer_multiplies_as_many_rows_as_the_machine_needs",
    ),
    Mutation(
        "query rows are not filled up",
        "verifying.invariant.attention:invariant_attention",
        leave_a_rest_of_rows,
        f"{UNIT}::test_a_kernel_is_asked_for_no_rest_of_fewer_than_eight_rows",
    ),
    Mutation("a node sees the next one", "verifying.invariant.attention:BlockReads._shown", see_the_next_token, PATHS),
    Mutation(
        "a path is read as nodes come", "verifying.invariant.attention:_slots", read_nodes_by_their_number, PATHS
    ),
    Mutation("all paths read the first one", "verifying.invariant.attention:_slots", read_the_first_path, PATHS),
    Mutation(
        "a node's position is its number",
        "verifying.invariant.verifier:node_positions",
        count_nodes_as_levels,
        ONE_TEXT,
    ),
    Mutation(
        "a window counts from the block",
        "verifying.invariant.attention:BlockReads._shown",
        count_the_window_from_the_block,
        f"{UNIT}::test_a_sliding_layer_shows_a_node_the_end_of_its_own_text",
    ),
    Mutation(
        "sinks take no share",
        "verifying.invariant.attention:invariant_attention",
        drop_sinks,
        f"{UNIT}::test_a_sink_takes_its_share_of_each_text",
    ),
    Mutation("accepted nodes stay", "verifying.slots.buffers:SlotBuffers.move", move_nothing, KEPT),
    Mutation(
        "accepted nodes change their order", "verifying.slots.buffers:SlotBuffers.move", move_the_last_first, KEPT
    ),
    Mutation(
        "all rows end like the first", "verifying.slots.buffers:SlotBuffers.move", move_to_the_first_rows_places, KEPT
    ),
    Mutation("padding is text", "verifying.invariant.verifier:InvariantVerifier._orders", keep_the_padding, BATCH),
    Mutation(
        "a prompt ends one token early",
        "verifying.invariant.verifier:InvariantVerifier._read",
        end_one_token_early,
        f"{SLOTS}::test_each_node_is_verified_as_the_end_of_its_own_path",
    ),
    Mutation(
        "code that rounds otherwise is taken",
        "verifying.invariant.verifier:InvariantVerifier._refuse",
        take_any_code,
        "tests/generation/test_compiling.py"
        "::test_code_of_the_invariant_mode_that_rounds_otherwise_than_earlier_code_is_refused",
    ),
    Mutation(
        "features of padded rows stay at the front",
        "verifying.invariant.verifier:_PromptTexts.padded",
        leave_features_at_the_front,
        f"{SLOTS}::test_features_of_a_padded_prompt_stand_where_its_tokens_stand",
    ),
    Mutation(
        "a cache gets slots",
        "verifying.slots.verifier:SlotVerifier._give_back",
        give_back_slots,
        f"{SLOTS}::test_a_cache_gets_the_texts_where_its_mask_shows_them",
    ),
    Mutation(
        "any cache is of the mode",
        "verifying.invariant.calls:InvariantCalls.note",
        forget_the_mode_of_a_cache,
        "tests/verifying/test_invariant_calls.py::test_a_cache_that_the_normal_mode_filled_or_went_on_with_is_refused",
    ),
)
