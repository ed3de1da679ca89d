"""Grow the candidates of a step: a model drafts level by level, the policy says when it is enough."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..tree import CandidatePool, DraftTree, TreeShape
from ..verifying.rows import SlotMap
from .cache import DraftCache
from .drafter import Committed, Drafter, DraftRequest
from .engine import DraftEngine
from .levels import LEAST_TOKENS, DepthForward, DraftFunction, LevelForward, PassInputs, at_positions
from .pool_growth import RunLevel, first_level, grow_pool, sprout
from .step_model import Entries, Places, StepModel


MAX_UNREAD = 64  # tokens: their features weigh more than the keys, and one draft would have to read them all


@dataclass(frozen=True, slots=True)
class _Unread:
    """Committed tokens `[b, t]` that the model has not read, and the features `[b, t, F]` they are paired with."""

    tokens: Tensor
    features: Tensor | None
    counts: list[int]

    def of_rows(self, rows: list[int], order: Tensor) -> "_Unread":
        counts = [self.counts[row] for row in rows]
        tokens, features = (
            None if part is None else part[:, : max(counts)].index_select(0, order.to(part.device))
            for part in (self.tokens, self.features)
        )
        assert tokens is not None
        return _Unread(tokens, features, counts)

    def without_first(self, count: int) -> "_Unread":
        """Of rows that gained alike."""
        features = None if self.features is None else self.features[:, count:]
        return _Unread(self.tokens[:, count:], features, [own - count for own in self.counts])


class LevelDrafter(Drafter):
    """Drafts candidate pools with one model, for one call of `generate`.

    Args:
        model: drafts for the call's target.
        batch_size: rows decoded together.
        prompt_mask: `[b, s]`, 0 where the prompt is padding, of the positions that it reads: those whose features it
            gets, or all tokens; `None` when there is none.
        engine: lent to this call; `None` drafts level by level, without compiled code.
        target_entries: what a model with `reads_target` attends to below the newest token.
        feature_layers: see `Drafter`.
    """

    _function: type[DraftFunction] = DraftFunction  # a whole draft

    def __init__(
        self,
        model: StepModel,
        batch_size: int,
        prompt_mask: Tensor | None,
        engine: DraftEngine | None = None,
        target_entries: Callable[[], Entries] | None = None,
        *,
        feature_layers: Sequence[int] = (),
    ) -> None:
        self._model, self._engine, self._target_entries = model, engine, target_entries
        self.feature_layers = feature_layers
        self.proposable_tokens = model.proposable_tokens
        self.most_levels = model.most_levels
        self._device, self._dtype, self._rows = model.device, model.dtype, batch_size
        if engine is None:
            self._cache = DraftCache.empty(model, batch_size)
        else:
            self._cache = engine.cache(batch_size)
        self._places = PlaceWindow(model)
        self._forgotten = 0  # positions before slot 0
        self._slots = SlotMap(None if prompt_mask is None else prompt_mask.to(self._device))
        self._all_shown = torch.ones(1, 1, dtype=torch.bool, device=self._device)
        self._of_newest = torch.tensor([[-torch.inf, 0.0]], device=self._device)  # scores of the last two read
        self._unread: list[_Unread] = []
        self._newest = torch.empty(0)  # [b, 1, h] output of depth 0 at the root
        self._carried: list[Tensor] = []  # [b, 1, h] of each depth, what the next one pairs the next token with
        self._target: Entries | None = None  # what `target_entries` gave since the newest token was observed

    def observe(self, committed: Committed) -> None:
        """As `Drafter.observe`. They are read when a draft needs them or enough of them wait, so plain steps cost the
        model almost nothing.
        """
        tokens, features, rows, _ = committed
        if not self._model.reads_features:
            features = None
        elif features is not None:
            tokens = tokens[:, -features.shape[1] :]  # the first token of a text has nothing before it
        counts = [tokens.shape[1]] * len(tokens) if rows is None else list(map(len, rows))
        self._unread.append(_Unread(tokens, features, counts))
        self._target = None

    def take_compile_seconds(self) -> float:
        return 0.0 if self._engine is None else self._engine.take_compile_seconds()

    def keep_rows(self, rows: list[int]) -> None:
        order = torch.tensor(rows, device=self._device)  # one write
        self._rows = len(rows)
        self._unread = [part.of_rows(rows, order) for part in self._unread]
        self._newest = self._newest.index_select(0, order)
        self._carried = [part.index_select(0, order) for part in self._carried]
        self._slots.keep_rows(rows)
        self._cache.keep_rows(order)
        self._target = None

    def draft(self, input_ids: Tensor, request: DraftRequest) -> CandidatePool:
        """As `Drafter.draft`, by one launch or level by level; see `grow_pool`."""
        shape, goes_on = request.shape, request.goes_on
        # What ranks lower in its level is never kept
        top_k = min(shape.top_k, max(shape.total_tokens - 1, 1), self.proposable_tokens)
        depth = min(shape.depth, self.most_levels or shape.depth)
        if self._engine is not None and self._engine.captures and goes_on is None:
            pool = self._draft_at_once(self._engine, TreeShape(shape.total_tokens, depth, top_k))
            if pool is not None:
                return pool
        self.built_tree = None
        ahead, children = self._read(ahead=max(depth - 1, 1), top_k=top_k)
        if children is None:
            first = sprout(self._model, self._newest, top_k, depth == 1, *self._carried[:1])
        else:
            first = first_level(*children, self._model.feedback(self._newest), depth == 1)
        return grow_pool(first, depth, self._levels(ahead, depth, top_k), goes_on)

    def _levels(self, ahead: "Spots", depth: int, top_k: int) -> RunLevel:
        """What drafts the levels after the first."""
        model, length = self._model, self._slots.length
        if self._compiles and model.depths == 1:
            assert self._engine is not None
            self._cache.reserve(length, tree=(depth - 1) * top_k + 1)
            text = self._slots.visible(length, self._device)
            positions = self._places.numbers(ahead)
            return self._engine.levels(LevelForward(model, self._cache, positions, length, text))
        places = self._places.at(ahead)
        if self._target_entries is not None:
            return LevelForward(model, self._cache, places, length, None, self._of_target())
        text = self._slots.visible(length, self._device)
        if model.depths > 1:
            levels = range(1, depth)
            self._cache.reserve(length, tree=top_k * sum(levels[-1:]))
            text = self._all_shown.expand(1, length) if text is None else text
            texts = [text, *(text & self._from_depth(at, text) for at in levels)]
            return DepthForward(model, self._cache, places, length, texts, self._carried)
        self._cache.reserve(length, tree=(depth - 1) * top_k + 1)
        return LevelForward(model, self._cache, places, length, text)

    def _draft_at_once(self, engine: DraftEngine, shape: TreeShape) -> CandidatePool | None:
        """Read the tokens that wait and draft below them, in one launch. A capture is of one number of them.

        Returns `None` where they are none, or more than a step leaves, or where no layer has a buffer yet.
        """
        most = shape.depth + 1 if engine.captures else MAX_UNREAD
        if not 0 < self._waiting <= most or not self._cache.buffers:
            return None
        self._forget()
        before = self._slots
        self._cache.reserve(before.length + self._waiting, tree=self._tree_room(shape))
        self._slots = copy.copy(before)
        slots = self._slots.take([part.counts for part in self._unread], self._device).expand(self._rows, -1)
        tokens, features = self._joined()
        assert features is not None
        # One tensor twice would be compiled as always one
        positions = slots + self._forgotten if self._forgotten else slots.view_as(slots)
        drafted = self._launch(engine, shape, (features, tokens, slots, positions))
        if drafted is None:
            self._slots = before
            return None
        self._unread.clear()
        self._newest, pool, self.built_tree = drafted
        return pool

    def _launch(
        self, engine: DraftEngine, shape: TreeShape, read: tuple[Tensor, Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, CandidatePool, DraftTree | None] | None:
        """A whole draft; `read` are `NewestPairs` but for the slots that are shown."""
        shown = self._slots.visible(self._cache.capacity, self._device)
        inputs = *read, self._all_shown if shown is None else shown
        return engine.draft(self._function, shape, self._cache, inputs)

    def _tree_room(self, shape: TreeShape) -> int:
        """Of the cache, what a whole draft needs."""
        return (shape.depth - 1) * shape.top_k

    def read(self, at_least: int = 1) -> None:
        """Extend the cache by the tokens committed since it was last read, in one pass, if `at_least` wait.

        Without features the tokens of a text may all wait: who does not ask for a draft pays for no reading.
        """
        if self._waiting >= at_least and (at_least == 1 or self._model.reads_features):
            self._read()

    @property
    def _waiting(self) -> int:
        return sum(part.tokens.shape[1] for part in self._unread)

    def _joined(self) -> tuple[Tensor, Tensor | None]:
        """All tokens that wait and their features, without a copy of a lone part."""
        tokens = [part.tokens.to(self._device) for part in self._unread]
        features = [part.features.to(self._device, self._dtype) for part in self._unread if part.features is not None]
        joined = [parts[0] if len(parts) == 1 else torch.cat(parts, dim=1) for parts in (tokens, features) if parts]
        return joined[0], joined[1] if features else None

    @property
    def _compiles(self) -> bool:
        """Whether passes run compiled, over keys of the model's own."""
        return self._engine is not None and self._engine.compiles and self._target_entries is None

    def _read(self, ahead: int = 0, top_k: int = 0) -> tuple["Spots", tuple[Tensor, Tensor] | None]:
        """Read all tokens that wait. Returns the `ahead` positions after them, and `top_k` children of the newest,
        tokens and scores `[b, 1, k]`, where compiled code gave them.
        """
        self._forget()
        blocks, width = [part.counts for part in self._unread], self._waiting
        start, is_even, forgotten = self._slots.length, self._slots.stays_even(blocks), self._forgotten
        # Rotary attention is relative, so slots serve as positions, padding included, unless a model knows better.
        pads = None if self._model.counts_padding else self._slots.pads
        taken = self._slots.take(blocks, self._device, ahead) if pads is not None or not is_even else None
        every: range | Tensor
        if taken is None:
            for counts in blocks:
                self._slots.extend(counts)
            every = range(forgotten + start, forgotten + self._slots.length + ahead)
        elif pads is not None:
            every = taken - pads
        else:
            every = taken + forgotten if forgotten else taken
        slots = None if taken is None or is_even else taken[:, :width]
        self._cache.reserve(self._slots.length)
        children = None
        if width:
            (tokens, features), here = self._joined(), Spots(every, slice(width))
            self._unread.clear()
            if top_k and self._compiles and features is not None:
                children = self._run_compiled(tokens, features, here, start, slots, top_k)
            if children is None:
                self._run(tokens, features, self._places.at(here), start, slots)
        return Spots(every, slice(width, None)), children

    def _forget(self) -> None:
        """Drop what no row sees after the tokens that wait."""
        if self._model.sliding_window is None:
            return
        ends, length = self._slots.row_ends(self._rows), self._slots.length
        waiting = [part.counts for part in self._unread]
        shortest = min(sum(counts) for counts in zip(ends, *waiting, strict=True))
        unseen = self._model.oldest_seen(self._forgotten + shortest) - self._forgotten
        count = min(unseen, *ends)
        skipped = self._skip(unseen - count) if count == length else 0
        if count + skipped:
            self._cache.forget(count, length)
            self._slots.extend([skipped] * self._rows)
            self._slots.forget(count + skipped)
            self._forgotten += count + skipped

    def _skip(self, count: int) -> int:
        """Drop up to `count` of the first tokens that wait, as far as all rows gained alike. Returns how many."""
        left = count
        for at, part in enumerate(self._unread):
            dropped = min(left, part.counts[0]) if min(part.counts) == max(part.counts) else 0
            self._unread[at] = part.without_first(dropped)
            left -= dropped
            if dropped < part.counts[0]:
                break
        return count - left

    def _run(self, tokens: Tensor, features: Tensor | None, places: Places, start: int, slots: Tensor | None) -> None:
        """Pass over tokens `[b, t]` from slot `start` on, or at each row's own `slots` `[b, t]`, at every depth."""
        model, last = self._model, slice(-1, None)
        if self._target_entries is not None:  # only the root counts
            tokens, places = tokens[:, last], at_positions(places, last)
            features = None if features is None else features[:, last]
        hidden = None if features is None else model.fuse(features)
        carried: list[Tensor] = []
        for depth in range(model.depths):
            if depth:
                assert hidden is not None
                before = self._carried[depth - 1] if self._carried else torch.zeros_like(hidden[:, :1])
                hidden = self._one_later(torch.cat([before, hidden], dim=1), slots)
            wanted = last if model.depths == 1 else slice(None)
            output = model.run(
                depth, tokens, hidden, places, self._entries(start, tokens.shape[1], slots, depth), wanted
            )
            if depth == 0:
                self._newest = output[:, last]
            if model.depths > 1 or model.rereads_target:
                hidden = hidden if model.rereads_target else model.feedback(output)
                assert hidden is not None
                carried.append(hidden[:, last])
        self._carried = carried

    def _run_compiled(
        self, tokens: Tensor, features: Tensor, here: "Spots", start: int, slots: Tensor | None, top_k: int
    ) -> tuple[Tensor, Tensor] | None:
        """As `_run`, compiled; returns the newest token's children, or `None` where it must run as it is."""
        (rows, count), device = tokens.shape, self._device
        if self._model.depths > 1 or count > MAX_UNREAD:
            return None
        end, fuses = max(self._slots.length, LEAST_TOKENS), self._model.fuses_by_weights
        seen = self._seen(end, 0)
        inputs = PassInputs(
            tokens,
            features if fuses else self._model.fuse(features),
            (torch.arange(start, start + count, device=device)[None] if slots is None else slots).expand(rows, -1),
            self._places.numbers(here).expand(rows, -1),
            torch.zeros(rows, count, max(count, LEAST_TOKENS) + 1, dtype=torch.bool, device=device),
            (self._all_shown.expand(1, end) if seen is None else seen).expand(rows, -1),
            self._of_newest.expand(rows, -1),
            torch.eye(max(top_k, LEAST_TOKENS), dtype=torch.bool, device=device),
        )
        assert self._engine is not None
        grown = self._engine.grow(self._cache, inputs, fuses=fuses)
        if grown is None:
            return None
        output, growth = grown
        self._newest = output[:, -1:]
        return growth.tokens[:, -1:, :top_k], growth.scores[:, -1:, :top_k]

    @staticmethod
    def _one_later(states: Tensor, slots: Tensor | None) -> Tensor:
        """Of `[b, 1 + t, h]`, the state before the tokens and those at them, the one before each of the tokens.

        A row that has fewer tokens repeats slots, so the state before is that of the slot before.
        """
        if slots is None:
            return states[:, :-1]
        is_before = slots[:, None, :] == slots[:, :, None] - 1  # [b, t, t]
        places = torch.where(is_before.any(-1), is_before.int().argmax(-1) + 1, 0)
        return states.gather(1, places[..., None].expand(-1, -1, states.shape[-1]))

    def _entries(self, start: int, width: int, slots: Tensor | None, depth: int) -> Entries:
        """What `width` tokens attend to that go to the same slots of each row from `start` on, or to its own."""
        if self._target_entries is not None:
            return self._of_target()
        if slots is None:
            mask = self._mask(start, width, depth)
            return self._cache.attend_from(start, mask, is_causal=mask is None and width > 1)
        end = self._slots.length
        looking = slots[:, -self._queries(width) :, None]
        order = torch.arange(end, device=self._device)
        mask = order <= looking
        seen = self._seen(end, depth)
        if seen is not None:
            mask = mask & seen[:, None]
        if depth:
            mask = mask | (order == looking)  # the first tokens of a text see themselves: never NaN
        return self._cache.attend_at(slots, end, mask[:, None])

    def _of_target(self) -> Entries:
        """What the root and all nodes below it attend to: made once for both."""
        if self._target is None:
            assert self._target_entries is not None
            self._target = self._target_entries()
        return self._target

    def _mask(self, start: int, count: int, depth: int) -> Tensor | None:
        """`[b or 1, 1, q, start + count]` causal, without padding, of the last q tokens that look; `None` where plain
        causal attention will do.
        """
        length, queries = start + count, self._queries(count)
        seen = self._seen(length, depth)
        if seen is None and (start == 0 or queries == 1):
            return None
        causal = torch.ones(queries, length, dtype=torch.bool, device=self._device).tril(length - queries)[None, None]
        if seen is None:
            return causal
        own = torch.eye(queries, dtype=torch.bool, device=self._device)  # a padded row sees itself: never NaN
        return causal & seen[:, None, None] | F.pad(own, (length - queries, 0))

    def _seen(self, length: int, depth: int) -> Tensor | None:
        """`[b or 1, length]` bool, true where a slot holds an entry of this depth that is seen; `None` if all do."""
        seen = self._slots.visible(length, self._device)
        if depth == 0:
            return seen
        seen = self._all_shown.expand(1, length) if seen is None else seen
        return seen & self._from_depth(depth, seen)

    @staticmethod
    def _from_depth(depth: int, seen: Tensor) -> Tensor:
        """Depth k has no entry of a text's first k tokens."""
        return seen.cumsum(-1) > depth

    def _queries(self, count: int) -> int:
        """Of `count` tokens read at once, those that need queries: only the output of the newest is used."""
        return count if self._model.needs_all_queries else 1


_POSITIONS = 256


class Spots(NamedTuple):
    """Positions of a draft: those that are `wanted` of some in a row, or of `[b or 1, t]`."""

    every: range | Tensor
    wanted: slice


class PlaceWindow:
    """The places of many positions in a row, and their numbers, computed once for the many steps that read them."""

    def __init__(self, model: StepModel) -> None:
        self._model = model
        self._known, self._numbers, self._places = range(0), torch.empty(0), Places()
        self._newest: range | Tensor = self._known  # of which others were computed
        self._own = Places()

    def at(self, spots: Spots) -> Places:
        """Those of the spots, `[b or 1, t]`."""
        every, wanted = spots
        if not isinstance(every, Tensor) and self._model.has_fixed_places:
            within = self._within(every, wanted)
            return at_positions(self._places, within)
        if every is not self._newest:  # the last position may decide about all of them
            positions = every if isinstance(every, Tensor) else self._count(every)
            self._newest, self._own = every, self._model.places(positions)
        return at_positions(self._own, wanted)

    def numbers(self, spots: Spots) -> Tensor:
        """The spots' positions, `[b or 1, t]`."""
        every, wanted = spots
        if isinstance(every, Tensor):
            return every[:, wanted]
        within = self._within(every, wanted)
        return self._numbers[:, within]

    def _within(self, every: range, wanted: slice) -> slice:
        """Where positions in a row are among the known ones."""
        if not self._known or every.start < self._known.start or every.stop > self._known.stop:
            self._known = range(every.start, max(every.stop, every.start + _POSITIONS))
            self._numbers = self._count(self._known)
            self._places = self._model.places(self._numbers)
        part = every[wanted]
        return slice(part.start - self._known.start, part.stop - self._known.start)

    def _count(self, every: range) -> Tensor:
        return torch.arange(every.start, every.stop, device=self._model.device)[None]
