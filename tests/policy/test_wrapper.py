"""What a policy tells of itself holds for whatever is wrapped around it."""

from transformers_resps.inspection.recorder import Recorder
from transformers_resps.policy import BaselineGuard, FixedPolicy, Observation, Policy, RunningCosts, ThroughputPolicy
from transformers_resps.tree import TreeShape


class Silent(Policy):
    """Tells nothing."""

    def choose(self, observation: Observation) -> TreeShape:
        return TreeShape.plain()


def test_a_silent_policy_needs_all_and_claims_nothing() -> None:
    guard = BaselineGuard(Silent())
    assert guard.needs_head and guard.uses_lookup and guard.needs_drafted_match
    assert not guard.probes_head and not guard.is_confident
    assert guard.costs is None and not guard.has_identity
    guard.check_identity(target={"vocab_size": 16})


def test_what_a_policy_tells_goes_through_every_wrapper() -> None:
    costs = RunningCosts()
    policy = BaselineGuard(Recorder(ThroughputPolicy(costs=costs, target={"vocab_size": 16})))
    assert not policy.needs_head and policy.probes_head and policy.costs is costs
    assert policy.has_identity and policy.target_identity == {"vocab_size": 16}
    fixed = FixedPolicy(TreeShape(4, 2, 2))
    assert not BaselineGuard(fixed).uses_lookup and not BaselineGuard(fixed).needs_drafted_match


def test_a_recorder_looks_up_whatever_its_policy_does() -> None:
    assert Recorder(FixedPolicy(TreeShape(4, 2, 2))).uses_lookup
