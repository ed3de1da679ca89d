"""The step loop: draft, verify, accept, keep; until the text is finished.

One `TreeDecoding` lives for one call of `generate`.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from ..drafting.engine import DraftEngine
from ..drafting.head_drafter import TreeCandidateGenerator
from ..heads import BoundHead
from ..policies import Policy
from ..telemetry import RowCounts, SpeculationReport, StepRecord
from ..tree import CandidatePool, DraftTree
from ..verifying.forward import Features, wait_for
from ..verifying.rows import leading_pads
from ..verifying.verifier import Verifier
from .acceptance import Acceptance
from .batch import Batch
from .proposal import Proposal, Proposer


class TreeDecoding:
    """Decodes one batch with a head and a policy.

    Args:
        verifier: the target's side, open.
        bound: the head that drafts; `None` to draft by lookup alone.
        policy: decides.
        batch: starts as the prompts and gains the answers.
        attention_mask: `[b, s]` of the prompt, or `None` when nothing is padded; s counts what the cache holds, which
            the batch may lack.
        max_length: positions a text may reach.
        draft_engine: lent to this call; `None` drafts without compiled code.
        clock: seconds; tests pass a fake one.
    """

    def __init__(
        self,
        verifier: Verifier,
        bound: BoundHead | None,
        policy: Policy,
        batch: Batch,
        *,
        attention_mask: Tensor | None,
        max_length: int,
        draft_engine: DraftEngine | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._verifier, self.policy, self.batch = verifier, policy, batch
        self.report = SpeculationReport(batch_size=len(batch))
        # The features of cached positions are gone: the head's own text starts after them.
        unread = None if attention_mask is None else attention_mask[:, verifier.length :]
        self._drafter = None if bound is None else TreeCandidateGenerator(bound, len(batch), unread, draft_engine)
        known = None if attention_mask is None else attention_mask[:, -batch.length :]
        pads = [0] * len(batch) if known is None else leading_pads(known)
        self._proposer = Proposer(policy, self._drafter, batch, pads, reads_paths=verifier.reads_paths)
        self._draft_engine, self._max_length, self._clock = draft_engine, max_length, clock
        self._prompt_seconds = 0.0
        self._root = batch.newest  # [b]

    def prefill(self, chunk_size: int | None, logits_to_keep: dict[str, int]) -> None:
        """Read the prompt, in chunks if asked, and commit the first token: step 0 of the report."""
        started = self._clock()
        logits, features = self._verifier.prefill(self.batch.input_ids, chunk_size, **logits_to_keep)
        proposal = Proposal.plain(self.batch.newest)
        acceptance, verified = self._accept(proposal.tree, logits[:, -1:])
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
        """Observe, choose and draft; verify; accept; keep; record. It takes one forward of the target."""
        started = self._clock()
        proposal = self._propose()
        tree = proposal.tree
        started += self._compile(tree)
        drafted = self._clock()
        logits, features = self._verifier.verify(tree)
        acceptance, verified = self._accept(tree, logits)
        verified += self._keep(tree, acceptance, features)
        self._drop_finished()
        seconds = (drafted - started, verified - drafted)
        record = self._record(proposal, acceptance, started, seconds)
        self.policy.on_verified(tree, acceptance.path, acceptance.tokens)
        self.policy.observe(record)

    def _propose(self) -> Proposal:
        """Let the policy choose and the drafter draft what this step verifies."""
        root = self._root.to(self._verifier.device)
        step, length = len(self.report.steps) - 1, self._verifier.length + 1
        return self._proposer.propose(root, step, length, self._levels_left() + 1, self._prompt_seconds)

    def _levels_left(self) -> int:
        """Levels below the root that the limit of the shortest text and the target's positions allow."""
        return min(self._max_length - self.batch.shortest - 1, self._verifier.levels_left)

    def _compile(self, tree: DraftTree) -> float:
        """Seconds of compiling drafts and a forward of this size. Charged to a step, no policy would try that size
        again.
        """
        seconds = 0.0 if self._draft_engine is None else self._draft_engine.take_compile_seconds()
        if self._verifier.must_compile(tree):
            started = self._clock()
            logits, _ = self._verifier.verify(tree)
            wait_for(logits)
            self._verifier.undo()
            seconds += self._clock() - started
        self.report.compile_seconds += seconds
        return seconds

    def _accept(self, tree: DraftTree, logits: Tensor) -> tuple[Acceptance, float]:
        """Commit what the target picks. Returns when it had finished as well: reading its picks waits for it."""
        picks = self.batch.read_picks(tree, logits)
        if picks is None:
            wait_for(logits)
        verified = self._clock()
        acceptance = self.batch.accept(tree, logits, picks)
        self._root = acceptance.tokens[:, -1]
        return acceptance, verified

    def _keep(self, tree: DraftTree, acceptance: Acceptance, features: Features) -> float:
        """The target's cache keeps the accepted path; the features of that path go to the head.

        Returns:
            Seconds in which recurrent layers read that path again, which is part of verifying it.
        """
        path, started = acceptance.path, self._clock() if self._verifier.reads_paths else 0.0
        self._verifier.keep(path, acceptance.paths)
        seconds = self._clock() - started if self._verifier.reads_paths else 0.0
        if self._drafter is None:
            return seconds
        states = features.concatenated()
        if acceptance.is_front:
            states = states[:, : path.shape[1]]
        else:
            states = states.gather(1, path.to(states.device)[..., None].expand(-1, -1, states.shape[-1]))
        self._drafter.observe(states, acceptance.tokens, acceptance.counts)
        return seconds

    def _drop_finished(self) -> None:
        """Stop decoding rows that have ended."""
        rows = self.batch.drop_finished()
        if rows is None:
            return
        self._root = self._root[rows]
        self._verifier.keep_rows(rows)
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
        found = iter(pool.drafted_match(acceptance.picks))
        if self.batch.in_lockstep:
            return RowCounts([min(count for count, gained in zip(found, acceptance.gained, strict=True) if gained)])
        return RowCounts(next(found) if count else 0 for count in acceptance.emitted)
