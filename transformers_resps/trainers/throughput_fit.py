"""Fit a `ThroughputPolicy` to recorded answers, and compare it on others."""

import copy
from collections.abc import Sequence
from typing import Any

from ..policy import ActionGrid, BaselineGuard, CostModel, Policy, ThroughputPolicy
from ..replay import Oracle, OutcomeTable, RecordedText, ReplayText, fitted_policy, replay_policy
from ..telemetry.rates import Timing
from .pair import Pair
from .policy_comparison import PolicyComparison


_DEPTH, _TOP_KS = 6, (1, 2, 4)  # what the fixed trees ask for that a policy is compared with
_LOOKUPS = (0, 4, 8)


def recorded_depths(policy: ThroughputPolicy) -> dict[int, int]:
    """Levels to record for each `top_k`, so that the policy and the fixed trees can be replayed."""
    sizes = policy.to_config()
    return dict.fromkeys(sorted({*_TOP_KS, sizes["top_k"]}), max(_DEPTH, sizes["depth"]))


def fit(policy: ThroughputPolicy, texts: Sequence[RecordedText], pair: Pair) -> BaselineGuard:
    """A policy of the same sizes, fitted to `texts`, in its guard."""
    sizes: dict[str, Any] = {name: policy.to_config()[name] for name in ("depth", "top_k", "most_nodes")}
    return BaselineGuard(fitted_policy(texts, **sizes, **pair.identity))


def compare(
    policy: Policy, searched: Sequence[RecordedText], held_out: Sequence[RecordedText], costs: CostModel
) -> PolicyComparison:
    """Replay held-out texts with a policy, which goes on learning as in use, and with the best fixed tree.

    Args:
        policy: not changed.
        searched: the texts on which the best fixed tree is found.
        held_out: the texts on which both are compared.
        costs: of steps.
    """
    grid = ActionGrid.small().with_lookups(_LOOKUPS)
    found, tested = (
        Oracle(OutcomeTable([ReplayText.from_recording(text).outcomes(grid, costs) for text in texts]))
        for texts in (searched, held_out)
    )
    learner = copy.deepcopy(policy)
    reports = [replay_policy(text, learner, costs) for text in held_out]
    fixed = tested.fixed_seconds[:, found.best_fixed].tolist()
    return PolicyComparison(
        [Timing(len(text), report.seconds) for text, report in zip(held_out, reports, strict=True)],
        [Timing(len(text), seconds) for text, seconds in zip(held_out, fixed, strict=True)],
        float(tested.best_seconds.sum()),
        len({step.verified for report in reports for step in report.steps}),
    )
