"""Train a Re-SpS policy, by PPO or with the outcome of every action.

The maths is in `ppo`; `rollouts` and `live_rollouts` make the decisions.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..policy import ReSpSPolicy
from ..replay import HeldOutcomes
from .artefact_trainer import ArtefactTrainer
from .checks import check_kinds
from .policy_config import PolicyTrainingConfig
from .ppo import clipped_surrogate, entropy, expected_gain, gae, gains, relative_gains, standardized, value_loss
from .rollouts import ReplayRollouts, Rollouts


class PolicyTrainer(ArtefactTrainer):
    """Trains a `ReSpSPolicy` on recorded texts or on live decoding.

    Checkpoints hold the policy's network; `OUTPUT_DIR/policy` is the policy of the finished run, loadable by
    `AutoPolicy.from_pretrained`. On replayed texts, a killed and resumed run ends as an uninterrupted one: the random
    numbers of an update depend only on the seed and the update's number.

    Logged for each update: `tokens_per_second`; `reward`, if it is `mean_rate`; `entropy` in nats; `distinct_actions`,
    how many actions are the likeliest one of some decision. On replayed texts also `gain_regret`, the tokens per step
    lost compared with the best actions, and `oracle_regret`, the time lost compared with the fastest sequence of
    shapes, as a share of the fastest time. Live also `dropped`, the decisions left out because the clock jumped.

    Args:
        policy: the policy, trained in place.
        args: see `PolicyTrainingConfig`.
        rollouts: where decisions come from: `ReplayRollouts`, or `LiveRollouts`, which are timed.
        eval_rollouts: held-out replayed texts, for `evaluate`.
        kwargs: passed to `transformers.Trainer`.

    Raises:
        ValueError: the objective is `full_information` with live rollouts, or an argument has the wrong type.
    """

    args: PolicyTrainingConfig
    artefact_name = "policy"

    def __init__(
        self,
        policy: ReSpSPolicy,
        args: PolicyTrainingConfig,
        rollouts: Rollouts,
        eval_rollouts: ReplayRollouts | None = None,
        **kwargs: Any,
    ) -> None:
        check_kinds("PolicyTrainer", policy=(policy, ReSpSPolicy), args=(args, PolicyTrainingConfig))
        if args.objective == "full_information" and not rollouts.knows_all_outcomes:
            raise ValueError(
                f"Got objective='full_information' with {type(rollouts).__name__}, but live decoding shows only the "
                "outcome of the action taken. Record the texts and pass `ReplayRollouts`, or set objective='ppo'."
            )
        super().__init__(
            model=policy.network,
            args=args,
            train_dataset=cast(Any, range(args.max_steps)),  # what is learned from is decided while training
            eval_dataset=None if eval_rollouts is None else cast(Any, range(1)),
            data_collator=_collate,
            **kwargs,
        )
        self.model_accepts_loss_kwargs = False
        self.policy, self.rollouts, self.eval_rollouts = policy, rollouts, eval_rollouts
        self._update = -1
        self._sums: dict[str, list[float]] = defaultdict(list)

    @property
    def steps_per_update(self) -> int:
        """Optimiser steps in an update: part of one cannot be resumed exactly."""
        return self.args.steps_per_update

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of one optimiser step: a minibatch of the current update."""
        index = self._minibatch()
        logits, values = model(self._decisions.features[index])
        log_probs = logits.log_softmax(-1)
        if self.args.objective == "full_information":
            loss = -expected_gain(logits, self._relative_gains[index].to(logits))
        else:
            actions = self._decisions.actions[index].to(logits.device)
            taken = log_probs.gather(1, actions[:, None]).squeeze(1)
            old, advantages, returns = (part[index].to(logits) for part in self._targets)
            loss = -clipped_surrogate(taken, old, advantages, self.args.clip)
            loss = loss + self.args.value_coefficient * value_loss(values, returns)
        bonus = entropy(logits).mean()
        self._note(entropy=bonus.item())
        loss = loss - cast(float, self.args.entropy_coefficient) * bonus
        return (loss, {}) if return_outputs else loss

    def _minibatch(self) -> Tensor:
        """Indices of the decisions of the current optimiser step; a new update decides first."""
        update, step = divmod(self.state.global_step, self.args.steps_per_update)
        if update != self._update:
            self._start(update)
        epoch, part = divmod(step, self.args.minibatches)
        order = torch.randperm(len(self._decisions), generator=self._generator(update, 1 + epoch))
        parts = order.tensor_split(min(self.args.minibatches, len(order)))
        return parts[part % len(parts)]

    def _start(self, update: int) -> None:
        """Make the decisions of an update and compute what each was worth."""
        self._update = update
        args = self.args
        self._decisions = self.rollouts.collect(
            self.policy,
            args.texts_per_update,
            args.persistence,
            self._generator(update, 0),
            greedy=args.objective == "full_information",  # there is nothing left to explore
        )
        with torch.no_grad():
            logits, values = (part.cpu() for part in self.policy.network(self._decisions.features))
        decisions, likeliest = self._decisions, logits.argmax(-1)
        if decisions.all_outcomes is not None:
            # The rate of the actions that would be taken in use, at the positions visited
            all_rewards = self._rewards(decisions.all_outcomes, self._rate(decisions.all_outcomes.of(likeliest)))
            self._relative_gains = relative_gains(all_rewards)
            lost = all_rewards.max(-1).values - all_rewards.gather(1, likeliest[:, None]).squeeze(1)
            self._note(gain_regret=float(lost.mean()) if args.reward == "gain" else None)
        if args.objective != "full_information":
            rewards = self._rewards(decisions.outcomes, self._rate(decisions.outcomes))
            values = values.to(rewards)
            advantages = gae(rewards, values, decisions.ends, discount=args.discount, decay=args.gae_decay)
            self._targets = (decisions.log_probs, standardized(advantages), advantages + values)
        self._note(
            reward=float(decisions.outcomes.mean_rates.mean()) if args.reward == "mean_rate" else None,
            tokens_per_second=decisions.tokens_per_second,
            distinct_actions=len(likeliest.unique()),
            oracle_regret=decisions.oracle_regret,
            dropped=None if self.rollouts.knows_all_outcomes else decisions.dropped,
        )

    def _rate(self, outcomes: HeldOutcomes) -> Tensor:
        """Lambda: all tokens over all seconds, and on replayed texts no less than the best fixed shape attains.

        The best policy is at least as fast, so a lower rate would only send the first updates the wrong way.
        """
        rate = outcomes.emitted.sum() / outcomes.seconds.sum()
        if isinstance(self.rollouts, ReplayRollouts):
            rate = rate.clamp(min=self.rollouts.oracle.best_fixed_rate)
        return rate

    def _rewards(self, outcomes: HeldOutcomes, rate: Tensor) -> Tensor:
        if self.args.reward == "mean_rate":
            return outcomes.mean_rates
        return gains(outcomes.emitted, outcomes.seconds, rate, self.args.persistence)

    def _note(self, **values: float | None) -> None:
        """Keep the values that are not `None` for the next line of metrics."""
        for name, value in values.items():
            if value is not None:
                self._sums[name].append(value)

    def _generator(self, update: int, purpose: int) -> torch.Generator:
        """Random numbers that depend only on the seed and these two."""
        seed = (self.args.seed * 1_000_003 + update) * 1_009 + purpose
        return torch.Generator().manual_seed(seed % 2**63)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means of what was noted since the last line."""
        logs |= {name: sum(values) / len(values) for name, values in self._sums.items()}
        self._sums.clear()
        super().log(logs, start_time)

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """Run the policy on all held-out texts, with the persistence and sampling of `policy.config`.

        Returns:
            With the prefix `eval_`: `tokens_per_second`; `best_fixed_tokens_per_second` of the fixed shape that is
            fastest on the training texts (on the held-out ones if training is live); `gain_over_best_fixed`, their
            ratio; `oracle_regret`; `distinct_actions`.

        Raises:
            ValueError: no texts were held out.
        """
        if self.eval_rollouts is None:
            raise ValueError("`eval_rollouts` is missing, but evaluation needs held-out texts. Pass `ReplayRollouts`.")
        held_out, training = self.eval_rollouts, self.rollouts
        texts = torch.arange(len(held_out.table))
        use = self.policy.config
        generator = self._generator(0, 0) if use.sample else None
        decisions = held_out.follow(self.policy, texts, use.persistence, generator, temperature=use.temperature)
        fixed = training.oracle.best_fixed if isinstance(training, ReplayRollouts) else None
        headroom = held_out.oracle.headroom(fixed)
        fixed_rate = headroom.tokens / headroom.fixed_seconds
        metrics = {
            "tokens_per_second": decisions.tokens_per_second,
            "best_fixed_tokens_per_second": fixed_rate,
            "gain_over_best_fixed": decisions.tokens_per_second / fixed_rate,
            "oracle_regret": cast(float, decisions.oracle_regret),
            "distinct_actions": len(decisions.actions.unique()),
        }
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        super().log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def write_artefact(self, folder: Path) -> None:
        """Write the policy."""
        self.policy.save_pretrained(folder)


def _collate(steps: list[int]) -> dict[str, Tensor]:
    return {"step": torch.tensor(steps)}
