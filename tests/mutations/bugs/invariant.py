"""Bugs in the invariant mode."""

import copy
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from transformers_resps.verifying import invariant

from ..planting import Function, Mutation


def multiply_as_many_rows_as_there_are(step: Function) -> Function:
    def wrong(self: Any, rows: int) -> int:
        return 1

    return wrong


def leave_a_rest_of_rows(invariant_attention: Function) -> Function:
    def wrong(*arguments: Any, **options: Any) -> Any:
        with patch.object(invariant, "_ROWS", 1):
            return invariant_attention(*arguments, **options)

    return wrong


def halve_the_longest_text(attend_to_blocks: Function) -> Function:
    def wrong(queries: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Any:
        halves = mask.permute(1, 2, 0, 3).flatten(2).unflatten(2, (min(len(mask), 2), -1))
        halves = halves.permute(2, 0, 1, 3).contiguous()
        with patch.object(invariant, "BLOCK", halves.shape[-1]):
            return attend_to_blocks(queries, key, value, halves, scaling)

    return wrong


def begin_the_tail_by_the_root(prefix_ends: Function) -> Function:
    def wrong(places: Tensor) -> Tensor:
        return prefix_ends(places[:, :1]).expand_as(places)

    return wrong


def sum_in_float32(invariant_attention: Function) -> Function:
    def wrong(*arguments: Any, **options: Any) -> Any:
        with patch.object(Tensor, "double", Tensor.float):
            return invariant_attention(*arguments, **options)

    return wrong


def see_uncles(init: Function) -> Function:
    def wrong(self: Any, depths: Tensor, ancestors: Tensor, roots: Tensor, blocks: int) -> None:
        init(self, depths, torch.ones_like(ancestors).tril(), roots, blocks)

    return wrong


def take_slots_for_places(init: Function) -> Function:
    def wrong(self: Any, depths: Tensor, ancestors: Tensor, roots: Tensor, blocks: int) -> None:
        init(self, torch.arange(depths.shape[1]).expand_as(depths), ancestors, roots, blocks)

    return wrong


def count_the_window_in_slots(mask: Function) -> Function:
    def wrong(self: Any, window: int | None, dtype: torch.dtype) -> Tensor:
        with patch.object(self, "_tail_places", self.tail[:, None]):
            found: Tensor = mask(self, window, dtype)
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


def leave_features_at_the_front(padded: Function) -> Function:
    def wrong(self: Any, states: Tensor) -> Tensor:
        return states[:, : self.length]

    return wrong


def give_back_slots(give_back: Function) -> Function:
    def wrong(self: Any, orders: list[Tensor], first: int, cache: Any, length: int) -> None:
        give_back(self, [torch.arange(length)] * len(orders), first, cache, length)

    return wrong


def allow_any_depth(levels_left: Function) -> Function:
    def wrong(self: Any) -> int:
        return super(type(self), self).levels_left  # type: ignore[misc, no-any-return]

    return wrong


def forget_the_mode_of_a_cache(note: Function) -> Function:
    def wrong(self: Any, cache: Any, is_invariant: bool) -> None:
        note(self, cache, True)

    return wrong


UNIT, SLOTS = "tests/verifying/test_invariant.py", "tests/verifying/test_verifier.py"
CALLS = "tests/lossless/test_invariant.py"
BORDERS = f"{UNIT}::test_a_node_gets_the_bits_of_the_same_token_alone_at_every_border"
ONE_TEXT = f"{CALLS}::test_every_source_and_every_tree_write_one_text"
BATCH = f"{CALLS}::test_a_row_of_a_padded_batch_is_the_prompt_alone"
KEPT = f"{SLOTS}::test_over_slots_what_was_kept_lies_in_the_order_of_the_text"

MUTATIONS = (
    Mutation(
        "a lone row stays alone",
        "verifying.verifier:InvariantVerifier._step",
        multiply_as_many_rows_as_there_are,
        f"{SLOTS}::test_every_layer_multiplies_as_many_rows_as_the_machine_needs",
    ),
    Mutation(
        "query rows are not filled up",
        "verifying.invariant:invariant_attention",
        leave_a_rest_of_rows,
        f"{UNIT}::test_no_number_of_query_rows_changes_a_bit",
    ),
    Mutation(
        "the longest text decides where blocks end",
        "verifying.invariant:_attend_to_blocks",
        halve_the_longest_text,
        f"{UNIT}::test_rows_that_begin_anywhere_get_the_bits_of_each_text_alone",
    ),
    Mutation("tails begin by the root", "verifying.invariant:_prefix_ends", begin_the_tail_by_the_root, BORDERS),
    Mutation("tails are summed in float32", "verifying.invariant:invariant_attention", sum_in_float32, BORDERS),
    Mutation("nodes see their uncles", "verifying.invariant:Layout.__init__", see_uncles, BORDERS),
    Mutation("a node's place is its slot", "verifying.invariant:Layout.__init__", take_slots_for_places, ONE_TEXT),
    Mutation(
        "a window counts slots",
        "verifying.invariant:Layout.mask",
        count_the_window_in_slots,
        f"{UNIT}::test_a_sliding_layer_shows_a_node_the_end_of_its_own_text",
    ),
    Mutation(
        "sinks take no share",
        "verifying.invariant:invariant_attention",
        drop_sinks,
        f"{UNIT}::test_a_sink_takes_its_share_of_each_text",
    ),
    Mutation("accepted nodes stay", "verifying.slots:SlotBuffers.move", move_nothing, KEPT),
    Mutation("accepted nodes change their order", "verifying.slots:SlotBuffers.move", move_the_last_first, KEPT),
    Mutation("all rows end like the first", "verifying.slots:SlotBuffers.move", move_to_the_first_rows_places, KEPT),
    Mutation("padding is text", "verifying.verifier:InvariantVerifier._orders", keep_the_padding, BATCH),
    Mutation(
        "a prompt ends one token early",
        "verifying.verifier:InvariantVerifier._read",
        end_one_token_early,
        f"{SLOTS}::test_each_node_is_verified_as_the_end_of_its_own_path",
    ),
    Mutation(
        "features of padded rows stay at the front",
        "verifying.verifier:_PromptTexts.padded",
        leave_features_at_the_front,
        f"{SLOTS}::test_features_of_a_padded_prompt_stand_where_its_tokens_stand",
    ),
    Mutation(
        "a cache gets slots",
        "verifying.verifier:SlotVerifier._give_back",
        give_back_slots,
        f"{SLOTS}::test_a_cache_gets_the_texts_where_its_mask_shows_them",
    ),
    Mutation(
        "trees are deeper than the tail",
        "verifying.verifier:InvariantVerifier.levels_left",
        allow_any_depth,
        f"{SLOTS}::test_no_level_is_deeper_than_the_tail",
    ),
    Mutation(
        "any cache is of the mode",
        "generation.invariance:InvariantCalls.note",
        forget_the_mode_of_a_cache,
        "tests/generation/test_invariance.py::test_a_cache_that_the_normal_mode_filled_or_went_on_with_is_refused",
    ),
)
