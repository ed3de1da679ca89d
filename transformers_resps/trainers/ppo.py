"""Updates of a Re-SpS policy, with the maths of policy optimisation as pure functions.

Tensor shapes: n decisions, a actions (tree shapes that the policy can choose).

Source: Schulman et al. 2017, PPO (arXiv 1707.06347), algorithm 1; Re-SpS (arXiv 2601.12212).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..policies.resps import ReSpSPolicy
from ..replay import HeldOutcomes
from .policy_config import PolicyTrainingConfig
from .rollouts import Rollouts


RewardFunc = Callable[..., Tensor]


class Update:
    """One update of a policy: collects its decisions on some texts, and computes their rewards and minibatch losses.

    The update's number and the seed determine all random numbers, so that a resumed run repeats them.
    """

    def __init__(
        self, number: int, policy: ReSpSPolicy, rollouts: Rollouts, reward_func: RewardFunc, args: PolicyTrainingConfig
    ) -> None:
        self.number, self._args = number, args
        is_exact = args.objective == "full_information"  # no exploration, because the result of every action is known
        texts, generator = args.per_device_train_batch_size, seeded(args.seed, number, 0)
        decisions = rollouts.collect(policy, texts, args.persistence, generator, greedy=is_exact)
        with torch.no_grad():
            logits, values = (part.cpu() for part in policy.network(decisions.features))
        likeliest = logits.argmax(-1)

        def rewards(outcomes: HeldOutcomes, attained: HeldOutcomes) -> Tensor:
            # At least the rate of the best fixed shape, since a lower rate would mislead early updates
            rate = max(float(attained.emitted.sum() / attained.seconds.sum()), rollouts.best_fixed_rate)
            return rewards_of(reward_func, outcomes, rate, args.persistence)

        taken, every = rewards(decisions.outcomes, decisions.outcomes), None
        if decisions.all_outcomes is not None:
            # Uses the rate of the likeliest actions at the visited positions, because decoding takes these actions
            every = rewards(decisions.all_outcomes, decisions.all_outcomes.of_actions(likeliest))
            self._gains = standardized(every)
        if not is_exact:
            values = values.to(taken)
            advantages = gae(taken, values, decisions.ends, discount=args.gamma, decay=args.lam)
            self._advantages, self._returns = standardized(advantages), advantages + values

        self._decisions = decisions
        emitted, seconds = float(decisions.outcomes.emitted.sum()), float(decisions.outcomes.seconds.sum())
        self.metrics = {"tokens_per_second": emitted / seconds, "distinct_actions": len(likeliest.unique())}
        if reward_func is not tokens_per_second:
            self.metrics["reward"] = float(taken.mean())
        elif every is not None:
            lost = every.max(-1).values - every.gather(1, likeliest[:, None]).squeeze(1)
            self.metrics["gain_regret"] = float(lost.mean())
        if decisions.oracle_seconds is not None:
            self.metrics["oracle_regret"] = seconds / decisions.oracle_seconds - 1
        if not rollouts.knows_all_outcomes:
            self.metrics["dropped"] = decisions.dropped

    def loss(self, network: nn.Module, step: int) -> tuple[Tensor, float]:
        """Return the loss of minibatch number `step`, and the mean entropy of the policy's choices in nats."""
        args, decisions = self._args, self._decisions
        epoch, part = divmod(step, args.num_mini_batches)
        order = torch.randperm(len(decisions), generator=seeded(args.seed, self.number, 1 + epoch))
        parts = order.tensor_split(min(args.num_mini_batches, len(order)))
        index = parts[part % len(parts)]

        logits, values = network(decisions.features[index])
        if args.objective == "full_information":
            loss = -expected_gain(logits, self._gains[index].to(logits))
        else:
            actions = decisions.actions[index].to(logits.device)
            log_probs = logits.log_softmax(-1).gather(1, actions[:, None]).squeeze(1)
            old, advantages, returns = (
                part[index].to(logits) for part in (decisions.log_probs, self._advantages, self._returns)
            )
            loss = -clipped_surrogate(log_probs, old, advantages, args.cliprange)
            loss = loss + args.vf_coef * F.mse_loss(values, returns)  # unclipped, as in stable-baselines3
        bonus = entropy(logits).mean()
        return loss - (args.entropy_coef or 0.0) * bonus, bonus.item()


def seeded(seed: int, update: int, purpose: int) -> torch.Generator:
    """Make a random generator whose state depends only on these three numbers."""
    return torch.Generator().manual_seed(((seed * 1_000_003 + update) * 1_009 + purpose) % 2**63)


def tokens_per_second(*, emitted: Tensor, seconds: Tensor, rate: float, persistence: int, **_: Any) -> Tensor:
    """Return rewards in tokens per step: emitted tokens minus the tokens that `rate` yields in the same seconds.

    Maximising the sum of these rewards, with `rate` the policy's tokens per second, maximises total tokens over total
    seconds (Dinkelbach 1967). The reward of Re-SpS, the mean of per-step rates, has another maximum.
    """
    return (emitted - rate * seconds) / persistence


def mean_rate(*, mean_rates: Tensor, **_: Any) -> Tensor:
    """Return the steps' mean tokens per second, the reward of Re-SpS (arXiv 2601.12212, equations 3 and 5)."""
    return mean_rates


REWARD_FUNCS: dict[str, RewardFunc] = {"tokens_per_second": tokens_per_second, "mean_rate": mean_rate}


def reward_func_of(reward: str | RewardFunc) -> RewardFunc:
    """Return the reward function with this name, or `reward` itself; raises `ValueError` if it is not callable."""
    func = REWARD_FUNCS.get(reward) if isinstance(reward, str) else reward
    if not callable(func):
        raise ValueError(
            f"`reward_func` is {reward!r}, but must be {' or '.join(map(repr, REWARD_FUNCS))}, or a function of "
            "`emitted`, `seconds`, `mean_rates`, `rate` and `persistence`."
        )
    return func


def rewards_of(func: RewardFunc, outcomes: HeldOutcomes, rate: float, persistence: int) -> Tensor:
    """Return `func`'s fp64 rewards for outcomes `[n]` or `[n, a]`; raise `ValueError` if shape or values are wrong."""
    keywords = {"emitted": outcomes.emitted, "seconds": outcomes.seconds, "mean_rates": outcomes.mean_rates}
    rewards: Any = func(**keywords, rate=rate, persistence=persistence)
    is_fit = isinstance(rewards, Tensor) and rewards.shape == outcomes.emitted.shape
    if not is_fit or not bool(torch.isfinite(rewards).all()):
        came = f"shape {list(rewards.shape)}" if isinstance(rewards, Tensor) else f"a {type(rewards).__name__}"
        raise ValueError(
            f"`reward_func` returned {came if not is_fit else 'infinite values or NaN'} for outcomes of shape "
            f"{list(outcomes.emitted.shape)}, but must return a finite tensor of that shape: one reward per outcome."
        )
    return rewards.double()


def gae(rewards: Tensor, values: Tensor, ends: Tensor, *, discount: float, decay: float) -> Tensor:
    """Compute generalised advantage estimates from rewards, the critic's values and the texts' ends, all `[n]`.

    `discount` is gamma, `decay` is lambda. Source: Schulman et al. 2016 (arXiv 1506.02438), equations 11 to 16.
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
    """Shift values `[n]`, or each row of `[n, a]`, to mean 0, then divide all by their common standard deviation.

    Equal values become 0. Standardizing gives the entropy bonus the same weight at every scale of rewards, so that the
    policy stays uncertain enough to adapt when the rate changes.
    """
    centred = values - values.mean(-1, keepdim=True)
    return centred / (centred.square().mean().sqrt() + 1e-8)


def clipped_surrogate(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """Compute PPO's objective, a scalar to maximise, over n taken actions (arXiv 1707.06347, equation 7)."""
    ratios = (log_probs - old_log_probs).exp()
    return torch.min(ratios * advantages, ratios.clamp(1 - clip, 1 + clip) * advantages).mean()


def entropy(logits: Tensor) -> Tensor:
    """Compute the entropy `[n]`, in nats, of the distributions with logits `[n, a]`."""
    log_probs = logits.log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1)


def expected_gain(logits: Tensor, action_gains: Tensor) -> Tensor:
    """Compute the policy's mean expected gain, to be maximised, from logits and gains of all actions `[n, a]`."""
    return (logits.softmax(-1) * action_gains).sum(-1).mean()
