"""The step loop of a `generate` call: draft a tree, verify it, accept tokens, keep their cache entries, repeat."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Literal

import torch
from torch import Tensor

from ..drafting.drafter import Committed, Drafter
from ..drafting.prompt_lookup import LookupDrafter
from ..policies.base import Policy
from ..telemetry import RowCounts, SpeculationReport, StepRecord
from ..tree import CandidatePool, DraftTree, TreeShape
from ..verifying.forward import Features, wait_for
from ..verifying.returned import EndedRow
from ..verifying.verifier import Verifier
from .acceptance import Acceptance, Picks, accept_batch, read_picks
from .proposal import Proposal, Proposer
from .text import Batch


Phase = Literal["draft", "verify", "rest"]


class StepClock:
    """Measures the seconds of each phase of a step: draft, verify and rest. Tests pass a fake clock as `now`."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now, self._last = now, 0.0
        self.seconds: dict[Phase, float] = {}  # phase -> seconds of this step

    def start(self) -> None:
        self._last, self.seconds = self._now(), {"draft": 0.0, "verify": 0.0, "rest": 0.0}

    def lap(self, phase: Phase) -> None:
        """Add the time since the last `lap` or `start` to a phase."""
        now = self._now()
        self.seconds[phase] += now - self._last
        self._last = now


class TreeDecoding:
    """Decodes a batch with draft trees: the policy chooses their sizes, drafter and lookup propose their nodes.

    Call `prefill`, then `step` until the batch is finished, inside the verifier's `with` block. `batch` holds the
    prompts and gets the new tokens, up to `max_length` in all. `drafter` is `None` if only `lookup` drafts. With
    `keeps_ended`, caches of rows that end before other rows are copied to `ended`. `clock` returns seconds.
    """

    def __init__(
        self,
        verifier: Verifier,
        drafter: Drafter | None,
        lookup: LookupDrafter,
        policy: Policy,
        batch: Batch,
        *,
        max_length: int,
        keeps_ended: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._verifier, self.policy, self.batch = verifier, policy, batch
        self.report = SpeculationReport(batch_size=len(batch))
        self._reads_features = drafter is not None and bool(drafter.feature_layers)
        self._proposer = Proposer(policy, drafter, batch, lookup)
        self._max_length, self._clock = max_length, StepClock(clock)
        self._prompt_seconds = 0.0
        self._keeps_ended, self.ended = keeps_ended, dict[int, EndedRow]()  # row -> cache; in the end all or none
        self._root = batch.newest if batch.length else batch.input_ids.new_zeros(len(batch))  # [b]

    def prefill(self, read: Callable[[Tensor], tuple[Tensor, list[Features]]]) -> None:
        """Run step 0: prefill with `read`, a function like `Verifier.prefill`, and append the first token."""
        self._clock.start()
        logits, features = read(self.batch.input_ids)
        proposal = Proposal(TreeShape.plain(), DraftTree.root_only(self._root))
        picks = self._read_picks(proposal.tree, logits[:, -1:])
        self._clock.lap("verify")
        self._leave_out_compiling()
        acceptance = self._accept(proposal.tree, logits[:, -1:], picks)
        if not self.batch.finished:
            self._read_prompt(features)
        self._drop_finished()
        self._record(proposal, acceptance)

    def step(self) -> None:
        """Draft a tree, verify it in one target forward, accept tokens, keep their cache entries, record the step."""
        self._clock.start()
        proposal = self._propose()
        self._clock.lap("draft")  # no wait for the device: drafting that still runs counts as verifying
        tree = proposal.tree
        logits, features = self._verifier.verify(tree)
        picks = self._read_picks(tree, logits)
        self._clock.lap("verify")
        self._leave_out_compiling()
        with ExitStack() as interrupted:
            reached: list[list[int]] = []
            interrupted.callback(self._keep_reached, reached)
            acceptance = self._accept(tree, logits, picks, reached)
            interrupted.pop_all()
        self._keep(tree, logits, acceptance, features)
        self._drop_finished()
        record = self._record(proposal, acceptance)
        self.policy.on_verified(tree, acceptance.path, acceptance.tokens)
        self.policy.observe(record)

    def _read_prompt(self, features: list[Features]) -> None:
        self._clock.lap("rest")
        states = None
        if self._reads_features:
            states = torch.cat([caught.concatenated() for caught in features], dim=1)
            states = states[:, -self.batch.length :]  # embeddings in the prompt have no token ids
        self._proposer.update(Committed(self.batch.input_ids, states))
        self._proposer.read_prompt()
        if states is not None:
            wait_for(states)
        self._clock.lap("draft")
        self._leave_out_compiling()
        self._prompt_seconds = self._clock.seconds["draft"]

    def _propose(self) -> Proposal:
        root = self._root.to(self._verifier.device)
        step, length = len(self.report.steps) - 1, self._verifier.length + 1  # step 0 of the report is the prefill
        # how many levels the shortest text's limit and the target's positions allow
        levels = min(self._max_length - self.batch.shortest - 1, self._verifier.rows.levels_left)
        pricing = self._verifier.pricing
        return self._proposer.propose(root, step, length, levels + 1, pricing, self._prompt_seconds)

    def _leave_out_compiling(self) -> None:
        """Move seconds of compiling from the step to the report; else the policy would avoid trees of this size."""
        drafting, verifying = self._proposer.take_compile_seconds(), self._verifier.take_compile_seconds()
        self._clock.seconds["draft"] -= drafting
        self._clock.seconds["verify"] -= verifying
        self.report.compile_seconds += drafting + verifying

    def _read_picks(self, tree: DraftTree, logits: Tensor) -> Picks | None:
        """Call `read_picks`; if it returns `None`, wait for the logits, so that the whole forward is timed."""
        picks = read_picks(self.batch, tree, logits)
        if picks is None:
            wait_for(logits)
        return picks

    def _accept(
        self, tree: DraftTree, logits: Tensor, picks: Picks | None, reached: list[list[int]] | None = None
    ) -> Acceptance:
        """Append the tokens that the target picks to the batch; each row's last token becomes its next tree's root."""
        acceptance = accept_batch(self.batch, tree, logits, picks, reached)
        self._root = acceptance.tokens[:, -1]
        return acceptance

    def _keep_reached(self, reached: list[list[int]]) -> None:
        """After an error in `accept`, keep the cache entries of the `reached` nodes, as plain decoding would."""
        if reached:
            paths = [list(path) for path in zip(*reached, strict=True)]
            self._verifier.keep(torch.tensor(paths, device=self._verifier.device), paths)

    def _keep(self, tree: DraftTree, logits: Tensor, acceptance: Acceptance, features: Features) -> None:
        """Keep only accepted nodes in the target's cache; pass their tokens and features to drafter and lookup."""
        path = acceptance.path
        if self._verifier.reads_paths:
            self._clock.lap("rest")
        self._verifier.keep(path, acceptance.paths)
        if self._verifier.reads_paths:
            self._clock.lap("verify")  # the time in which recurrent layers advance their states
        states = None
        if self._reads_features:
            states = features.concatenated()
            if acceptance.is_front:
                states = states[:, : path.shape[1]]
            else:
                states = states.gather(1, path.to(states.device)[..., None].expand(-1, -1, states.shape[-1]))
        self._proposer.update(Committed(acceptance.tokens, states, acceptance.picks, tree, logits))

    def _drop_finished(self) -> None:
        # if all rows end together, the cache itself still holds them
        if self._keeps_ended and not (self.batch.finished and not self.ended and self._verifier.rows.slots.is_even):
            for row, place in self.batch.ended.items():  # before later steps drop or pad these rows
                if row not in self.ended:
                    self.ended[row] = self._verifier.ended_row(place)
        rows = self.batch.drop_finished()
        if rows is None:
            return
        self._root = self._root[rows]
        self._verifier.keep_rows(rows)
        self._proposer.keep_rows(rows)

    def _record(self, proposal: Proposal, acceptance: Acceptance) -> StepRecord:
        self._clock.lap("rest")
        seconds, emitted = self._clock.seconds, acceptance.emitted
        record = StepRecord(
            shape=proposal.shape,
            drafted=proposal.candidates + proposal.looked_up,
            verified=proposal.tree.node_count,
            accepted=RowCounts(max(count - 1, 0) for count in emitted),
            emitted=RowCounts(emitted),
            draft_seconds=seconds["draft"],
            verify_seconds=seconds["verify"],
            drafted_match=self._drafted_match(proposal.pool, acceptance),
            step_seconds=sum(seconds.values()),
            proposed=proposal.proposed(acceptance.paths, acceptance.gained),
            sizes=RowCounts(proposal.tree.row_sizes if self._verifier.pricing.packs_rows else ()),
            pricing=self._verifier.pricing,
        )
        self.report.steps.append(record)
        return record

    def _drafted_match(self, pool: CandidatePool | None, acceptance: Acceptance) -> RowCounts:
        """Count each row's first new tokens that form a path in the drafter's pool; in lockstep, only the minimum."""
        if pool is None or not self.policy.needs_drafted_match:
            return RowCounts([0])
        matches = iter(pool.drafted_match(acceptance.picks))
        if self.batch.in_lockstep:
            return RowCounts([min(count for count, gained in zip(matches, acceptance.gained, strict=True) if gained)])
        return RowCounts(next(matches) if count else 0 for count in acceptance.emitted)
