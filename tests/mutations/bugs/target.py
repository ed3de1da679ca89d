"""Bugs in the target's cache and attention."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from transformers_resps.tree import DraftTree

from ..planting import Function, Mutation


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


def keep_the_first_sources(keep_rows: Function) -> Function:
    def wrong(self: Any, rows: list[int]) -> None:
        keep_rows(self, list(range(len(rows))))

    return wrong


def tell_no_positions(inputs: Function) -> Function:
    def wrong(self: Any, tokens: Tensor, mask: Any, positions: Tensor) -> dict[str, Any]:
        told: dict[str, Any] = inputs(self, tokens, mask, positions)
        return {name: value for name, value in told.items() if name != "decoder_position_ids"}

    return wrong


def see_the_padding(part_inputs: Function) -> Function:
    def wrong(self: Any, tokens: Tensor, start: int) -> Any:
        inputs = part_inputs(self, tokens, start)
        return inputs._replace(ancestors=torch.ones_like(inputs.ancestors).tril())

    return wrong


def stand_at_the_beginning(part_inputs: Function) -> Function:
    def wrong(self: Any, tokens: Tensor, start: int) -> Any:
        inputs = part_inputs(self, tokens, start)
        return inputs._replace(roots=inputs.roots - start)

    return wrong


def with_another_line(before: str, after: str) -> Callable[[Function], Function]:
    """Of the C++ of native operators."""

    def bug(operators: Function) -> Function:
        def wrong() -> Any:
            sources = operators()
            assert sum(part.count(before) for source in sources.values() for part in source) == 1
            return {operator: [part.replace(before, after) for part in source] for operator, source in sources.items()}

        return wrong

    return bug


def overwrite_what_was_lent(settle: Function) -> Function:
    return lambda self: None


SIGHT = "tests/verifying/test_attention.py::test_a_node_sees_the_prefix_and_its_own_path"
ATTENDING = "tests/compilation/test_native.py::test_packaged_code_attends_by_it"
MULTIPLYING = "tests/compilation/test_native.py::test_packaged_code_multiplies_by_it_alike_whatever_rows_stand_beside"
TEXTS = "tests/verifying/test_invariant_compiled.py::"
BLOCKS = f"{TEXTS}test_a_node_gets_the_bits_of_its_text_alone_by_any_number_of_threads"
GATING = "tests/compilation/test_native.py::test_packaged_code_rounds_what_is_gated_as_pytorch_does"
PROMPTS = "tests/generation/test_compiling_prompts.py::test_text_and_cache_are_those_of_plain_decoding"
WINDOW = "tests/verifying/test_attention.py::test_a_sliding_layer_shows_the_end_of_a_nodes_own_text"
KEPT = "tests/verifying/test_cache.py::test_the_cache_keeps_the_accepted_path_and_forgets_the_rest"
ENCODED = "tests/lossless/test_encoder_decoders.py::test_chains_write_what_plain_decoding_writes"
BEGUN = "tests/lossless/test_encoder_decoders.py::test_a_decoder_may_begin_with_a_prompt"
LENT = "tests/generation/test_compiling.py::test_a_cache_is_filled_when_someone_looks_at_it_or_another_call_begins"
RAGGED = "tests/verifying/test_cache.py::test_accepted_nodes_are_placed_after_each_rows_own_entries"

MUTATIONS = (
    Mutation("only the first row's path is moved", "verifying.cache:compact", ask_the_first_row_alone, KEPT),
    Mutation("the path is looked up in the prefix", "verifying.cache:_move_forward", move_from_the_prefix, KEPT),
    Mutation(
        "ragged rows keep the first row's path", "verifying.cache:compact_ragged", keep_the_first_rows_path, RAGGED
    ),
    Mutation("only the root is kept", "verifying.cache:compact", keep_the_root_alone, KEPT),
    Mutation("nodes see their children", "verifying.attention:tree_attention_mask", see_children, SIGHT),
    Mutation(
        "padding is seen, and the text is not",
        "verifying.attention:tree_attention_mask",
        see_the_text_as_padding,
        SIGHT,
    ),
    Mutation(
        "native attention sees all",
        "compilation.native:native_operators",
        with_another_line("if (mask) added = ", "if (0) added = "),
        ATTENDING,
    ),
    Mutation(
        "native attention forgets what other threads saw",
        "compilation.native:native_operators",
        with_another_line("resps_merge(of, &at, &part);", ";"),
        ATTENDING,
    ),
    Mutation(
        "native layers forget the bias",
        "compilation.native:native_operators",
        with_another_line("if (of->bias) {", "if (0) {"),
        MULTIPLYING,
    ),
    Mutation(
        "the second tile of rows repeats the first",
        "compilation.native:native_operators",
        with_another_line("rows + LINES * depth + k", "rows + k"),
        MULTIPLYING,
    ),
    Mutation(
        "native gates are open below zero",
        "compilation.native:native_operators",
        with_another_line("(is_negative, one, small)", "(is_negative, one, one)"),
        GATING,
    ),
    Mutation(
        "native nodes read the keys of no path",
        "compilation.native:native_operators",
        with_another_line("keys + resps_slot(slots, key) * stride + column", "keys + key * stride + column"),
        BLOCKS,
    ),
    Mutation("positions count nodes", "verifying.attention:tree_positions", count_nodes_as_positions, SIGHT),
    Mutation(
        "rows go on with the sources of the first",
        "verifying.forward:EncoderDecoderForward.keep_rows",
        keep_the_first_sources,
        ENCODED,
    ),
    Mutation(
        "Whisper counts slots after a padded prompt",
        "verifying.forward:EncoderDecoderForward.inputs",
        tell_no_positions,
        BEGUN,
    ),
    Mutation(
        "a prompt sees its padding", "verifying.slots.verifier:SlotVerifier._part_inputs", see_the_padding, PROMPTS
    ),
    Mutation(
        "every part begins at slot 0",
        "verifying.slots.verifier:SlotVerifier._part_inputs",
        stand_at_the_beginning,
        PROMPTS,
    ),
    Mutation(
        "a call writes where a returned cache has its entries",
        "verifying.slots.buffers:SlotBuffers._settle",
        overwrite_what_was_lent,
        LENT,
    ),
    Mutation("a window is one too wide", "verifying.cache:window_of", one_position_more, WINDOW),
    Mutation("a window is noticed too late", "verifying.cache:window_of", none_before_the_prefix_fills_it, WINDOW),
)
