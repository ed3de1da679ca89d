"""Grow the candidates of a step: the head drafts level by level, the policy says when it is enough."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation.candidate_generator import CandidateGenerator

from ..compat import SELECTS_HIDDEN_STATES
from ..heads import Attend, BoundHead, HeadCache, Rope, RopeWindow
from ..policies.base import Level, Policy, wants_level
from ..policies.fixed import FixedPolicy
from ..tree import CandidatePool, TreeShape
from ..verifying.forward import Features
from ..verifying.rows import SlotMap
from .drafter import Drafter
from .engine import DraftEngine
from .levels import LevelForward
from .pool_growth import grow_pool, sprout


MAX_UNREAD = 64  # pairs: their features weigh more than the head's keys, and one draft would have to read them all


@dataclass(frozen=True, slots=True)
class _Pairs:
    """Committed positions that the head has not read: features `[b, t, F]`, tokens `[b, t]`."""

    features: Tensor
    tokens: Tensor
    counts: list[int]

    def of_rows(self, rows: list[int], order: Tensor) -> "_Pairs":
        counts = [self.counts[row] for row in rows]
        parts = [part[:, : max(counts)] for part in (self.features, self.tokens)]
        features, tokens = (part.index_select(0, order.to(part.device)) for part in parts)
        return _Pairs(features, tokens, counts)


class TreeCandidateGenerator(Drafter, CandidateGenerator):
    """Drafts candidate pools with one head, for one call of `generate`.

    Our loop asks it for trees. Transformers' own loop of assisted decoding can run with it as well, and gets chains.

    Args:
        bound: the head, with its target's embedding and output rows.
        batch_size: rows decoded together.
        prompt_mask: `[b, s]`, 0 where the prompt is padding; `None` when there is none.
        engine: lent to this call; `None` drafts level by level, without compiled code.
    """

    requires_model_outputs = True  # of Transformers' loop, which passes the target's hidden states

    def __init__(
        self, bound: BoundHead, batch_size: int, prompt_mask: Tensor | None, engine: DraftEngine | None = None
    ) -> None:
        self._bound = bound
        module = bound.head
        self._layers = module.config.feature_layers or []
        self.model_kwargs_overrides = {"output_hidden_states": self._layers if SELECTS_HIDDEN_STATES else True}
        self.proposable_tokens = module.config.proposable_tokens
        self._device, self._dtype = module.device, module.dtype
        self._engine = engine
        if engine is None:
            self._cache = HeadCache.empty(module.config, batch_size, self._dtype, self._device)
        else:
            self._cache = engine.cache(batch_size)
        self._ropes = RopeWindow(module)
        self._slots = SlotMap(None if prompt_mask is None else prompt_mask.to(self._device))
        self._all_shown = torch.ones(1, 1, dtype=torch.bool, device=self._device)
        self._unread: list[_Pairs] = []
        self._newest = torch.empty(0)  # [b, 1, h] output at the last true pair, before the final norm
        self.newest_features = torch.empty(0)  # [b, F]

    def observe(self, features: Tensor, tokens: Tensor, counts: list[int] | None = None) -> None:
        """As `Drafter.observe`. They are read when a draft needs them or enough of them wait, so plain steps cost the
        head almost nothing.
        """
        self._unread.append(_Pairs(features, tokens, counts or [tokens.shape[1]] * len(tokens)))
        self.newest_features = features[:, -1]

    def take_compile_seconds(self) -> float:
        return 0.0 if self._engine is None else self._engine.take_compile_seconds()

    def keep_rows(self, rows: list[int]) -> None:
        order = torch.tensor(rows, device=self._device)  # one write
        self._unread = [pairs.of_rows(rows, order) for pairs in self._unread]
        self.newest_features = self.newest_features.index_select(0, order.to(self.newest_features.device))
        self._newest = self._newest.index_select(0, order)
        self._slots.keep_rows(rows)
        self._cache.keep_rows(order)

    def draft(self, shape: TreeShape, policy: Policy) -> CandidatePool:
        """As `Drafter.draft`, by one launch or level by level; see `grow_pool`."""
        # What ranks lower in its level is never kept
        top_k = min(shape.top_k, max(shape.total_tokens - 1, 1), self.proposable_tokens)
        if self._engine is not None and self._engine.captures and not policy.grows:
            pool = self._draft_at_once(self._engine, TreeShape(shape.total_tokens, shape.depth, top_k))
            if pool is not None:
                return pool
        self.built_tree = None

        def goes_on(depth: int, scores: Tensor) -> bool:
            return not policy.grows or wants_level(policy, Level(depth, scores))

        rope, length = self._read(ahead=max(shape.depth - 1, 1)), self._slots.length
        self._cache.reserve(length, tree=(shape.depth - 1) * top_k + 1)
        levels = LevelForward(self._bound, self._cache, rope, length, self._slots.visible(length, self._device))
        run = levels if self._engine is None else self._engine.levels(levels)
        return grow_pool(sprout(self._bound, self._newest, top_k, shape.depth == 1), shape.depth, run, goes_on)

    def _draft_at_once(self, engine: DraftEngine, shape: TreeShape) -> CandidatePool | None:
        """Read the pairs that wait and draft below them, in one launch. Each number of pairs is another function.

        Returns `None` where they are none, or more than a step leaves.
        """
        width, device, before = sum(pairs.tokens.shape[1] for pairs in self._unread), self._device, self._slots
        if not 0 < width <= shape.depth + 1:
            return None
        self._cache.reserve(before.length + width, tree=(shape.depth - 1) * shape.top_k)
        self._slots = copy.copy(before)
        slots = self._slots.take([pairs.counts for pairs in self._unread], device).expand(self._cache.rows, -1)
        shown = self._slots.visible(self._cache.capacity, device)
        features = _joined([pairs.features.to(device, self._dtype) for pairs in self._unread])
        tokens = _joined([pairs.tokens.to(device) for pairs in self._unread])
        inputs = features, tokens, slots, self._all_shown if shown is None else shown
        drafted = engine.draft(shape, self._cache, inputs)
        if drafted is None:
            self._slots = before
            return None
        self._unread.clear()
        self._newest, pool, self.built_tree = drafted
        return pool

    def get_candidates(  # type: ignore[override]  # Transformers passes more where `requires_model_outputs`
        self, input_ids: Tensor, *, model_outputs: Any, is_first_iteration: bool, n_last_matches: int, **context: Any
    ) -> tuple[Tensor, None]:
        """The chain that Transformers' loop verifies next: the best path of the head's default tree.

        Args:
            input_ids: `[1, s]` the text so far.
            model_outputs: of the last forward, with hidden states.
            is_first_iteration: the prompt was not read yet; nothing is drafted.
            n_last_matches: tokens of the last chain that were accepted.
            context: anything else that the loop tells.

        Returns:
            `[1, s + m]` the text and the chain, and no logits: the loop then compares tokens.

        Raises:
            ValueError: the head reads the last layer's output, which Transformers gives only after the final norm.
        """
        if is_first_iteration:
            return input_ids, None
        states = model_outputs.hidden_states
        if self._layers[-1] == len(states) - 1:
            raise ValueError(
                f"The head reads hidden state {self._layers[-1]}, the last layer's output, which Transformers gives "
                "only after the final norm. Call `transformers_resps.attach(model)`, and `generate` drafts trees."
            )
        features = Features(self._layers)
        features.caught = {layer: states[layer] for layer in self._layers}
        read = n_last_matches + 1 if self._slots.length or self._unread else input_ids.shape[1] - 1
        self.observe(features.concatenated()[:, :read], input_ids[:, -read:])
        shape = self._bound.head.default_shape
        best = best_path(self.draft(shape, FixedPolicy(shape))).to(input_ids.device)
        return torch.cat([input_ids, best], dim=1), None

    def read(self, at_least: int = 1) -> None:
        """Extend the head's cache by the pairs committed since it was last read, in one pass, if `at_least` wait."""
        if sum(pairs.tokens.shape[1] for pairs in self._unread) >= at_least:
            self._read()

    def _read(self, ahead: int = 0) -> Rope:
        """Read all pairs that wait. Returns the angles of the `ahead` positions after them."""
        blocks, width = [pairs.counts for pairs in self._unread], sum(pairs.tokens.shape[1] for pairs in self._unread)
        start, is_even = self._slots.length, self._slots.stays_even(blocks)
        # Rotary attention is relative, so slots serve as positions, padding included.
        if is_even:
            for counts in blocks:
                self._slots.extend(counts)
            rope = self._ropes.at(start, self._slots.length + ahead)
        else:
            slots = self._slots.take(blocks, self._device, ahead)
            rope = self._bound.head.rope(slots)
        self._cache.reserve(self._slots.length)
        if width:
            features = _joined([pairs.features.to(self._device, self._dtype) for pairs in self._unread])
            tokens = _joined([pairs.tokens.to(self._device) for pairs in self._unread])
            self._unread.clear()
            self._newest = self._bound.run_layers(
                self._bound.fuse(features),
                self._bound.embed(tokens),
                rope.at(slice(width)),
                self._attend_from(start, width) if is_even else self._attend_at(slots[:, :width]),
                wanted=slice(-1, None),
            )
        return rope.at(slice(width, None))

    def _attend_from(self, start: int, width: int) -> Attend:
        """The attention of `width` pairs from the same slot on in each row."""
        mask = self._pair_mask(start, width)
        return self._cache.attend_from(start, mask, is_causal=mask is None and width > 1)

    def _attend_at(self, slots: Tensor) -> Attend:
        """The attention of pairs at each row's own slots, `[b, t]`."""
        end = self._slots.length
        looking = slots[:, -self._queries(slots.shape[1]) :, None]
        causal = torch.arange(end, device=self._device) <= looking
        seen = self._slots.visible(end, self._device)
        mask = causal if seen is None else causal & seen[:, None]
        return self._cache.attend_at(slots, end, mask[:, None])

    def _pair_mask(self, start: int, count: int) -> Tensor | None:
        """`[b or 1, 1, q, start + count]` causal, without padding, of the last q pairs that look; `None` where plain
        causal attention will do.
        """
        length, queries = start + count, self._queries(count)
        seen = self._slots.visible(length, self._device)
        if seen is None and (start == 0 or queries == 1):
            return None
        causal = torch.ones(queries, length, dtype=torch.bool, device=self._device).tril(length - queries)[None, None]
        if seen is None:
            return causal
        own = torch.eye(queries, dtype=torch.bool, device=self._device)  # a padded row sees itself: never NaN
        return causal & seen[:, None, None] | torch.nn.functional.pad(own, (length - queries, 0))

    def _queries(self, count: int) -> int:
        """Of `count` pairs read at once, those that need queries: only the output of the newest is used."""
        return 1 if self._bound.head.config.num_hidden_layers == 1 else count


def _joined(blocks: list[Tensor]) -> Tensor:
    """`[b, t, any]` of several blocks, without a copy of a lone one."""
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)


def best_path(pool: CandidatePool) -> Tensor:
    """Tokens `[1, m]` of the path below the root of which the most are expected to be accepted, in a pool of one row.

    Of a path as many are expected as its nodes' probabilities sum up to.
    """
    parents, probs = pool.parents[0].tolist(), pool.scores[0].exp().tolist()
    expected: list[float] = []
    for parent, prob in zip(parents, probs, strict=True):
        expected.append(prob + (expected[parent] if parent >= 0 else 0.0))
    node, path = max(range(len(expected)), key=expected.__getitem__), list[int]()
    while node >= 0:
        path.insert(0, node)
        node = parents[node]
    return pool.tokens[:, path]
