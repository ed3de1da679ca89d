"""The target's side of decoding a batch: read the prompt, then verify trees and keep their accepted paths."""

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
    crop_to,
    record_windows,
    restore_stock_layers,
)
from .forward import Features, TargetForward
from .returned import EndedRow
from .rows import RowEnds
from .slots.engine import SlotEngine


@dataclass(frozen=True, slots=True)
class TargetEntries:
    """The target's kept keys and values between two steps, for drafters; valid until the next forward.

    Each kind of layers (`config.layer_types`; "full_attention" where the config names none) has the entries of its
    last layer that does not share another's keys.
    """

    states: dict[str, tuple[Tensor, Tensor]]  # kind -> keys and values, [b, kv heads, s, hd] each
    # Kind -> [b, 1, 1, s], 0 where the coming root, which has no entry yet, may look, else the dtype's minimum.
    masks: dict[str, Tensor]
    positions: Tensor  # [b or 1, 1] of the coming roots, or [planes, b or 1, 1]


class Verifier(ABC):
    """Owns the target's cache while a batch is decoded, and knows where every row ends.

    Use it in `with`: at the end, even after an interruption, the cache is a stock one and holds only kept entries.
    """

    is_compiled: bool = False  # whether steps run compiled
    reads_paths: bool = False  # whether the target has recurrent layers, whose states advance along kept paths

    def __init__(self, forward: TargetForward, rows: RowEnds) -> None:
        self.forward, self.rows = forward, rows
        self._is_unsettled = False  # whether an interruption would leave the cache at an unknown length

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
        """Positions of the longest row."""
        return self.rows.length

    @property
    def levels_left(self) -> int:
        """Levels below the root that the target's positions allow."""
        return self.rows.levels_left

    @property
    def pricing(self) -> Pricing:
        """The pricing of the newest step, or of the next one."""
        return Pricing()

    @property
    def device(self) -> torch.device:
        """The device of trees."""
        return self.rows.device

    def prefill(
        self, tokens: Tensor, chunk_size: int | None = None, **options: int | Tensor
    ) -> tuple[Tensor, list[Features]]:
        """Read the tokens of the prompt that the cache lacks; return the last logits, and each forward's features.

        `tokens` `[b, t]` are the end of the prompt, with at least one token that the cache lacks. `chunk_size` are
        tokens of one forward; `None` reads all at once. `options` are `logits_to_keep` of the target's forward. The
        logits are `[b, any, v]`. Raises a `ValueError` if the target's cache cannot hold a tree.
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
        """Let stock `generate` read the part of the prompt that the cache lacks, with images, sounds or embeddings.

        `run` reads it into the cache, and returns the outputs of the last forward. The result is that of `prefill`.
        Raises a `ValueError` if the target reads more or fewer positions than the prompt has, or passes none to its
        decoder.
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
        """Prepare a prompt of this number of rows for trees."""
        check_cache(self.forward.cache)
        self.rows.expand(rows)
        self._begin_steps()

    @abstractmethod
    def _begin_steps(self) -> None: ...

    def take_compile_seconds(self) -> float:
        """Return and reset the seconds of compiling forwards."""
        return 0.0

    @abstractmethod
    def verify(self, tree: DraftTree) -> tuple[Tensor, Features]:
        """Compute logits `[b, n or more, v]` and features of all nodes, padding last; `keep` or `undo` must follow."""

    @abstractmethod
    def undo(self) -> None:
        """Forget the newest tree."""

    @abstractmethod
    def keep(self, path: Tensor, paths: list[list[int]]) -> None:
        """Keep the accepted nodes of the newest tree, and forget its others.

        `path` `[b, m]` are node indices, ascending, the root first; a row that keeps fewer repeats its last. `paths`
        are the same on the host, without repetitions.
        """

    @abstractmethod
    def keep_rows(self, rows: list[int]) -> None:
        """Decode only these rows from now on."""

    @abstractmethod
    def target_entries(self) -> TargetEntries:
        """Return the kept keys and values. The newest tree was kept or undone."""

    @property
    def is_even(self) -> bool:
        """Whether all rows end at the same position."""
        return len(set(self.rows.ends)) == 1

    def ended_row(self, row: int) -> EndedRow:
        """Copy the kept entries of one row."""
        return EndedRow(self._row_cache(row, self.rows.ends[row]), torch.tensor(self.rows.roots[row]).view(-1))

    def _row_cache(self, row: int, length: int) -> Cache:
        return copied_row(self.forward.cache, row, length)

    def unread_cache(self) -> Cache | None:
        """Return the cache that `close` would leave, but filled only when it is looked at: the verifier's last use.

        `None` means that the cache of the call holds everything already.
        """
        return None

    def close(self) -> None:
        """Leave only kept entries in the cache, in stock layers: the caller may reuse it.

        If stock `generate` was interrupted in the prompt, its entries stay.
        """
        if not self._is_unsettled:
            crop_to(self.forward.cache, self.length)
        restore_stock_layers(self.forward.cache)


class VerifyingMode(ABC):
    """A way to verify trees: makes the verifier of a call, and says how its costs are measured and kept apart."""

    attention: ClassVar[str | None] = None  # name of its attention implementation; `None` for the target's
    keywords: ClassVar[Mapping[str, Any]] = {}  # keywords of `generate` that ask for it
    is_stock: ClassVar[bool] = True  # whether stock `generate` does its plain decoding

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

        `engine` is the target's, lent to this call; with `None` steps run eagerly. `gives_back` says whether the cache
        of `forward` has to hold all kept entries at the end.
        """
        return self.compose(forward, RowEnds(forward, position_ids, attention_mask), engine, gives_back)

    @abstractmethod
    def compose(self, forward: TargetForward, rows: RowEnds, engine: SlotEngine | None, gives_back: bool) -> Verifier:
        """Make a verifier for these rows."""


Read = Callable[[Tensor, int], tuple[Tensor, Features]]


def read_in_chunks(rows: RowEnds, tokens: Tensor, chunk_size: int | None, read: Read) -> tuple[Tensor, list[Features]]:
    """Read the end `[b, t]` of a prompt in chunks, which extend the rows; return the last logits, and all features.

    `read` takes a chunk and its first position, and returns its last logits and its features.
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
    """Map each kind of layers to the last one with entries in a cache; a layer that shares another's has none."""
    kinds = getattr(forward.target.config.get_text_config(decoder=True), "layer_types", None)
    named = zip(cache.layers, kinds or ["full_attention"] * len(cache.layers), strict=False)
    return {kind: index for index, (layer, kind) in enumerate(named) if getattr(layer, "keys", None) is not None}
