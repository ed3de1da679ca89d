"""Decodes a recorded text again without its target: the text's next token replaces the target's choice.

Each step runs the code of `generate`. The drafts come from a recording, and a cost model replaces the clock; the
policy's own computation counts as 0 seconds.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ..decoding.proposal import Proposal, Proposer
from ..drafting.drafter import Committed, Drafter, DraftRequest
from ..drafting.prompt_lookup import LookupDrafter
from ..drafting.suffix_memory import SuffixMemory
from ..policies.base import Policy
from ..policies.costs import CostModel
from ..telemetry import RowCounts, SpeculationReport, StepRecord
from ..tree import CandidatePool, Pricing, followed
from .recorded_text import RecordedText


@dataclass(frozen=True, slots=True)
class ReplayedStep:
    """One step of decoding a recorded text again."""

    root: int  # index of the newest token before the step
    proposal: Proposal  # the tree to verify
    path: list[int]  # the tree's nodes that match the text, root first

    @property
    def accepted(self) -> int:
        return len(self.path) - 1


def replay_policy(
    text: RecordedText, policy: Policy, costs: CostModel, memories: Sequence[SuffixMemory] = ()
) -> SpeculationReport:
    """Simulate `policy` on a recorded text; return the report that `generate` would, without a prefill.

    The report's seconds come from `costs`, and its `drafted` counts no looked-up nodes. Lookup also reads `memories`
    of other texts, which are not changed. Raises `ValueError` if the policy chooses a shape that was not recorded.
    """
    report = SpeculationReport()
    for step in decode_again(text, policy, RecordedDrafter(text), memories):
        record = _record(text, step, costs)
        policy.observe(record)
        report.steps.append(record)
    return report


def _record(text: RecordedText, step: ReplayedStep, costs: CostModel) -> StepRecord:
    proposal, pool, emitted_count = step.proposal, step.proposal.pool, len(step.path)
    verify = costs.verify_seconds(proposal.tree.node_count, step.root)
    draft, match = 0.0, 0
    if pool is not None:
        draft = costs.draft_seconds(proposal.shape.top_k, int(pool.levels[-1]))
        match = pool.drafted_match(text.input_ids[None, step.root + 1 :][:, :emitted_count].tolist())[0]
    return StepRecord(
        shape=proposal.shape,
        drafted=proposal.candidates,
        verified=proposal.tree.node_count,
        accepted=RowCounts([step.accepted]),
        emitted=RowCounts([emitted_count]),
        draft_seconds=draft,
        verify_seconds=verify,
        step_seconds=draft + verify + costs.overhead,
        drafted_match=RowCounts([match]),
        proposed=proposal.proposed([step.path], [True]),
    )


def decode_again(
    text: RecordedText, policy: Policy, drafter: Drafter, memories: Sequence[SuffixMemory] = ()
) -> Iterator[ReplayedStep]:
    """Decode a text from its output's second token to its end, and yield each step before the next is drafted.

    The caller may call `policy.observe` after each step. The head's drafts come from `drafter`, not from `text.pools`;
    `drafter` must have observed the prompt except its last position.
    """
    proposer = Proposer(policy, drafter, _OneRow(text.input_ids[None]), LookupDrafter([0], memories=memories))
    place = observed = step = 0
    while place < len(text):
        root, left = text.prompt_length + place, len(text) - place
        newest = slice(text.prompt_length + observed if step else 0, root + 1)
        proposer.update(Committed(text.input_ids[None, newest], text.features[None, observed : place + 1]))
        if step == 0:
            proposer.read_prompt()
        room = left + text.spare_room
        proposal = proposer.propose(text.input_ids[root : root + 1], step, root + 1, room, Pricing())
        tree, rest = proposal.tree, text.input_ids[root + 1 : root + left].tolist()
        path = [0, *followed(tree.tokens[0].tolist(), tree.parents[0].tolist(), rest, 0)]
        yield ReplayedStep(root, proposal, path)
        step, observed, place = step + 1, place + 1, place + len(path)


class _OneRow(NamedTuple):
    input_ids: Tensor
    in_lockstep: bool = True
    row_weights: Sequence[float] = (1.0,)


class RecordedDrafter(Drafter):
    """A drafter that returns the drafts in `text.pools` instead of running a head."""

    def __init__(self, text: RecordedText) -> None:
        self._text, self._place = text, -1
        self.proposable_tokens = max(text.pools)
        self.drafts_at_once = text.block_nodes > 0
        self.most_levels = text.depth if self.drafts_at_once else None

    def observe(self, committed: Committed) -> None:
        assert committed.features is not None
        self._place += committed.features.shape[1]

    def keep_rows(self, rows: list[int]) -> None:
        raise NotImplementedError("A recorded text has one row.")

    def draft(self, input_ids: Tensor, request: DraftRequest) -> CandidatePool:
        """Return the recorded draft, cut where the policy stops; raise `ValueError` if the shape was not recorded."""
        shape, goes_on = request.shape, request.goes_on
        top_k = min(shape.top_k, shape.total_tokens - 1)
        pool, most = self._text.pools.get(top_k), self._text.block_nodes
        depth = min(shape.depth, self.most_levels or shape.depth)
        if pool is None or depth > int(pool.levels[-1]) or 0 < most < shape.total_tokens - 1:
            kept = f"up to {self._text.depth} levels" + f" and {most} nodes" * bool(most)
            raise ValueError(
                f"The policy asks for {shape}, but the text was recorded for top_k {sorted(self._text.pools)} and "
                f"{kept}. Record it again with `record_pools`."
            )
        here = slice(self._place, self._place + 1)
        ends = pool.levels.bincount().cumsum(0).tolist()  # nodes of the first 0, 1, 2, ... levels
        levels, frontier = 1, pool.scores[here, : ends[1]]
        while levels < depth and (goes_on is None or goes_on(levels, frontier)):
            level = pool.scores[here, ends[levels] : ends[levels + 1]]
            frontier = level.topk(min(top_k, level.shape[1])).values
            levels += 1
        tokens, parents, scores = (part[here, : ends[levels]] for part in (pool.tokens, pool.parents, pool.scores))
        return CandidatePool(tokens, parents, scores, pool.levels[: ends[levels]])
