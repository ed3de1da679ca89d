"""Bugs in the invariant mode."""

import copy
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from transformers_resps.verifying.invariant import attention as invariant

from ..planting import Function, bug


UNIT, SLOTS = "tests/verifying/test_invariant.py", "tests/verifying/test_verifier.py"
CALLS = "tests/lossless/test_invariant.py"
PATHS = f"{UNIT}::test_a_node_gets_the_bits_of_the_same_token_alone_at_every_border"
ONE_TEXT = f"{CALLS}::test_every_source_and_every_tree_write_one_text"
BATCH = f"{CALLS}::test_a_row_of_a_padded_batch_is_the_prompt_alone"
KEPT = f"{SLOTS}::test_over_slots_what_was_kept_lies_in_the_order_of_the_text"


@bug(
    "a lone row stays alone",
    "verifying.invariant.verifier:InvariantSteps.step",
    f"{SLOTS}::test_every_layer_multiplies_as_many_rows_as_the_machine_needs",
)
def multiply_as_many_rows_as_there_are(step: Function, self: Any, rows: int) -> int:
    return 1


@bug(
    "query rows are not filled up",
    "verifying.invariant.attention:invariant_attention",
    f"{UNIT}::test_a_kernel_is_asked_for_no_rest_of_fewer_than_eight_rows",
)
def leave_a_rest_of_rows(invariant_attention: Function, *arguments: Any, **options: Any) -> Any:
    with patch.object(invariant, "_MULTIPLE", 1):
        return invariant_attention(*arguments, **options)


@bug("a node sees the next one", "verifying.invariant.attention:BlockReads._shown", PATHS)
def see_the_next_token(shown: Function, self: Any, keys: Tensor, places: Tensor, last: Tensor, *window: Any) -> Tensor:
    found: Tensor = shown(self, keys, places, last + 1, *window)
    return found


@bug(
    "a window counts from the block",
    "verifying.invariant.attention:BlockReads._shown",
    f"{UNIT}::test_a_sliding_layer_shows_a_node_the_end_of_its_own_text",
)
def count_the_window_from_the_block(shown: Function, self: Any, keys: Tensor, places: Tensor, *rest: Any) -> Tensor:
    found: Tensor = shown(self, keys, places.where(places < 0, places // invariant.BLOCK * invariant.BLOCK), *rest)
    return found


@bug("a path is read as nodes come", "verifying.invariant.attention:_slots", PATHS)
def read_nodes_by_their_number(slots: Function, roots: Tensor, nodes: Tensor, starts: Tensor) -> Tensor:
    return starts[..., None] + torch.arange(invariant.BLOCK)


@bug("all paths read the first one", "verifying.invariant.attention:_slots", PATHS)
def read_the_first_path(slots: Function, roots: Tensor, nodes: Tensor, starts: Tensor) -> Tensor:
    found: Tensor = slots(roots, nodes[:, :1].expand_as(nodes), starts)
    return found


@bug("a node's position is its number", "verifying.invariant.verifier:node_positions", ONE_TEXT)
def count_nodes_as_levels(positions: Function, roots: Tensor, depths: Tensor) -> Tensor:
    found: Tensor = positions(roots, torch.arange(depths.shape[1]).expand_as(depths))
    return found


@bug(
    "sinks take no share",
    "verifying.invariant.attention:invariant_attention",
    f"{UNIT}::test_a_sink_takes_its_share_of_each_text",
)
def drop_sinks(invariant_attention: Function, *arguments: Any, **options: Any) -> Any:
    return invariant_attention(*arguments, **{**options, "s_aux": None})


@bug("accepted nodes stay", "verifying.slots.buffers:SlotBuffers.move", KEPT)
def move_nothing(move: Function, self: Any, slots: Tensor, to: Tensor) -> None:
    return


@bug("accepted nodes change their order", "verifying.slots.buffers:SlotBuffers.move", KEPT)
def move_the_last_first(move: Function, self: Any, slots: Tensor, to: Tensor) -> None:
    move(self, slots, to.flip(1))


@bug("all rows end like the first", "verifying.slots.buffers:SlotBuffers.move", KEPT)
def move_to_the_first_rows_places(move: Function, self: Any, slots: Tensor, to: Tensor) -> None:
    move(self, slots, to[:1].expand_as(to))


@bug("padding is text", "verifying.slots.texts:SlotTexts.orders", BATCH)
def keep_the_padding(orders: Function, self: Any, length: int) -> list[Tensor]:
    return [torch.arange(length)] * len(orders(self, length))


@bug(
    "a prompt ends one token early",
    "verifying.invariant.verifier:TextReader.read_chunk",
    f"{SLOTS}::test_each_node_is_verified_as_the_end_of_its_own_path",
)
def end_one_token_early(read: Function, self: Any, prompt: Any, *rest: Any) -> Any:
    shorter = copy.copy(prompt)
    shorter.counts = [max(count - 1, 1) for count in prompt.counts]
    return read(self, shorter, *rest)


@bug(
    "code that rounds otherwise is taken",
    "verifying.invariant.verifier:ModelCode.refuse",
    "tests/generation/test_compiling.py"
    "::test_code_of_the_invariant_mode_that_rounds_otherwise_than_earlier_code_is_refused",
)
def take_any_code(refuse: Function, self: Any, target: Any, what: str) -> None:
    """Nothing is refused."""


@bug(
    "features of padded rows stay at the front",
    "verifying.invariant.verifier:_PromptTexts.padded",
    f"{SLOTS}::test_features_of_a_padded_prompt_stand_where_its_tokens_stand",
)
def leave_features_at_the_front(padded: Function, self: Any, states: Tensor) -> Tensor:
    return states[:, : self.length]


@bug(
    "a cache gets slots",
    "verifying.slots.texts:SlotTexts.give_back",
    f"{SLOTS}::test_a_cache_gets_the_texts_where_its_mask_shows_them",
)
def give_back_slots(give_back: Function, self: Any, cache: Any, rows: slice, length: int) -> None:
    with patch.object(self, "orders", lambda length: [torch.arange(length)] * len(self.rows)):
        give_back(self, cache, rows, length)


@bug(
    "any cache is of the mode",
    "verifying.invariant.calls:InvariantCalls.note",
    "tests/verifying/test_invariant_calls.py::test_a_cache_that_the_normal_mode_filled_or_went_on_with_is_refused",
)
def forget_the_mode_of_a_cache(note: Function, self: Any, cache: Any, is_invariant: bool) -> None:
    note(self, cache, True)
