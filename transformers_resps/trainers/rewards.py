"""What an outcome is worth to a policy that learns: by default, what it adds to total tokens over total seconds."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from ..replay import HeldOutcomes
from .ppo import gains


RewardFunc = Callable[..., Tensor]


def tokens_per_second(*, emitted: Tensor, seconds: Tensor, rate: float, persistence: int, **_: Any) -> Tensor:
    """Tokens minus what the policy emits in the same time on average, per step; see `ppo.gains`."""
    return gains(emitted, seconds, rate, persistence)


def mean_rate(*, mean_rates: Tensor, **_: Any) -> Tensor:
    """Mean of the steps' tokens per second, the reward of Re-SpS (arXiv 2601.12212, equations 3 and 5)."""
    return mean_rates


REWARD_FUNCS: dict[str, RewardFunc] = {"tokens_per_second": tokens_per_second, "mean_rate": mean_rate}


def reward_func_of(given: str | RewardFunc) -> RewardFunc:
    """The function that a name stands for; a function stands for itself.

    Raises:
        ValueError: it is neither.
    """
    found = REWARD_FUNCS.get(given) if isinstance(given, str) else given
    if not callable(found):
        raise ValueError(
            f"`reward_func` is {given!r}, but must be {' or '.join(map(repr, REWARD_FUNCS))}, or a function of "
            "`emitted`, `seconds`, `mean_rates`, `rate` and `persistence`."
        )
    return found


def rewards_of(func: RewardFunc, outcomes: HeldOutcomes, rate: float, persistence: int) -> Tensor:
    """What outcomes are worth: fp64 of their shape.

    Args:
        func: called with `emitted`, `seconds` and `mean_rates` of `outcomes`, and the other two.
        outcomes: `[n]` of the actions taken, or `[n, a]` of every action.
        rate: tokens per second of the policy.
        persistence: steps that an action is held.

    Raises:
        ValueError: it returned something else.
    """
    given = {"emitted": outcomes.emitted, "seconds": outcomes.seconds, "mean_rates": outcomes.mean_rates}
    rewards: Any = func(**given, rate=rate, persistence=persistence)
    is_fit = isinstance(rewards, Tensor) and rewards.shape == outcomes.emitted.shape
    if not is_fit or not bool(torch.isfinite(rewards).all()):
        came = f"shape {list(rewards.shape)}" if isinstance(rewards, Tensor) else f"a {type(rewards).__name__}"
        raise ValueError(
            f"`reward_func` returned {came if not is_fit else 'infinite values or NaN'} for outcomes of shape "
            f"{list(outcomes.emitted.shape)}, but must return a finite tensor of that shape: one reward per outcome."
        )
    return cast(Tensor, rewards).double()
