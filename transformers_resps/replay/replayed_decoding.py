"""Any policy on recorded texts: it decides as in `generate`, and a cost table replaces the clock.

Knows recordings, policies and costs: no model. The time of the policy's own arithmetic is not counted.
"""

from collections.abc import Callable
from dataclasses import dataclass

from ..drafting.prompt_lookup import Lookup
from ..policy import Level, Observation, Policy, ask_shape, count_nodes, wants_level
from ..telemetry import RowCounts, SpeculationReport, StepRecord
from ..tree import CandidatePool, DraftTree, TreeShape
from .recorded_text import RecordedText


@dataclass(frozen=True, slots=True)
class StepCosts:
    """The costs of a step, in seconds, for `replay_policy`.

    Attributes:
        verify_seconds: (nodes, positions of context) -> seconds of the target's forward.
        draft_seconds: (width, levels) -> seconds of the head.
        overhead_seconds: seconds of everything else in a step.
    """

    verify_seconds: Callable[[int, int], float]
    draft_seconds: Callable[[int, int], float]
    overhead_seconds: float = 0.0


def replay_policy(text: RecordedText, policy: Policy, costs: StepCosts) -> SpeculationReport:
    """Simulate `policy` on a recorded text, without models; prefill is left out.

    Args:
        text: the recording.
        policy: decides at every step as in `generate`.
        costs: give the seconds of each step.

    Returns:
        The report that `generate` would have given, with the seconds of `costs`.

    Raises:
        ValueError: the policy returns something that is no shape, or asks for one that was not recorded.
    """
    return _ReplayedDecoding(text, policy, costs).run()


class _ReplayedDecoding:
    def __init__(self, text: RecordedText, policy: Policy, costs: StepCosts) -> None:
        self._text, self._policy, self._costs = text, policy, costs
        self._tokens: list[int] = text.input_ids.tolist()
        self._lookup = Lookup()
        self._levels = 0  # that the head drafted in this step

    def run(self) -> SpeculationReport:
        report, place = SpeculationReport(), 0
        while place < len(self._text):
            record = self._step(place, len(report.steps))
            self._policy.observe(record)
            report.steps.append(record)
            place += record.emitted_total
        return report

    def _step(self, place: int, step: int) -> StepRecord:
        root = self._text.prompt_length + place  # of which everything up to itself is committed
        self._lookup.extend(self._tokens[self._lookup.length : root + 1])
        left = len(self._text) - place
        features = self._text.features[place : place + 1]
        observation = Observation(features, root + 1, step, left + self._text.spare_room, self._prefix_accept_probs)
        shape = ask_shape(self._policy, observation).within(observation.room - 1)
        pool = self._drafted(shape, place) if shape.asks_head else None
        tree = self._tree(shape, root, pool)
        upcoming = self._text.input_ids[None, root + 1 :]
        accepted = min(tree.drafted_match(upcoming)[0], left - 1)
        verify = self._costs.verify_seconds(tree.node_count, root)
        draft = self._costs.draft_seconds(shape.top_k, self._levels) if pool is not None else 0.0
        return StepRecord(
            shape,
            0 if pool is None else pool.tokens.shape[1],
            tree.node_count,
            RowCounts([accepted]),
            RowCounts([accepted + 1]),
            draft,
            verify,
            draft + verify + self._costs.overhead_seconds,
            RowCounts([0] if pool is None else pool.drafted_match(upcoming[:, : accepted + 1])),
        )

    def _prefix_accept_probs(self) -> list[float]:
        return self._lookup.match().prefix_accept_probs

    def _drafted(self, shape: TreeShape, place: int) -> CandidatePool:
        """The pool of this position, as deep as the policy lets it grow."""
        top_k = min(shape.top_k, shape.total_tokens - 1)
        pool = self._text.pools.get(top_k)
        if pool is None or shape.depth > int(pool.levels[-1]):
            raise ValueError(
                f"The policy asks for {shape}, but the text was recorded for top_k {sorted(self._text.pools)} and up "
                f"to {self._text.depth} levels. Record it again with `record_pools(..., depths=...)`."
            )
        self._levels, ends = 1, int((pool.levels == 1).sum())
        scores = frontier = pool.scores[place : place + 1, :ends]
        while self._levels < shape.depth and wants_level(self._policy, Level(self._levels, frontier)):
            self._levels += 1
            ends = int((pool.levels <= self._levels).sum())
            level = pool.scores[place : place + 1, scores.shape[1] : ends]
            frontier = level.topk(min(top_k, level.shape[1])).values
            scores = pool.scores[place : place + 1, :ends]
        cut = slice(place, place + 1)
        return CandidatePool(pool.tokens[cut, :ends], pool.parents[cut, :ends], scores, pool.levels[:ends])

    def _tree(self, shape: TreeShape, root: int, pool: CandidatePool | None) -> DraftTree:
        """As `TreeDecoding` builds it."""
        newest = self._text.input_ids[root : root + 1]
        tree = DraftTree.root_only(newest)
        if pool is not None:
            total_tokens = min(shape.total_tokens, count_nodes(self._policy, pool.scores, pool.levels))
            if total_tokens > 1:
                tree = DraftTree.from_pool(newest, pool, total_tokens)
        if shape.lookup:
            tree = tree.with_chains([self._lookup.match().tokens[: shape.lookup]])
        return tree
