"""Bugs in the target's cache and attention."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from transformers_resps.tree import DraftTree

from ..planting import Function, Mutation, bug


SIGHT = "tests/verifying/test_masks.py::test_a_node_sees_the_prefix_and_its_own_path"
ATTENDING = "tests/compilation/test_native.py::test_packaged_code_attends_by_it"
MULTIPLYING = "tests/compilation/test_native.py::test_packaged_code_multiplies_by_it_alike_whatever_rows_stand_beside"
TEXTS = "tests/verifying/test_invariant_compiled.py::"
BLOCKS = f"{TEXTS}test_a_node_gets_the_bits_of_its_text_alone_by_any_number_of_threads"
GATING = "tests/compilation/test_native.py::test_packaged_code_rounds_what_is_gated_as_pytorch_does"
PROMPTS = "tests/generation/test_compiling_prompts.py::test_text_and_cache_are_those_of_plain_decoding"
WINDOW = "tests/verifying/test_masks.py::test_a_sliding_layer_shows_the_end_of_a_nodes_own_text"
KEPT = "tests/verifying/test_cache.py::test_the_cache_keeps_the_accepted_path_and_forgets_the_rest"
ENCODED = "tests/lossless/test_encoder_decoders.py::test_chains_write_what_plain_decoding_writes"
BEGUN = "tests/lossless/test_encoder_decoders.py::test_a_decoder_may_begin_with_a_prompt"
LENT = "tests/generation/test_compiling.py::test_a_cache_is_filled_when_someone_looks_at_it_or_another_call_begins"
RAGGED = "tests/verifying/test_cache.py::test_accepted_nodes_are_placed_after_each_rows_own_entries"


@bug("only the first row's path is moved", "verifying.cache:compact", KEPT)
def ask_the_first_row_alone(compact: Function, cache: Any, path: Tensor, node_count: int, **options: Any) -> None:
    is_in_place = torch.equal(path[0], torch.arange(path.shape[1]))
    compact(cache, path[:1].expand_as(path) if is_in_place else path, node_count, **options)


@bug("only the root is kept", "verifying.cache:compact", KEPT)
def keep_the_root_alone(compact: Function, cache: Any, path: Tensor, node_count: int, **options: Any) -> None:
    compact(cache, path[:, :1], node_count, **options)


@bug("ragged rows keep the first row's path", "verifying.cache:compact_ragged", RAGGED)
def keep_the_first_rows_path(compact_ragged: Function, cache: Any, path: Tensor, *rest: Any, **options: Any) -> None:
    compact_ragged(cache, path[:1].expand_as(path), *rest, **options)


@bug("the path is looked up in the prefix", "verifying.cache:_move_forward", KEPT)
def move_from_the_prefix(move_forward: Function, states: Tensor, path: Tensor, start: int) -> None:
    if len(path) > 1:
        move_forward(states, path, start)
    else:
        states[..., start : start + path.shape[1], :] = states.index_select(3, path[0])


@bug("nodes see their children", "verifying.masks:tree_attention_mask", SIGHT)
def see_children(
    tree_attention_mask: Function,
    config: Any,
    cache: Any,
    prefix_mask: Any,
    tree: DraftTree,
    *rest: Any,
    **options: Any,
) -> Any:
    upside_down = replace(tree, ancestors=tree.ancestors.mT)
    return tree_attention_mask(config, cache, prefix_mask, upside_down, *rest, **options)


@bug("padding is seen, and the text is not", "verifying.masks:tree_attention_mask", SIGHT)
def see_the_text_as_padding(
    tree_attention_mask: Function, config: Any, cache: Any, prefix_mask: Tensor | None, *rest: Any, **options: Any
) -> Any:
    inverted = None if prefix_mask is None else 1 - prefix_mask
    return tree_attention_mask(config, cache, inverted, *rest, **options)


@bug("positions count nodes", "verifying.masks:tree_positions", SIGHT)
def count_nodes_as_positions(tree_positions: Function, tree: DraftTree, root_positions: Tensor | int) -> Tensor:
    return torch.arange(tree.node_count).expand_as(tree.tokens) + root_positions


@bug("a window is one too wide", "verifying.cache:window_of", WINDOW)
def one_position_more(window_of: Function, cache: Any, layer_index: int) -> int | None:
    window = window_of(cache, layer_index)
    return None if window is None else window + 1


@bug("a window is noticed too late", "verifying.cache:window_of", WINDOW)
def none_before_the_prefix_fills_it(window_of: Function, cache: Any, layer_index: int) -> int | None:
    window = window_of(cache, layer_index)
    return None if window is None or cache.get_seq_length() <= window - 1 else window


@bug("rows go on with the sources of the first", "verifying.forward:EncoderDecoderForward.keep_rows", ENCODED)
def keep_the_first_sources(keep_rows: Function, self: Any, rows: list[int]) -> None:
    keep_rows(self, list(range(len(rows))))


@bug("Whisper counts slots after a padded prompt", "verifying.forward:EncoderDecoderForward.inputs", BEGUN)
def tell_no_positions(inputs: Function, self: Any, tokens: Tensor, mask: Any, positions: Tensor) -> dict[str, Any]:
    told: dict[str, Any] = inputs(self, tokens, mask, positions)
    return {name: value for name, value in told.items() if name != "decoder_position_ids"}


@bug("a prompt sees its padding", "verifying.slots.prompts:PartReader.inputs", PROMPTS)
def see_the_padding(part_inputs: Function, self: Any, tokens: Tensor, start: int) -> list[Tensor]:
    padded, depths, ancestors, *others = part_inputs(self, tokens, start)
    return [padded, depths, torch.ones_like(ancestors).tril(), *others]


@bug("every part begins at slot 0", "verifying.slots.prompts:PartReader.inputs", PROMPTS)
def stand_at_the_beginning(part_inputs: Function, self: Any, tokens: Tensor, start: int) -> list[Tensor]:
    padded, depths, ancestors, roots, *others = part_inputs(self, tokens, start)
    return [padded, depths, ancestors, roots - start, *others]


def line(words: str, before: str, after: str, tests: str) -> Mutation:
    """A bug in a line of the C++ of native operators."""

    @bug(words, "compilation.kernels:native_source", tests)
    def change(source: Function) -> Any:
        assert source().count(before) == 1
        return source().replace(before, after)

    return change


@bug("a call writes where a returned cache has its entries", "verifying.slots.buffers:SlotBuffers._settle", LENT)
def overwrite_what_was_lent(settle: Function, self: Any) -> None:
    """Nothing happens."""


see_all_keys = line("native attention sees all", "if (mask) added = ", "if (0) added = ", ATTENDING)
forget_what_other_threads_saw = line(
    "native attention forgets what other threads saw", "resps_merge(of, &at, &part);", ";", ATTENDING
)
forget_the_bias = line("native layers forget the bias", "if (of->bias) {", "if (0) {", MULTIPLYING)
repeat_the_first_tile = line(
    "the second tile of rows repeats the first", "rows + LINES * depth + k", "rows + k", MULTIPLYING
)
open_gates_below_zero = line(
    "native gates are open below zero", "(is_negative, one, small)", "(is_negative, one, one)", GATING
)
read_keys_of_no_path = line(
    "native nodes read the keys of no path",
    "keys + resps_slot(slots, key) * stride + column",
    "keys + key * stride + column",
    BLOCKS,
)
