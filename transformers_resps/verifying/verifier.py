"""The target's side of decoding a batch: read the prompt, then verify a tree and keep its accepted path, and again."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from transformers import Cache

from ..tree import DraftTree, Pricing
from .attention import last_position
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
from .rows import SlotMap


@dataclass(frozen=True, slots=True)
class TargetEntries:
    """What the target keeps of the rows between two steps, without rejected tokens, for a drafter that attends to it.

    Valid until the next forward. Of each kind of layers, as the config names them, or "full_attention" where it names
    none, the last layer that has entries of its own.

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
        position_ids: `[b or 1, s]` of the prompt, or `[planes, b or 1, s]` where a token has several positions; s
            counts what the cache already holds.
        attention_mask: `[b, s]` of the prompt, or `None` when nothing is padded.

    Attributes:
        device: of the trees.
        is_compiled: whether steps run compiled.
        reads_paths: whether the target has recurrent layers, whose states advance along the path that is kept.
        pricing: of the newest step, or of the next one.
        gives_back: whether the cache has to hold what was kept at the end. To be unset where no one will read it.
    """

    is_compiled: bool = False
    reads_paths: bool = False
    pricing: Pricing = Pricing()
    gives_back: bool = True

    def __init__(self, forward: TargetForward, position_ids: Tensor, attention_mask: Tensor | None = None) -> None:
        target, self._cache = forward.target, forward.cache
        self._pattern = self._cache  # tells which layers have entries of their own, and their windows
        # Plain decoding leaves the text where the caller put it, and so do we; the target reads on its own device.
        self.device = position_ids.device if target.device.type == "meta" else target.device
        self._forward = forward
        self._slots = SlotMap(
            None if attention_mask is None else attention_mask.to(self.device), cached_length(self._cache)
        )
        self._positions = position_ids.to(self.device)
        length = self._positions.shape[-1]
        self._go_on_from(self._positions, length)
        self._last_position = last_position(target.config, length + int(max(map(max, self._shifts))))
        self._is_unsettled = False  # whether an interruption leaves the cache at a length that is not known

    def _note_least(self, nodes: int) -> None:
        """Tell the price of the step that is about to run."""
        self.pricing = self.pricing._replace(least_nodes=nodes)

    def __enter__(self) -> Self:
        self._forward.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self.close()
        finally:
            self._forward.__exit__(*exception)

    @property
    def length(self) -> int:
        """Positions of the longest row."""
        return max(self._row_ends)

    @property
    def levels_left(self) -> int:
        """Levels below the root that the target's positions allow."""
        if self._last_position is None:
            return sys.maxsize
        return max(self._last_position - int(max(map(max, self._root_positions))), 0)

    @property
    def _row_ends(self) -> list[int]:
        """Positions of each row."""
        return self._slots.row_ends(len(self._shifts))

    @property
    def _root_positions(self) -> list[list[float]]:
        """The position of each row's coming root, in each plane."""
        return [[end + shift for shift in shifts] for end, shifts in zip(self._row_ends, self._shifts, strict=True)]

    def _go_on_from(self, position_ids: Tensor, length: int) -> None:
        """Let each row go on from its last position, in each plane; that is the position of slot `length - 1`."""
        shifts = position_ids[..., -1] + 1 - length
        self._shift_by(shifts[:, None].tolist() if shifts.dim() == 1 else shifts.t().tolist())

    def _shift_by(self, shifts: list[list[float]]) -> None:
        """Let each row's positions be its slots and so much more: a number for each plane.

        Some targets count in floats, and get floats.
        """
        self._shifts, first = shifts, shifts[0]
        self._shift: float | Tensor = first[0]  # or `[b, 1]`, or `[planes, b, 1]`
        if len(first) > 1:
            self._shift = torch.tensor(shifts, device=self.device).t()[..., None]
        elif any(shift != first for shift in shifts):
            self._shift = torch.tensor(shifts, device=self.device)

    def prefill(self, tokens: Tensor, chunk_size: int | None = None, **options: Any) -> tuple[Tensor, list[Features]]:
        """Read what the cache lacks of the prompt.

        Args:
            tokens: `[b, t]` the end of the prompt, with at least one token that the cache lacks.
            chunk_size: tokens of one forward; `None` reads all at once.
            options: `logits_to_keep` of the target's forward.

        Returns:
            The logits `[b, any, v]` of the last tokens, and the features of each forward.

        Raises:
            ValueError: the target's cache cannot hold a tree.
        """
        tokens, end = tokens.to(self.device), self._positions.shape[-1]
        offset, features = end - tokens.shape[1], []
        for start in range(self.length, end, chunk_size or end):
            stop = min(start + (chunk_size or end), end)
            logits, caught = self._read_chunk(tokens[:, start - offset : stop - offset], start, **options)
            self._slots.extend([stop - start] * len(tokens))
            features.append(caught)
        self._start(len(tokens))
        return logits, features

    def _read_chunk(self, tokens: Tensor, start: int, **options: Any) -> tuple[Tensor, Features]:
        """Read a part `[b, t]` of the prompt, from the position `start` on: its last logits, and the features."""
        stop = start + tokens.shape[1]
        positions = self._positions[..., start:stop]
        record_windows(self._cache)
        outputs, features = self._forward.read(tokens, self._prefix_mask(stop), positions, **options)
        return outputs.logits, features

    def prefill_by(self, run: Callable[[], Any], rows: int) -> tuple[Tensor, list[Features]]:
        """Let stock `generate` read what the cache lacks of the prompt, with images, sounds or embeddings.

        Args:
            run: reads it into the cache; returns the outputs of the last forward.
            rows: of the prompt, b.

        Returns:
            As `prefill`.

        Raises:
            ValueError: the target reads more or fewer positions than the prompt has, or tells its decoder none.
        """
        self._is_unsettled = True
        outputs, features, positions = self._forward.read_by(run)
        length, cached = self._positions.shape[-1], cached_length(self._cache)
        if positions is None or cached != length:
            raise ValueError(
                f"{type(self._forward.target).__name__} reads a prompt of {length} positions as {cached}, or lets its "
                "decoder count them, so the nodes of a tree have no known positions. Call `generate` with "
                "`policy='plain'`."
            )
        self._go_on_from(positions, length)
        record_windows(self._cache)
        self._slots.extend([length - self.length] * rows)
        self._is_unsettled = False
        self._start(rows)
        return outputs.logits, [features]

    def _start(self, rows: int) -> None:
        """Go on from the prompt to trees."""
        check_cache(self._cache)
        self._shift_by(self._shifts * (rows // len(self._shifts)))
        self._begin_steps()

    @abstractmethod
    def _begin_steps(self) -> None:
        """Make the prompt's cache ready for trees."""

    def _prefix_mask(self, length: int) -> Tensor | None:
        """The two-dimensional mask of the first `length` positions, as `generate` makes it; `None` when all count."""
        visible = self._slots.visible(length, self.device)
        return None if visible is None else visible.long()

    def take_compile_seconds(self) -> float:
        """Seconds of compiling forwards since they were last taken."""
        return 0.0

    @abstractmethod
    def verify(self, tree: DraftTree) -> tuple[Tensor, Features]:
        """The logits `[b, n or more, v]` and the features of all nodes, padding last; `keep` or `undo` comes next."""

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
        """What is kept now; the newest tree is settled."""

    def _owners(self) -> dict[str, int]:
        """Kind of layers -> the last of them that has entries of its own."""
        kinds = getattr(self._forward.target.config.get_text_config(decoder=True), "layer_types", None)
        layers: list[Any] = self._pattern.layers
        named = zip(layers, kinds or ["full_attention"] * len(layers), strict=False)
        return {kind: index for index, (layer, kind) in enumerate(named) if getattr(layer, "keys", None) is not None}

    @property
    def is_even(self) -> bool:
        """Whether all rows end at the same position."""
        return len(set(self._row_ends)) == 1

    def ended_row(self, row: int) -> EndedRow:
        """Copies of what is kept of one row."""
        return EndedRow(self._row_cache(row, self._row_ends[row]), torch.tensor(self._root_positions[row]).view(-1))

    def _row_cache(self, row: int, length: int) -> Cache:
        """A copy of one row's cache."""
        return copied_row(self._cache, row, length)

    def unread_cache(self) -> Cache | None:
        """What `close` would leave in the cache, as one that is filled when it is looked at; `None` where the cache
        holds it already. The verifier has no further use then.
        """
        return None

    def close(self) -> None:
        """Leave only what was kept in the cache, in stock layers: the caller may reuse it. Of a prompt that stock
        `generate` has not read to its end, what stock leaves.
        """
        if not self._is_unsettled:
            crop_to(self._cache, self.length)
        restore_stock_layers(self._cache)
