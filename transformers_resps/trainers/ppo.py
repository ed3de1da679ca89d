"""The maths of policy optimisation, as pure functions of tensors. Shapes: n decisions, a actions."""

import torch
from torch import Tensor


def gae(rewards: Tensor, values: Tensor, ends: Tensor, *, discount: float, decay: float) -> Tensor:
    """Generalised advantage estimates `[n]`.

    Args:
        rewards: `[n]` of each decision, in the order they were taken.
        values: `[n]` the critic's estimate before each.
        ends: `[n]` bool: nothing follows this decision; the last one ends in any case.
        discount: gamma; at 0 an advantage is `reward - value`, the one-step advantage.
        decay: lambda.

    Source: Schulman et al. 2016 (arXiv 1506.02438), equations 11 to 16.
    """
    advantages = torch.zeros_like(rewards)
    following, next_value = rewards.new_zeros(()), values.new_zeros(())
    for index in reversed(range(len(rewards))):
        if ends[index]:
            following, next_value = torch.zeros_like(following), torch.zeros_like(next_value)
        error = rewards[index] + discount * next_value - values[index]
        following = error + discount * decay * following
        advantages[index], next_value = following, values[index]
    return advantages


def standardized(values: Tensor) -> Tensor:
    """`[n]` with mean 0 and deviation 1; all 0 when they are equal, also when there is only one."""
    centred = values - values.mean()
    return centred / (centred.square().mean().sqrt() + 1e-8)


def clipped_surrogate(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """The objective to maximise, a scalar, from three times `[n]`.

    Source: Schulman et al. 2017 (arXiv 1707.06347), equation 7.
    """
    ratios = (log_probs - old_log_probs).exp()
    return torch.min(ratios * advantages, ratios.clamp(1 - clip, 1 + clip) * advantages).mean()


def entropy(logits: Tensor) -> Tensor:
    """`[n, a]` -> `[n]`, in nats."""
    log_probs = logits.log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1)


def value_loss(values: Tensor, returns: Tensor) -> Tensor:
    """Mean squared error of the critic, a scalar, from twice `[n]`; unclipped, as in stable-baselines3."""
    return (values - returns).square().mean()


def gains(emitted: Tensor, seconds: Tensor, rate: Tensor | float, persistence: int) -> Tensor:
    """What outcomes are worth, in tokens per step: tokens minus what the policy emits in the same time on average.

    Args:
        emitted: tokens, of any shape.
        seconds: of the same shape.
        rate: lambda, tokens per second of the current policy.
        persistence: steps that a decision is held.

    Maximising its sum at the rate it attains itself maximises total tokens over total seconds (Dinkelbach 1967); the
    mean of per-step rates, the reward of Re-SpS (equations 3 and 5), has another maximum.
    """
    return (emitted - rate * seconds) / persistence


def relative_gains(action_gains: Tensor) -> Tensor:
    """Gains of every action `[n, a]` relative to the mean of their row, in units of their spread over all rows.

    As `standardized` does for advantages: the entropy bonus then weighs the same whatever a token is worth. It keeps
    the policy uncertain enough to follow when the rate, and with it all gains, changes.
    """
    relative = action_gains - action_gains.mean(-1, keepdim=True)
    return relative / (relative.square().mean().sqrt() + 1e-8)


def expected_gain(logits: Tensor, action_gains: Tensor) -> Tensor:
    """Mean gain under the policy, a scalar to maximise, from logits and gains of every action, both `[n, a]`.

    Cost-sensitive classification: when the outcomes of all actions are known the policy gradient is exact and needs
    neither samples nor a critic.
    """
    return (logits.softmax(-1) * action_gains).sum(-1).mean()
