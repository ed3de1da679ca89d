"""What a policy tells of itself holds for whatever is wrapped around it."""

import torch

from tests.policies.machine import Machine
from transformers_resps.policies.base import Observation, Policy, PolicyWrapper
from transformers_resps.policies.costs import RunningCosts
from transformers_resps.policies.fixed import FixedPolicy
from transformers_resps.policies.guard import BaselineGuard
from transformers_resps.policies.throughput import ThroughputPolicy
from transformers_resps.tools.inspect import StepRecorder
from transformers_resps.tree import DraftTree, TreeShape


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
    policy = BaselineGuard(StepRecorder(ThroughputPolicy(costs=costs, target={"vocab_size": 16})))
    assert not policy.needs_head and policy.probes_head and policy.costs is costs
    changed = costs.rescaled(2.0)
    policy.adopt_costs(changed)
    assert policy.costs is changed
    assert policy.has_identity and policy.target_identity == {"vocab_size": 16}
    fixed = FixedPolicy(TreeShape(4, 2, 2))
    assert not BaselineGuard(fixed).uses_lookup and not BaselineGuard(fixed).needs_drafted_match


def test_a_wrapped_policy_is_shown_what_was_verified() -> None:
    class Watching(FixedPolicy):
        seen = 0

        def on_verified(self, tree: DraftTree, path: torch.Tensor, tokens: torch.Tensor) -> None:
            self.seen += tree.node_count

    policy = Watching(TreeShape(4, 2, 2))
    root = torch.tensor([3])
    BaselineGuard(policy).on_verified(DraftTree.root_only(root), torch.zeros(1, 1, dtype=torch.long), root[:, None])
    assert policy.seen == 1


def test_a_wrapper_that_changes_nothing_decides_as_the_wrapped_policy() -> None:
    bare, wrapped = Machine(0.02, 0.02, hit=0.7), Machine(0.02, 0.02, hit=0.7)
    assert bare.run(ThroughputPolicy(), 100) == wrapped.run(PolicyWrapper(ThroughputPolicy()), 100)
    assert bare.shapes == wrapped.shapes and bare.verified == wrapped.verified


def test_a_recorder_looks_up_whatever_its_policy_does() -> None:
    assert StepRecorder(FixedPolicy(TreeShape(4, 2, 2))).uses_lookup
