"""The interface of verifiers, which run the target: they read prompts, verify trees and keep the accepted paths."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from transformers import Cache

from ..tree import DraftTree, Pricing
from .cache import (
    cached_length,
    check_cache,
    copied_row,
    count_tokens,
    crop_to,
    record_windows,
    restore_stock_layers,
)
from .forward import Features, TargetForward
from .returned import EndedRow
from .rows import RowEnds
from .slots.engine import SlotEngine
from .slots.steps import RoundedSteps


@dataclass(frozen=True, slots=True)
class TargetEntries:
    """The target's cached keys and values, which some drafters read between steps; valid until the next forward.

    A kind is a name in `config.layer_types`, or "full_attention" if the config has none. The entries of a kind are
    keys and values of the last layer of this kind that computes its own keys.
    """

    states: dict[str, tuple[Tensor, Tensor]]  # kind -> keys and values, [b, kv heads, s, hd] each
    # Kind -> additive mask [b, 1, 1, s]: 0 at the keys that the next tree's root attends to, else the dtype's minimum.
    masks: dict[str, Tensor]
    positions: Tensor  # position ids of the next tree's roots: [b or 1, 1], or [planes, b or 1, 1]


class Verifier(ABC):
    """Runs the target over trees, owns the target's cache during a call, and tracks the length of every row.

    Use it in a `with` block. After it, even after an error, the cache has Transformers' layers with only kept entries.
    """

    is_compiled: bool = False  # whether forwards over trees run compiled
    reads_paths: bool = False  # whether the target has recurrent layers, whose states advance along kept paths
    rounded: RoundedSteps | None = None  # runs the target with rounded weights to draft; `None` if not possible

    def __init__(self, forward: TargetForward, rows: RowEnds) -> None:
        self.forward, self.rows, self.device = forward, rows, rows.device  # trees must be on this device
        self._is_unsettled = False  # whether the cache has an unknown length, because `generate` reads the prompt

    def __enter__(self) -> Self:
        self.forward.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self.close()
        finally:
            self.forward.__exit__(*exception)

    @property
    def length(self) -> int:
        """Number of cached tokens in the longest row, padding included."""
        return self.rows.length

    @property
    def pricing(self) -> Pricing:
        """Facts that determine the cost of the newest step or, before the first step, of the first step."""
        return Pricing()

    def prefill(
        self, tokens: Tensor, chunk_size: int | None = None, **options: int | Tensor
    ) -> tuple[Tensor, list[Features]]:
        """Run the target over the prompt's uncached tokens; return the last logits, and each forward's features.

        `tokens` `[b, t]` are the last tokens of the prompt, including all uncached tokens, at least one. Each forward
        reads `chunk_size` tokens of each row, or all if `None`. `options` are keywords of the target, such as
        `logits_to_keep`. The logits are `[b, any, v]`. Raises a `ValueError` if the cache cannot hold a tree.
        """
        read = read_in_chunks(self.rows, tokens, chunk_size, partial(self._read_chunk, options))
        self.start(len(tokens))
        return read

    def _read_chunk(self, options: Mapping[str, int | Tensor], tokens: Tensor, start: int) -> tuple[Tensor, Features]:
        stop = start + tokens.shape[1]
        record_windows(self.forward.cache)
        mask, positions = self.rows.prompt_mask(stop), self.rows.positions[..., start:stop]
        outputs, features = self.forward.read(tokens, mask, positions, **options)
        return outputs.logits, features

    def prefill_by(self, run: Callable[[], Any], rows: int) -> tuple[Tensor, list[Features]]:
        """Let Transformers' `generate` read a prompt with images, sounds or embeddings; return the same as `prefill`.

        `run` reads the uncached part of the prompt's `rows` rows into the cache, and returns the outputs of its last
        forward. Raises a `ValueError` if the cache then has more or fewer positions than the prompt, or if the target
        passes no positions to its decoder.
        """
        self._is_unsettled = True
        outputs, features, positions = self.forward.read_by(run)
        length, cached = self.rows.prompt_length, cached_length(self.forward.cache)
        if positions is None or cached != length:
            raise ValueError(
                f"{type(self.forward.target).__name__} reads a prompt of {length} positions as {cached}, or lets its "
                "decoder count them, so the nodes of a tree have no known positions. Call `generate` with "
                "`policy='plain'`."
            )
        self.rows.go_on_from(positions)
        record_windows(self.forward.cache)
        self.rows.slots.extend([length - self.length] * rows)
        self._is_unsettled = False
        self.start(rows)
        return outputs.logits, [features]

    def start(self, rows: int) -> None:
        """Prepare the cache for trees of `rows` rows; raise a `ValueError` if it cannot hold trees."""
        check_cache(self.forward.cache)
        self.rows.expand(rows)
        self._begin_steps()

    @abstractmethod
    def _begin_steps(self) -> None: ...

    def take_compile_seconds(self) -> float:
        """Return the seconds spent on compiling since the last call of this method."""
        return 0.0

    @abstractmethod
    def verify(self, tree: DraftTree) -> tuple[Tensor, Features]:
        """Run the target over a tree; return its nodes' logits `[b, n or more, v]` and features, padding last.

        The caller must call `keep` or `undo` before the next tree.
        """

    @abstractmethod
    def undo(self) -> None:
        """Drop all nodes of the newest tree, as if it had not been verified."""

    @abstractmethod
    def keep(self, path: Tensor, paths: list[list[int]]) -> None:
        """Keep the accepted nodes of the newest tree in the cache, and drop its other nodes.

        `path` `[b, m]` holds the indices of the accepted nodes, ascending from the root; a row with fewer nodes
        repeats its last one. `paths` holds the same as lists, without repetitions.
        """

    @abstractmethod
    def keep_rows(self, rows: list[int]) -> None:
        """Keep only these rows of the batch, and drop all others."""

    @abstractmethod
    def target_entries(self) -> TargetEntries:
        """Return the target's cached keys and values; the newest tree must have been kept or undone."""

    def ended_row(self, row: int) -> EndedRow:
        """Return a copy of one row's cache, with the position ids of the row's next token."""
        return EndedRow(self._row_cache(row, self.rows.ends[row]), torch.tensor(self.rows.roots[row]).view(-1))

    def _row_cache(self, row: int, length: int) -> Cache:
        return copied_row(self.forward.cache, row, length)

    def unread_cache(self) -> Cache | None:
        """Return a cache that is filled when it is first read, or `None` if the caller must use `forward.cache`.

        Afterwards only `close` may be called.
        """
        return None

    def close(self) -> None:
        """Remove all but kept entries from the cache, and restore Transformers' layers, so that it can be reused."""
        if not self._is_unsettled:  # else all entries stay, since their number is unknown
            crop_to(self.forward.cache, self.length)
            count_tokens(self.forward.cache, self.length)
        restore_stock_layers(self.forward.cache)


class VerifyingMode(ABC):
    """A way of verifying trees: makes the verifier of each call, and has the settings that calibration needs."""

    attention: ClassVar[str | None] = None  # attention implementation of this mode; `None`: the target's own
    keywords: ClassVar[Mapping[str, Any]] = {}  # keywords of `generate` that select this mode
    is_stock: ClassVar[bool] = True  # whether plain decoding in this mode is Transformers' own `generate`

    def verifier(
        self,
        forward: TargetForward,
        position_ids: Tensor,
        attention_mask: Tensor | None = None,
        engine: SlotEngine | None = None,
        *,
        gives_back: bool = True,
    ) -> Verifier:
        """Make the verifier of one call. For `position_ids` and `attention_mask` of the prompt see `RowEnds`.

        `engine` compiles the target's forwards; with `None` they run eagerly. `gives_back` says whether `close` must
        leave all kept entries in the cache of `forward`.
        """
        return self.compose(forward, RowEnds(forward, position_ids, attention_mask), engine, gives_back)

    @abstractmethod
    def compose(self, forward: TargetForward, rows: RowEnds, engine: SlotEngine | None, gives_back: bool) -> Verifier:
        """Make the verifier of one call for a batch's `rows`; for the other arguments see the method `verifier`."""


Read = Callable[[Tensor, int], tuple[Tensor, Features]]


def read_in_chunks(rows: RowEnds, tokens: Tensor, chunk_size: int | None, read: Read) -> tuple[Tensor, list[Features]]:
    """Read a prompt's uncached tokens in chunks, and count them in `rows`; return the last logits and all features.

    `tokens` `[b, t]` are the prompt's last tokens. `read(chunk, first position)` returns its logits and features.
    """
    tokens, end = tokens.to(rows.device), rows.prompt_length
    offset, features = end - tokens.shape[1], []
    for start in range(rows.length, end, chunk_size or end):
        stop = min(start + (chunk_size or end), end)
        logits, caught = read(tokens[:, start - offset : stop - offset], start)
        rows.slots.extend([stop - start] * len(tokens))
        features.append(caught)
    return logits, features


def layers_by_kind(forward: TargetForward, cache: Cache) -> dict[str, int]:
    """Map each layer type to the index of the last layer of this type that has its own keys in `cache`."""
    kinds = getattr(forward.target.config.get_text_config(decoder=True), "layer_types", None)
    named = zip(cache.layers, kinds or ["full_attention"] * len(cache.layers), strict=False)
    return {kind: index for index, (layer, kind) in enumerate(named) if getattr(layer, "keys", None) is not None}
