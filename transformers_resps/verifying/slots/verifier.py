"""Verify trees with static cache buffers: combine buffered texts, forwards over trees, and a prompt reader."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from ...tree import DraftTree, Pricing, moved
from ..cache import copied_row, count_tokens, window_of
from ..forward import Features, TargetForward
from ..hybrids import is_recurrent
from ..masks import AttentionPattern, additive
from ..returned import UnreadDynamicCache
from ..rows import RowEnds
from ..verifier import TargetEntries, Verifier, VerifyingMode, layers_by_kind
from .buffers import SlotBuffers, filled
from .engine import SlotEngine
from .prompts import PartReader, reads_compiled
from .steps import RoundedSteps, SlotSteps, VerifyingSteps
from .texts import SlotTexts, windowed, with_rows


# (last tokens `[b, t]` of a prompt, chunk size) -> results of `Verifier.prefill`; fills the static cache buffers.
ReadPrompt = Callable[[Tensor, int | None], tuple[Tensor, list[Features]]]


class SlotVerifier(Verifier):
    """Verifies trees with static cache buffers, in which token i of a text has position (slot) i.

    The function `read` runs the target over prompts and writes their keys and values to the buffers. Without it, the
    prefill fills the cache of `forward`, which is then copied to the buffers. With `gives_back`, `close` copies the
    buffers back to that cache.
    """

    def __init__(
        self,
        forward: TargetForward,
        texts: SlotTexts,
        steps: VerifyingSteps,
        engine: SlotEngine | None,
        read: ReadPrompt | None,
        gives_back: bool,
    ) -> None:
        super().__init__(forward, texts.rows)
        self._texts, self._steps, self._engine, self._read = texts, steps, engine, read
        self._gives_back = gives_back
        self.is_compiled = engine is not None and not engine.is_broken
        if engine is not None and self.is_compiled and not is_recurrent(forward.target):
            self.rounded = RoundedSteps(forward, texts, engine)

    @property
    def pricing(self) -> Pricing:
        return self._steps.pricing

    def prefill(
        self, tokens: Tensor, chunk_size: int | None = None, **options: int | Tensor
    ) -> tuple[Tensor, list[Features]]:
        """See `Verifier.prefill`. If the verifier has a function `read`, only the last token's logits are returned."""
        if self._read is None:
            return super().prefill(tokens, chunk_size, **options)
        self.start(len(tokens))
        return self._read(tokens, chunk_size)

    def _begin_steps(self) -> None:
        self._steps.begin(self.forward.cache)
        self._texts.begin(self.forward.cache)
        self.reads_paths = self._steps.states is not None

    def verify(self, tree: DraftTree) -> tuple[Tensor, Features]:
        """See `Verifier.verify`. Results of padding rows and padding nodes are removed."""
        logits, features = self._steps.verify(tree)
        rows, count = tree.tokens.shape
        parts = [logits, *features.caught.values()]
        if any(part.shape[:2] != (rows, count) for part in parts):
            logits, *states = [part[:rows, :count] for part in parts]
            features = Features(features.layers, dict(zip(features.caught, states, strict=True)))
        return logits, features

    def take_compile_seconds(self) -> float:
        return 0.0 if self._engine is None else self._engine.take_compile_seconds()

    def undo(self) -> None:
        """Do nothing, because the next tree overwrites the newest one."""

    def keep(self, path: Tensor, paths: list[list[int]]) -> None:
        path = with_rows(path, self._texts.count)
        if self._steps.states is not None:
            self._steps.states.advance(path)
        self._texts.keep(path, paths)

    def keep_rows(self, rows: list[int]) -> None:
        kept = self._texts.keep_rows(rows)
        if self._steps.states is not None:
            self._steps.states.keep_rows(kept)

    def _row_cache(self, row: int, length: int) -> Cache:
        if not self._texts.count:
            return super()._row_cache(row, length)
        cache = copied_row(self.forward.cache, 0, 0)
        self._give_back(cache, slice(row, row + 1), length)
        return cache

    def _give_back(self, cache: Cache, rows: slice, length: int) -> None:
        self._texts.give_back(cache, rows, length)
        states = self._steps.states
        if states is not None:
            states.kinds.give_back(states.tensors, cache, rows)
            count_tokens(cache, length)

    def unread_cache(self) -> Cache | None:
        """See `Verifier.unread_cache`. A cache that is not read is filled before a call overwrites the buffers."""
        if not self._texts.count or not self.length or not self.rows.slots.is_even:
            return None
        cache, length, rows = self.forward.cache, self.length, slice(0, len(self.rows))
        mode = torch.is_inference_mode_enabled()  # the mode of this call, since the cache may be read in another

        def make() -> Cache:
            with torch.inference_mode(mode):
                self._give_back(cache, rows, length)
            return cache

        unread = UnreadDynamicCache(make)
        self._texts.buffers.lend(unread)
        self._gives_back = False
        return unread

    def close(self) -> None:
        """See `Verifier.close`. With `gives_back`, copy the buffers to the cache, if all rows have the same length."""
        if self._gives_back and self._texts.count and self.length and self.rows.slots.is_even:
            self._give_back(self.forward.cache, slice(0, len(self.rows)), self.length)
        super().close()

    def target_entries(self) -> TargetEntries:
        texts, rows, device = self._texts, len(self.rows), self.device
        size = windowed(max(texts.places))
        ends, planes = torch.tensor(texts.places)[:, None], torch.tensor(self.rows.roots)  # [b, planes]
        if device.type != "cpu":
            ends, planes = moved([ends, planes], device)
        slots = torch.arange(size, device=device)
        seen = texts.visible(size)[:rows] & (slots < ends)
        parts, indices = texts.buffers.parts(), filled(texts.pattern)
        states, masks = {}, {}
        for kind, index in layers_by_kind(self.forward, texts.pattern).items():
            place, pattern = 2 * indices.index(index), AttentionPattern(window_of(texts.pattern, index))
            keys, values = (part[:rows, :, :size] for part in parts[place : place + 2])
            states[kind] = keys, values
            masks[kind] = additive(pattern.mask(ends, slots, seen), keys.dtype)[:, None, None]
        return TargetEntries(states, masks, planes if planes.shape[1] == 1 else planes.t()[..., None])


@dataclass(frozen=True, slots=True)
class SlotMode(VerifyingMode):
    """Makes verifiers that use static cache buffers, and compiled code if the call has an engine."""

    options: dict[str, Any] | None = None  # the caller's options for `torch.compile`
    stock_reads: bool = False  # whether Transformers' `generate` reads the prompt

    def __str__(self) -> str:
        return "slots"

    def compose(
        self, forward: TargetForward, rows: RowEnds, engine: SlotEngine | None, gives_back: bool
    ) -> SlotVerifier:
        engine_reads = engine is not None and not engine.is_broken and self.options is None and not self.stock_reads
        if engine is not None and engine_reads and reads_compiled(forward, rows):
            texts = SlotTexts(rows, engine.buffers, engine.pattern(forward.target))
            steps = SlotSteps(forward, texts, engine, follows_parts=True)
            return SlotVerifier(forward, texts, steps, engine, PartReader(forward, texts, steps).read, gives_back)
        texts = SlotTexts(rows, SlotBuffers() if engine is None else engine.buffers, forward.cache)
        steps = SlotSteps(forward, texts, engine, self.options)
        return SlotVerifier(forward, texts, steps, engine, None, gives_back)
