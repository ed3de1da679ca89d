"""The policy that training starts from: one that is given, or a new one for the target, the head and the machine."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..policy import ActionGrid, AutoPolicy, BaselineGuard, CostModel, ReSpSConfig, ReSpSPolicy, ThroughputPolicy
from ..tree import TreeShape
from .pair import Pair
from .policy_config import PolicyTrainingConfig


Trainable = ReSpSPolicy | ThroughputPolicy


def loaded_policy(model: Any, pair: Pair) -> tuple[Trainable | None, bool]:
    """The policy that is given as an object, a folder or a Hub id, and whether it is saved in a guard.

    Args:
        model: as in `PolicyTrainer`.
        pair: that it is trained with.

    Returns:
        The policy without its guard, `None` for a new `ReSpSPolicy`; and whether there was a guard.

    Raises:
        ValueError: it is something else, or was trained with another target or head.
    """
    if model == "resps":
        return None, False
    if model == "auto":
        return ThroughputPolicy(), True
    policy = AutoPolicy.from_pretrained(model) if isinstance(model, str) else model
    is_guarded = isinstance(policy, BaselineGuard)
    if isinstance(policy, BaselineGuard):
        policy = policy.policy
    if not isinstance(policy, Trainable):
        raise ValueError(
            f"`model` is a {type(policy).__name__}, but must be a `ReSpSPolicy` or a `ThroughputPolicy`, or the "
            "folder or Hub id of one. Pass 'resps' for a new Re-SpS policy, or 'auto' to fit what policy='auto' means."
        )
    policy.check_identity(**pair.identity)
    return policy, is_guarded


def new_resps_policy(pair: Pair, args: PolicyTrainingConfig, costs: CostModel, context: int) -> ReSpSPolicy:
    """A fresh Re-SpS policy over the shapes that could pay.

    Args:
        pair: reads this pair's features and belongs to it.
        args: `grid`, `drop_hopeless`, `preset`, `persistence_in_use` and `seed`.
        costs: of steps on this machine.
        context: positions at which they are compared.

    Raises:
        ValueError: no shape could pay here.
    """
    grid = ActionGrid.paper() if args.grid == "paper" else ActionGrid.small()
    if args.drop_hopeless:
        grid = paying_shapes(grid, lambda shape: costs.step_seconds(shape, context))
    width = pair.head.config.features_width
    config = ReSpSConfig.paper(width) if args.preset == "paper" else ReSpSConfig(width)
    in_use: dict[str, Any] = {"grid": grid, "persistence": args.persistence_in_use, **pair.identity}
    return ReSpSPolicy(replace(config, **in_use), seed=args.seed)


def paying_shapes(grid: ActionGrid, seconds: Callable[[TreeShape], float]) -> ActionGrid:
    """The shapes of `grid` that could pay here.

    Raises:
        ValueError: there is none, so nothing to learn.
    """
    kept = grid.affordable(seconds)
    if len(kept.shapes) == 1:
        raise ValueError(
            f"None of the {len(grid.shapes)} shapes could pay on this machine, even with all drafts accepted. Decode "
            "with `policy='auto'`, or set `drop_hopeless=False`."
        )
    return kept
