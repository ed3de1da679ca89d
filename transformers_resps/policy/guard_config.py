"""The numbers of `BaselineGuard`, each with its reason."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GuardConfig:
    """What exploration may cost, and when a plain step is timed again. "Steps" are plain steps.

    Attributes:
        share: of all seconds: what drafting may lose for good, so that it is tried again and again. Far below the 3%
            that a call may lose, because errors of timing come on top.
        start_steps: what every call may lose from its start, so that also a call whose head was bad is tried again.
        trial_steps: what may be lost on top by trying drafting at all. With `start_steps` it pays for a first tree.
        trial_steps_per_token: limit of it near the end, where few tokens are left to earn it back.
        confident_steps: what may be lost on top once the policy's estimates rest on outcomes: a tree of the best size
            must be affordable then, also after bad luck.
        confident_steps_per_token: limit of it near the end.
        max_earned_steps: what drafting has won is kept up to this; it pays for as long a time of bad luck.
        max_carried_steps: what the next call starts with at most: its text may be another.
        max_repriced_steps: what is kept when plain steps turn out far cheaper: it was earned at the old price.
        lag_tokens: what a row of a batch may lag behind the mean before it counts as slower, not as unlucky.
        plain_up, plain_down: weights of a new plain time above or below the known one. A slow moment must not credit
            trees, so the time falls faster than it rises.
        max_trees_between: after so many drafted steps a plain one is timed again.
        outdated: times the expected seconds. Less shows that the machine or the batch has changed.
        far_positions: a call whose context differs by more times a plain step again, because attention takes longer.
        unknown_tree_steps, unknown_level_steps: added to the guessed costs of the first tree and the first level,
            since a mask or a new code path may cost more than a node.
    """

    share: float = 0.008
    start_steps: float = 0.2
    trial_steps: float = 0.5
    trial_steps_per_token: float = 0.005
    confident_steps: float = 1.2
    confident_steps_per_token: float = 0.015
    max_earned_steps: float = 16.0
    max_carried_steps: float = 4.0
    max_repriced_steps: float = 1.0
    lag_tokens: float = 2.0
    plain_up: float = 0.2
    plain_down: float = 0.5
    max_trees_between: int = 64
    outdated: float = 0.7
    far_positions: int = 256
    unknown_tree_steps: float = 0.5
    unknown_level_steps: float = 0.1
