"""The step loop: draft, verify, accept, keep; until the text is finished.

One `TreeDecoding` lives for one call of `generate`.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from ..drafting.candidate_generator import TreeCandidateGenerator
from ..head import BoundHead
from ..policy import Policy
from ..target.attention import last_position, tree_attention_mask, tree_positions
from ..target.features import Features
from ..target.forward import TargetForward, wait_for
from ..target.preallocated_cache import make_room, settle
from ..target.slots import SlotMap, leading_pads
from ..target.tree_cache import (
    cached_length,
    check_cache,
    compact,
    compact_ragged,
    crop_to,
    has_windows,
    keep_rows,
)
from ..telemetry import RowCounts, SpeculationReport, StepRecord
from ..tree import CandidatePool, DraftTree
from .acceptance import Acceptance
from .batch import Batch
from .proposal import Proposal, Proposer


class TreeDecoding:
    """Decodes one batch with a head and a policy.

    Args:
        target: verifies.
        head: drafts; `None` to draft by lookup alone.
        policy: decides.
        batch: starts as the prompts and gains the answers.
        cache: the target's, empty or with the first positions of the prompt.
        attention_mask: `[b, s]` of the prompt, or `None` when nothing is padded.
        position_ids: `[b or 1, s]` of the prompt; s counts what the cache holds, even if the batch starts after it.
        forward: the target's, with the features that the head reads; open.
        max_length: positions a text may reach.
        clock: seconds; tests pass a fake one.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        head: BoundHead | None,
        policy: Policy,
        batch: Batch,
        *,
        cache: Cache,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        forward: TargetForward,
        max_length: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.target, self.policy, self.batch, self.cache = target, policy, batch, cache
        batch_size = len(batch)
        # Plain decoding leaves the text where the caller put it, and so do we; the target reads on its own device.
        device = position_ids.device if target.device.type == "meta" else target.device
        attention_mask = None if attention_mask is None else attention_mask.to(device)
        position_ids = position_ids.to(device)
        self.report = SpeculationReport(batch_size=batch_size)
        self._past = past = cached_length(cache)
        self._forward, self._buckets = forward, forward.buckets
        # The features of cached positions are gone: the head's own text starts after them.
        unread = None if attention_mask is None else attention_mask[:, past:]
        self._drafter = None if head is None else TreeCandidateGenerator(head, batch_size, unread)
        known = None if attention_mask is None else attention_mask[:, -batch.length :]
        pads = [0] * batch_size if known is None else leading_pads(known)
        self._proposer = Proposer(policy, self._drafter, batch, pads)
        self._prefix = SlotMap(attention_mask)
        self._prefix.extend([past] * batch_size)
        self._positions = position_ids
        self._root_positions = position_ids[:, -1].expand(batch_size) + 1  # [b]
        self._max_length = max_length
        self._last_position = last_position(target.config, int(self._root_positions.max()))
        self._prompt_seconds = 0.0
        self._clock = clock

    def prefill(self, chunk_size: int | None, logits_to_keep: dict[str, int]) -> None:
        """Run what the cache lacks of the prompt through the target, in chunks if asked, and commit the first token:
        step 0 of the report.
        """
        started = self._clock()
        prompt = self.batch.input_ids.to(self._positions.device)
        past, length = self._past, self._positions.shape[1]
        offset = length - prompt.shape[1]
        features = []
        self.cache.activate_past_recording()
        for start in range(past, length, chunk_size or length):
            end = min(start + (chunk_size or length), length)
            outputs, caught = self._forward.read(
                prompt[:, start - offset : end - offset],
                self._mask(end),
                self._positions[:, start:end],
                **logits_to_keep,
            )
            self._prefix.extend([end - start] * len(prompt))
            features.append(caught)
        check_cache(self.cache)
        make_room(self.cache)
        wait_for(outputs.logits)
        verified = self._clock()
        proposal = Proposal.plain(prompt[:, -1])
        acceptance = self.batch.accept(proposal.tree, outputs.logits[:, -1:])
        if not self.batch.finished:
            self._read_prompt(features)
        self._drop_finished()
        self._record(proposal, acceptance, started, (self._prompt_seconds, verified - started))

    def _read_prompt(self, features: list[Features]) -> None:
        """Head and lookup read the prompt, before any step; this is what drafting costs even if nothing is drafted."""
        started = self._clock()
        if self._drafter is not None:
            states = torch.cat([caught.concatenated() for caught in features], dim=1)
            self._drafter.observe(states, self.batch.input_ids[:, -states.shape[1] :])
        self._proposer.read_prompt()
        if self._drafter is not None:
            wait_for(states)
        self._prompt_seconds = self._clock() - started

    def step(self) -> None:
        """One target forward and the work around it."""
        started = self._clock()
        proposal = self._propose()
        tree = proposal.tree
        started += self._compile(tree)
        drafted = self._clock()
        outputs, features = self._verify(tree)
        wait_for(outputs.logits)
        verified = self._clock()
        acceptance = self.batch.accept(tree, outputs.logits)
        self._keep(tree, acceptance, features)
        self._drop_finished()
        seconds = (drafted - started, verified - drafted)
        record = self._record(proposal, acceptance, started, seconds)
        self.policy.on_verified(tree, acceptance.path, acceptance.tokens)
        self.policy.observe(record)

    def close(self) -> None:
        """Leave only what was kept in the cache, even if a step was interrupted: the caller may reuse the cache."""
        crop_to(self.cache, self._prefix.length)
        settle(self.cache)

    def _propose(self) -> Proposal:
        root = self.batch.newest.to(self._root_positions.device)
        step, length = len(self.report.steps) - 1, self._prefix.length
        proposal = self._proposer.propose(root, step, length + 1, self._room() + 1, self._prompt_seconds)
        return replace(proposal, tree=self._buckets.fitted(proposal.tree, length))

    def _room(self) -> int:
        """Levels below the root that the limit of the shortest text and the target's positions allow."""
        room = self._max_length - self.batch.shortest - 1
        if self._last_position is not None:
            room = min(room, self._last_position - int(self._root_positions.max()))
        return room

    def _compile(self, tree: DraftTree) -> float:
        """Seconds of compiling a forward of this size. Charged to a step, no policy would try that size again."""
        if not self._forward.is_first(tree):
            return 0.0
        started = self._clock()
        outputs, _ = self._verify(tree)
        wait_for(outputs.logits)
        self._forward.undo(tree)
        return self._clock() - started

    def _verify(self, tree: DraftTree) -> tuple[Any, Features]:
        """The target's forward over all nodes; a lone root with plain decoding's mask, but in static caches."""
        tree = self._buckets.padded(tree)
        ends = None if self._prefix.is_even else self._prefix.ends(tree.tokens.device)
        if self._buckets.slots is None and tree.node_count == 1 and (ends is None or not has_windows(self.cache)):
            mask: Any = self._mask(self._prefix.length + 1)
        else:
            prefix_mask = self._mask(self._prefix.length)
            mask = tree_attention_mask(self.target.config, self.cache, prefix_mask, tree, self.target.dtype, ends)
        return self._forward.verify(tree.tokens, mask, tree_positions(tree, self._root_positions))

    def _mask(self, length: int) -> Tensor | None:
        """The two-dimensional mask of the first `length` positions, as `generate` makes it; `None` when all count."""
        visible = self._prefix.visible(length, self._root_positions.device)
        return None if visible is None else visible.long()

    def _keep(self, tree: DraftTree, acceptance: Acceptance, features: Features) -> None:
        """The target's cache keeps the accepted path; the features of that path go to the head."""
        path, counts = acceptance.path, acceptance.counts
        if self._prefix.is_even and min(counts) == max(counts):
            compact(self.cache, path, self._buckets.rows(tree))
            self._prefix.extend(counts)
            self._root_positions = self._root_positions + counts[0]
        else:
            slots = self._prefix.slots(counts, path.device)
            self._prefix.extend(counts)
            compact_ragged(self.cache, path, tree.node_count, slots, self._prefix.length)
            self._root_positions = self._root_positions + torch.tensor(counts, device=path.device)
        if self._drafter is None:
            return
        states = features.concatenated()
        if tree.node_count > 1:
            states = states.gather(1, path.to(states.device)[..., None].expand(-1, -1, states.shape[-1]))
        self._drafter.observe(states, acceptance.tokens, counts)

    def _drop_finished(self) -> None:
        """Stop decoding rows that have ended."""
        rows = self.batch.drop_finished()
        if rows is None:
            return
        self._prefix.keep_rows(rows)
        keep_rows(self.cache, rows, self._prefix.length)
        self._root_positions = self._root_positions[rows]
        self._proposer.keep_rows(rows)

    def _record(
        self, proposal: Proposal, acceptance: Acceptance, started: float, seconds: tuple[float, float]
    ) -> StepRecord:
        """Note a step that began at `started`; `seconds` are those of drafting and verifying."""
        emitted = acceptance.emitted
        record = StepRecord(
            shape=proposal.shape,
            drafted=proposal.candidates + proposal.looked_up,
            verified=proposal.tree.node_count,
            accepted=RowCounts(max(count - 1, 0) for count in emitted),
            emitted=RowCounts(emitted),
            draft_seconds=seconds[0],
            verify_seconds=seconds[1],
            drafted_match=self._drafted_match(proposal.pool, acceptance),
            step_seconds=self._clock() - started,
        )
        self.report.steps.append(record)
        return record

    def _drafted_match(self, pool: CandidatePool | None, acceptance: Acceptance) -> RowCounts:
        """Tokens of the step that the pool holds as a path: of each row that advances on its own, of rows in lockstep
        the least. A finished row, which writes padding, is no evidence.
        """
        if pool is None or not self.policy.needs_drafted_match:
            return RowCounts([0])
        found = map(min, pool.drafted_match(acceptance.tokens), acceptance.counts)
        if self.batch.in_lockstep:
            return RowCounts([min(count for count, gained in zip(found, acceptance.gained, strict=True) if gained)])
        return RowCounts(next(found) if count else 0 for count in acceptance.emitted)
