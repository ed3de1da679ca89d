"""The target's side of decoding one batch: prefill, then verify a tree and keep its accepted path, step after step."""

import sys
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ..tree import DraftTree
from .attention import last_position, tree_attention_mask, tree_positions
from .features import Features
from .forward import TargetForward
from .preallocated_cache import preallocate, restore_stock_layers
from .recurrent_mixers import RecurrentMixers
from .slots import SlotMap
from .tree_cache import (
    cached_length,
    check_cache,
    compact,
    compact_ragged,
    crop,
    crop_to,
    has_windows,
    keep_rows,
    record_windows,
)


class TreeVerifier:
    """Owns the target's cache while a batch is decoded, and knows where every row ends.

    Use it in `with`: at the end, even after an interruption, the cache is a stock one and holds only what was kept.

    Args:
        forward: the target's, over the cache to decode with.
        position_ids: `[b or 1, s]` of the prompt; s counts what the cache already holds.
        attention_mask: `[b, s]` of the prompt, or `None` when nothing is padded.
    """

    is_compiled: bool = False  # whether its steps run compiled

    def __init__(self, forward: TargetForward, position_ids: Tensor, attention_mask: Tensor | None = None) -> None:
        target, self._cache = forward.target, forward.cache
        # Plain decoding leaves the text where the caller put it, and so do we; the target reads on its own device.
        self.device = position_ids.device if target.device.type == "meta" else target.device
        self._forward, self._config, self._dtype = forward, target.config, target.dtype
        self._slots = SlotMap(
            None if attention_mask is None else attention_mask.to(self.device), cached_length(self._cache)
        )
        self._positions = position_ids.to(self.device)
        length = self._positions.shape[1]
        self._shift_by((self._positions[:, -1] + 1 - length).tolist())
        self._last_position = last_position(target.config, length + max(self._shifts))
        self._mixers = RecurrentMixers(target, self._cache)
        self._newest_nodes = 0  # nodes of the newest forward, padding included; 0 once it is settled

    @classmethod
    def of(cls, target: PreTrainedModel, prompt_length: int) -> "TreeVerifier":
        """For prompts of one length, without padding and without a head; the cache is a new, dynamic one."""
        cache = DynamicCache(config=target.config.get_text_config(decoder=True))
        return cls(TargetForward(target, None, cache), torch.arange(prompt_length, device=target.device)[None])

    def __enter__(self) -> "TreeVerifier":
        self._forward.__enter__()
        self._mixers.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self.close()
        finally:
            self._mixers.__exit__()
            self._forward.__exit__(*exception)

    @property
    def length(self) -> int:
        """Cached positions of the longest row."""
        return self._slots.length

    @property
    def reads_paths(self) -> bool:
        """Whether the target has recurrent layers, which read each path of a tree, and the accepted one once more."""
        return bool(self._mixers)

    @property
    def levels_left(self) -> int:
        """Levels below the root that the target's positions allow."""
        if self._last_position is None:
            return sys.maxsize
        return self._last_position - max(self._root_positions)

    @property
    def _root_positions(self) -> list[int]:
        """Of each row's coming root."""
        ends = self._slots.row_ends(len(self._shifts))
        return [end + shift for end, shift in zip(ends, self._shifts, strict=True)]

    def _shift_by(self, shifts: list[int]) -> None:
        """Let each row's positions be its slots and so much more."""
        self._shifts = shifts
        is_same = min(shifts) == max(shifts)
        self._shift = shifts[0] if is_same else torch.tensor(shifts, device=self.device)[:, None]

    def prefill(self, tokens: Tensor, chunk_size: int | None = None, **options: int) -> tuple[Tensor, list[Features]]:
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
        tokens, end = tokens.to(self.device), self._positions.shape[1]
        offset, features = end - tokens.shape[1], []
        record_windows(self._cache)
        for start in range(self.length, end, chunk_size or end):
            stop = min(start + (chunk_size or end), end)
            part, mask = tokens[:, start - offset : stop - offset], self._prefix_mask(stop)
            outputs, caught = self._forward.read(part, mask, self._positions[:, start:stop], **options)
            self._slots.extend([stop - start] * len(tokens))
            features.append(caught)
        check_cache(self._cache)
        self._shift_by(self._shifts * (len(tokens) // len(self._shifts)))
        self._begin_steps()
        return outputs.logits, features

    def _begin_steps(self) -> None:
        """Make the prompt's cache ready for trees."""
        preallocate(self._cache)

    def must_compile(self, tree: DraftTree) -> bool:
        """Whether the coming forward, the first of its kind, takes longer than all that follow."""
        return False

    def verify(self, tree: DraftTree) -> tuple[Tensor, Features]:
        """The logits `[b, n or more, v]` and the features of all nodes, padding last; `keep` or `undo` comes next.

        A lone root gets plain decoding's mask.
        """
        ends = None if self._slots.is_even else self._slots.ends(tree.tokens.device)
        if tree.node_count == 1 and (ends is None or not has_windows(self._cache)):
            mask: Any = self._prefix_mask(self.length + 1)
        else:
            prefix_mask = self._prefix_mask(self.length)
            mask = tree_attention_mask(self._config, self._cache, prefix_mask, tree, self._dtype, ends)
        positions = tree_positions(tree, (self.length if ends is None else ends) + self._shift)
        with self._mixers.reading(tree):
            outputs, features = self._forward.verify(tree.tokens, mask, positions)
        self._newest_nodes = tree.node_count
        return outputs.logits, features

    def undo(self) -> None:
        """Forget the newest tree."""
        crop(self._cache, self._newest_nodes)
        self._mixers.drop()
        self._newest_nodes = 0

    def keep(self, path: Tensor, paths: list[list[int]]) -> None:
        """Keep the accepted nodes of the newest tree, and forget its others.

        Args:
            path: `[b, m]` node indices, ascending, the root first; a row that keeps fewer repeats its last.
            paths: the same on the host, without repetitions.
        """
        self._mixers.keep(path, paths)
        counts = list(map(len, paths))
        if self._slots.stays_even([counts]):
            is_front = paths == [list(range(counts[0]))] * len(paths)
            compact(self._cache, path, self._newest_nodes, is_front=is_front)
            self._slots.extend(counts)
        else:
            slots = self._slots.take([counts], path.device)
            compact_ragged(self._cache, path, self._newest_nodes, slots, self.length)
        self._newest_nodes = 0

    def keep_rows(self, rows: list[int]) -> None:
        """Decode these rows only, from now on."""
        self._slots.keep_rows(rows)
        keep_rows(self._cache, rows, self.length)
        self._shift_by([self._shifts[row] for row in rows])

    def close(self) -> None:
        """Leave only what was kept in the cache, in stock layers: the caller may reuse it.

        A lone root that was verified stays, as after an interrupted plain step: no state can forget it.
        """
        if self._mixers and self._newest_nodes == 1:
            self._slots.extend([1] * len(self._shifts))
            crop(self._cache, 0)
        crop_to(self._cache, self.length)
        restore_stock_layers(self._cache)

    def _prefix_mask(self, length: int) -> Tensor | None:
        """The two-dimensional mask of the first `length` positions, as `generate` makes it; `None` when all count."""
        visible = self._slots.visible(length, self.device)
        return None if visible is None else visible.long()
