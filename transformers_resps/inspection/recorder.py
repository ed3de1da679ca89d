"""Records what a policy sees and decides, and the tree that results."""

from dataclasses import dataclass, field

from torch import Tensor

from ..policies import Level, Observation, Policy, PolicyWrapper
from ..telemetry.report import StepRecord
from ..tree import DraftTree, TreeShape


@dataclass(slots=True)
class RecordedStep:
    """One step of one row, prefill left out.

    Attributes:
        context_length: positions of the text before it.
        step: 0 for the first decision.
        room: tokens that the text may still gain.
        prefix_accept_probs: for i = 1, 2, ... the probability that the first i looked-up tokens are accepted.
        chosen: the policy's choice, before clipping.
        levels: drafted by the head.
        head_nodes: of the tree, from the head, root included; later nodes are looked up.
        tree: what was verified.
        path: accepted nodes, root first.
        record: shape after clipping, counts and seconds.
    """

    context_length: int
    step: int
    room: int
    prefix_accept_probs: list[float]
    chosen: TreeShape
    levels: int = 0
    head_nodes: int = 1
    tree: DraftTree = field(init=False)
    path: list[int] = field(init=False)
    record: StepRecord = field(init=False)

    @property
    def lookup_nodes(self) -> list[int]:
        return list(range(self.head_nodes, self.tree.node_count))

    @property
    def shared_nodes(self) -> list[int]:
        """Nodes of the head that the looked-up chain runs through: both sources proposed them."""
        if not self.lookup_nodes:
            return []
        ancestors = self.tree.ancestors[0, self.head_nodes].nonzero().flatten().tolist()
        return [node for node in ancestors if 0 < node < self.head_nodes]


class Recorder(PolicyWrapper):
    """Decides as `policy` does and keeps every step: for one call of `generate` with one prompt.

    Costs a lookup of the text's end per step, microseconds, and the memory of the trees.
    """

    uses_lookup = True  # at every step, whatever the policy does

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy)
        self.steps: list[RecordedStep] = []

    def __repr__(self) -> str:
        return repr(self.policy)

    def choose(self, observation: Observation) -> TreeShape:
        seen = (
            observation.context_length,
            observation.step,
            observation.room,
            list(observation.prefix_accept_probs()),
        )
        chosen = self.policy.choose(observation)
        self.steps.append(RecordedStep(*seen, chosen))
        return chosen

    def grow(self, level: Level) -> bool:
        grows = self.policy.grow(level)
        self.steps[-1].levels = level.depth + bool(grows)
        return grows

    def size(self, scores: Tensor, levels: Tensor) -> int:
        nodes = self.policy.size(scores, levels)
        step = self.steps[-1]
        step.levels = int(levels[-1])
        step.head_nodes = max(1, min(int(nodes), scores.shape[-1] + 1, step.chosen.total_tokens))
        return nodes

    def on_verified(self, tree: DraftTree, path: Tensor, tokens: Tensor) -> None:
        self.steps[-1].tree, self.steps[-1].path = tree, path[0].tolist()
        self.policy.on_verified(tree, path, tokens)

    def observe(self, record: StepRecord) -> None:
        self.steps[-1].record = record
        self.policy.observe(record)
