"""The target's side of decoding a batch: read the prompt, then verify a tree and keep its accepted path, and again."""

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
    """The target's keys and values of the rows between two steps, without rejected tokens, for drafters.

    Valid until the next forward. Of each kind of layers (`config.layer_types`; "full_attention" where the config names
    none) they are those of its last layer with keys of its own.

    Attributes:
        states: kind -> keys and values, `[b, kv heads, s, hd]` each.
        masks: kind -> `[b, 1, 1, s]`, 0 where the coming root may look, else the dtype's minimum. It has no entry yet.
        positions: `[b or 1, 1]` of the coming roots, or `[planes, b or 1, 1]`.
    """

    states: dict[str, tuple[Tensor, Tensor]]
    masks: dict[str, Tensor]
    positions: Tensor


class Verifier(ABC):
    """Owns the target's cache while a batch is decoded, and knows where every row ends.

    Use it in `with`: at the end, even after an interruption, the cache is a stock one and holds only what was kept.

    Args:
        forward: the target's, over the cache to decode with.
        rows: where each row ends.

    Attributes:
        is_compiled: whether steps run compiled.
        reads_paths: whether the target has recurrent layers, whose states advance along the path that is kept.
    """

    is_compiled: bool = False
    reads_paths: bool = False

    def __init__(self, forward: TargetForward, rows: RowEnds) -> None:
        self.forward, self.rows = forward, rows
        self._is_unsettled = False  # whether an interruption leaves the cache at a length that is not known

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
        """The price of the newest step, or of the next one."""
        return Pricing()

    @property
    def device(self) -> torch.device:
        """Where trees have to be."""
        return self.rows.device

    def prefill(
        self, tokens: Tensor, chunk_size: int | None = None, **options: int | Tensor
    ) -> tuple[Tensor, list[Features]]:
        """Read the tokens of the prompt that the cache lacks.

        Args:
            tokens: `[b, t]` the end of the prompt, with at least one token that the cache lacks.
            chunk_size: tokens of one forward; `None` reads all at once.
            options: `logits_to_keep` of the target's forward.

        Returns:
            The logits `[b, any, v]` of the last tokens, and the features of each forward.

        Raises:
            ValueError: the target's cache cannot hold a tree.
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

        Args:
            run: reads it into the cache; returns the outputs of the last forward.
            rows: of the prompt, b.

        Returns:
            The same as `prefill`.

        Raises:
            ValueError: the target reads more or fewer positions than the prompt has, or tells its decoder none.
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
        """Make a prompt of so many rows ready for trees."""
        check_cache(self.forward.cache)
        self.rows.expand(rows)
        self._begin_steps()

    @abstractmethod
    def _begin_steps(self) -> None: ...

    def take_compile_seconds(self) -> float:
        """Seconds of compiling forwards since they were last taken."""
        return 0.0

    @abstractmethod
    def verify(self, tree: DraftTree) -> tuple[Tensor, Features]:
        """Compute the logits `[b, n or more, v]` and the features of all nodes, padding last; `keep` or `undo` comes
        next.
        """

    @abstractmethod
    def undo(self) -> None:
        """Forget the newest tree."""

    @abstractmethod
    def keep(self, path: Tensor, paths: list[list[int]]) -> None:
        """Keep the accepted nodes of the newest tree, and forget its others.

        Args:
            path: `[b, m]` node indices, ascending, the root first; a row that keeps fewer repeats its last.
            paths: the same on the host, without repetitions.
        """

    @abstractmethod
    def keep_rows(self, rows: list[int]) -> None:
        """Decode these rows only, from now on."""

    @abstractmethod
    def target_entries(self) -> TargetEntries:
        """Hand out the kept keys and values; the newest tree is settled."""

    @property
    def is_even(self) -> bool:
        """Whether all rows end at the same position."""
        return len(set(self.rows.ends)) == 1

    def ended_row(self, row: int) -> EndedRow:
        """Copy what is kept of one row."""
        return EndedRow(self._row_cache(row, self.rows.ends[row]), torch.tensor(self.rows.roots[row]).view(-1))

    def _row_cache(self, row: int, length: int) -> Cache:
        return copied_row(self.forward.cache, row, length)

    def unread_cache(self) -> Cache | None:
        """Return the cache that `close` would leave as one that is filled when it is looked at; `None` where the cache
        of the call holds everything already. The verifier has no further use then.
        """
        return None

    def close(self) -> None:
        """Leave only what was kept in the cache, in stock layers: the caller may reuse it. Where stock `generate` was
        interrupted in the prompt, what stock leaves stays.
        """
        if not self._is_unsettled:
            crop_to(self.forward.cache, self.length)
        restore_stock_layers(self.forward.cache)


class VerifyingMode(ABC):
    """How trees are verified: what tells its figures apart, and the verifier of a call.

    Attributes:
        attention: the name of its own; `None` where it is the target's.
        keywords: of `generate`, that ask for it.
        is_stock: whether stock `generate` decodes plainly in it.
    """

    attention: ClassVar[str | None] = None
    keywords: ClassVar[Mapping[str, Any]] = {}
    is_stock: ClassVar[bool] = True

    def verifier(
        self,
        forward: TargetForward,
        position_ids: Tensor,
        attention_mask: Tensor | None = None,
        engine: SlotEngine | None = None,
        *,
        gives_back: bool = True,
    ) -> Verifier:
        """Make the verifier of one call.

        Args:
            forward: the target's, over the cache to decode with.
            position_ids: of the prompt, see `RowEnds`.
            attention_mask: `[b, s]` of the prompt, or `None` when nothing is padded.
            engine: the target's, lent to this call; with `None` steps run eagerly.
            gives_back: whether the cache has to hold what was kept at the end.
        """
        return self.compose(forward, RowEnds(forward, position_ids, attention_mask), engine, gives_back)

    @abstractmethod
    def compose(self, forward: TargetForward, rows: RowEnds, engine: SlotEngine | None, gives_back: bool) -> Verifier:
        """Make a verifier of rows that end there."""


Read = Callable[[Tensor, int], tuple[Tensor, Features]]


def read_in_chunks(rows: RowEnds, tokens: Tensor, chunk_size: int | None, read: Read) -> tuple[Tensor, list[Features]]:
    """Read the end of a prompt, `[b, t]`, in chunks; after each of them the rows have grown.

    `read` takes a chunk and the position where it starts; returns its last logits and the features. The last chunk's
    logits are returned, and the features of all.
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
    """Kind of layers -> the last of them that has entries of its own in a cache."""
    kinds = getattr(forward.target.config.get_text_config(decoder=True), "layer_types", None)
    named = zip(cache.layers, kinds or ["full_attention"] * len(cache.layers), strict=False)
    return {kind: index for index, (layer, kind) in enumerate(named) if getattr(layer, "keys", None) is not None}
