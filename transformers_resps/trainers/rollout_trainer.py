"""A policy beside the best fixed tree and the oracle on held-out texts, and what that proves.

Train a Re-SpS policy on decisions and what came of them, by PPO or with the outcome of every action.

The maths is in `ppo` and `rewards`; `rollouts` and `live_rollouts` make the decisions.
"""

import json
import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..hub import METRICS
from ..policies import ReSpSPolicy, SavedPolicy
from ..replay import HeldOutcomes
from ..telemetry.report import Timing, bootstrap_interval, rate
from .base import ArtefactTrainer
from .policy_config import PolicyTrainingConfig
from .ppo import clipped_surrogate, entropy, expected_gain, gae, relative_gains, standardized, value_loss
from .rollouts import ReplayRollouts, RewardFunc, Rollouts, reward_func_of, rewards_of


FEW_TEXTS = 10


@dataclass(frozen=True)
class PolicyComparison:
    """The same held-out texts, decoded with a policy and with one fixed tree.

    Attributes:
        own: tokens and seconds of each text with the policy.
        fixed: of the same texts, in the same order, with the best fixed tree of the training texts.
        oracle_seconds: the least that all texts together could have taken.
        distinct_actions: how many different trees the policy chose.
        learned_prompts: how many of the held-out prompts it was trained on.
    """

    own: Sequence[Timing]
    fixed: Sequence[Timing]
    oracle_seconds: float
    distinct_actions: int
    learned_prompts: int = 0

    @property
    def gain(self) -> float:
        """Tokens per second over those of the best fixed tree."""
        return rate(self.own) / rate(self.fixed)

    @cached_property
    def interval(self) -> tuple[float, float]:
        """The middle 95% of `gain` over texts drawn with replacement."""
        return bootstrap_interval([[one] for one in self.own], [[one] for one in self.fixed])

    def metrics(self) -> dict[str, float]:
        """What is logged."""
        low, high = self.interval
        return {
            "tokens_per_second": rate(self.own),
            "best_fixed_tokens_per_second": rate(self.fixed),
            "gain_over_best_fixed": self.gain,
            "gain_over_best_fixed_low": low,
            "gain_over_best_fixed_high": high,
            "oracle_regret": sum(one.seconds for one in self.own) / self.oracle_seconds - 1,
            "distinct_actions": self.distinct_actions,
            "held_out_texts": len(self.own),
        }

    @property
    def doubts(self) -> list[str]:
        """Reasons why the policy is not worth more than the best fixed tree; empty if it is."""
        low, high = self.interval
        found = []
        if low <= 1.0:
            found.append(
                f"it is not faster than the best fixed tree beyond chance ({self.gain:.3f} times its speed, 95% "
                f"interval {low:.3f} to {high:.3f})"
            )
        if self.distinct_actions == 1:
            found.append("it chose one tree everywhere, which a `FixedPolicy` does as well")
        if self.learned_prompts:
            found.append(f"{self.learned_prompts} of the held-out prompts are among those that it was trained on")
        if len(self.own) < FEW_TEXTS:
            count = len(self.own)
            found.append(f"it was judged on {count} held-out text{'s' * (count != 1)}, which prove little")
        return found

    @property
    def verdict(self) -> str:
        """One sentence for the card."""
        if self.doubts:
            return f"Not shown to pay: {'; '.join(self.doubts)}."
        low, high = self.interval
        return (
            f"Faster than the best fixed tree: {self.gain:.3f} times its speed, 95% interval {low:.3f} to {high:.3f} "
            f"over {len(self.own)} held-out texts."
        )

    def report(self) -> dict[str, Any]:
        """What `metrics.json` holds."""
        return {**self.metrics(), "verdict": self.verdict}


logger = logging.getLogger(f"transformers.{__name__}")


class RolloutTrainer(ArtefactTrainer):
    """Trains a `ReSpSPolicy` on rollouts: the learning that `PolicyTrainer` does, without the recording.

    Args:
        policy: trained in place. Nothing of another policy than a `ReSpSPolicy` is trained by steps.
        args: see `PolicyTrainingConfig`.
        rollouts: where decisions come from: `ReplayRollouts`, or `LiveRollouts`, which are timed.
        eval_rollouts: held-out replayed texts, for `evaluate`.
        reward_func: as in `PolicyTrainer`.
        kwargs: passed to `transformers.Trainer`.

    Raises:
        ValueError: the objective is `full_information` with live rollouts, or there is no such reward.
    """

    args: PolicyTrainingConfig
    artefact_name = "policy"

    def __init__(
        self,
        policy: SavedPolicy,
        args: PolicyTrainingConfig,
        rollouts: Rollouts | None = None,
        eval_rollouts: ReplayRollouts | None = None,
        *,
        reward_func: str | RewardFunc = "tokens_per_second",
        **kwargs: Any,
    ) -> None:
        self.reward_func = reward_func_of(reward_func)
        self._is_default_reward = reward_func == "tokens_per_second"
        if rollouts is not None and args.objective == "full_information" and not rollouts.knows_all_outcomes:
            raise ValueError(
                f"Got objective='full_information' with {type(rollouts).__name__}, but live decoding shows only the "
                "outcome of the action taken. Record the texts and pass `ReplayRollouts`, or set objective='ppo'."
            )
        network = policy.network if isinstance(policy, ReSpSPolicy) else nn.Module()
        kwargs.setdefault("eval_dataset", eval_rollouts)
        super().__init__(model=network, args=args, **kwargs)
        self.model_accepts_loss_kwargs = False
        self.policy, self.rollouts, self.eval_rollouts = policy, rollouts, eval_rollouts
        self._is_trained = self._has_warned = False
        self._update = -1
        self._sums: dict[str, list[float]] = defaultdict(list)

    @property
    def actor(self) -> ReSpSPolicy:
        """The policy whose network is trained."""
        return cast(ReSpSPolicy, self.policy)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in `ArtefactTrainer`."""
        result = super().train(*args, **kwargs)
        self._is_trained = self.is_finished
        return result

    def get_train_dataloader(self) -> DataLoader[int]:
        """Numbers: what a step learns from is decided when an update begins. An epoch is as many prompts as there are.

        Raises:
            ValueError: there is nothing to learn from.
        """
        if self.rollouts is None:
            raise ValueError("`train_dataset` is missing, but training needs prompts. Pass a dataset of them.")
        numbers = cast(Any, range(len(self.rollouts) * self.args.steps_per_update))
        return DataLoader(numbers, self.args.per_device_train_batch_size, collate_fn=_collate)

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
            loss = -clipped_surrogate(taken, old, advantages, self.args.cliprange)
            loss = loss + self.args.vf_coef * value_loss(values, returns)
        bonus = entropy(logits).mean()
        self._note(entropy=bonus.item())
        loss = loss - cast(float, self.args.entropy_coef) * bonus
        return (loss, {}) if return_outputs else loss

    def _minibatch(self) -> Tensor:
        """Indices of the decisions of the current optimiser step; a new update decides first."""
        update, step = divmod(self.state.global_step, self.args.steps_per_update)
        if update != self._update:
            self._start(update)
        epoch, part = divmod(step, self.args.num_mini_batches)
        order = torch.randperm(len(self._decisions), generator=self._generator(update, 1 + epoch))
        parts = order.tensor_split(min(self.args.num_mini_batches, len(order)))
        return parts[part % len(parts)]

    def _start(self, update: int) -> None:
        """Make the decisions of an update and compute what each was worth."""
        self._update = update
        args = self.args
        self._decisions = self._rollouts.collect(
            self.actor,
            args.per_device_train_batch_size,
            args.persistence,
            self._generator(update, 0),
            greedy=args.objective == "full_information",  # there is nothing left to explore
        )
        with torch.no_grad():
            logits, values = (part.cpu() for part in self.actor.network(self._decisions.features))
        decisions, likeliest = self._decisions, logits.argmax(-1)
        if decisions.all_outcomes is not None:
            # The rate of the actions that would be taken in use, at the positions visited
            all_rewards = self._rewards(decisions.all_outcomes, self._rate(decisions.all_outcomes.of(likeliest)))
            self._relative_gains = relative_gains(all_rewards)
            lost = all_rewards.max(-1).values - all_rewards.gather(1, likeliest[:, None]).squeeze(1)
            self._note(gain_regret=float(lost.mean()) if self._is_default_reward else None)
        rewards = self._rewards(decisions.outcomes, self._rate(decisions.outcomes))
        if args.objective != "full_information":
            values = values.to(rewards)
            advantages = gae(rewards, values, decisions.ends, discount=args.gamma, decay=args.lam)
            self._targets = (decisions.log_probs, standardized(advantages), advantages + values)
        self._note(
            reward=None if self._is_default_reward else float(rewards.mean()),
            tokens_per_second=decisions.tokens_per_second,
            distinct_actions=len(likeliest.unique()),
            oracle_regret=decisions.oracle_regret,
            dropped=None if self._rollouts.knows_all_outcomes else decisions.dropped,
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
        return rewards_of(self.reward_func, outcomes, float(rate), self.args.persistence)

    @property
    def _rollouts(self) -> Rollouts:
        return cast(Rollouts, self.rollouts)  # there are some, once training has begun

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
        """Compare the policy with the best fixed tree and the oracle on all held-out texts.

        Returns:
            With the prefix `eval_`: the metrics of `PolicyComparison`.

        Raises:
            ValueError: no texts were held out.
        """
        comparison = self.compared(eval_dataset)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in comparison.metrics().items()}
        super().log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if not self.is_in_train:
            self.judge(comparison)
        return metrics

    def compared(self, eval_dataset: Any = None) -> PolicyComparison:
        """As `evaluate`, but logs nothing; `eval_dataset` stands for `eval_rollouts`."""
        held_out, training = eval_dataset or self.eval_rollouts, self.rollouts
        if held_out is None:
            raise ValueError("There is no `eval_dataset`, but evaluation needs held-out prompts. Pass some.")
        return self.compared_on(held_out, training if isinstance(training, ReplayRollouts) else held_out)

    def compared_on(self, held_out: ReplayRollouts, searched: ReplayRollouts) -> PolicyComparison:
        """Decide on held-out texts with the persistence and sampling of `policy.config`, side by side with the fixed
        shape that is fastest on the texts `searched`.
        """
        texts, use = torch.arange(len(held_out)), self.actor.config
        generator = self._generator(0, 0) if use.sample else None
        decisions = held_out.follow(self.actor, texts, use.persistence, generator, temperature=use.temperature)
        oracle = held_out.oracle
        tokens = (held_out.table.stops - held_out.table.starts).tolist()
        return PolicyComparison(
            list(map(Timing, tokens, decisions.seconds_of_texts.tolist())),
            list(map(Timing, tokens, oracle.fixed_seconds[:, searched.oracle.best_fixed].tolist())),
            float(oracle.best_seconds.sum()),
            len(decisions.actions.unique()),
        )

    def judge(self, comparison: PolicyComparison) -> None:
        """Warn once of a policy that is not worth having, and tell the verdict in `metrics.json` beside the policy."""
        if not self.is_world_process_zero():
            return
        if comparison.doubts and not self._has_warned:
            logger.warning("The policy may not be worth using. %s", comparison.verdict)
            self._has_warned = True
        if self._is_trained:
            file = self.artefact_folder / METRICS
            file.write_text(json.dumps(comparison.report(), indent=2) + "\n", encoding="utf-8")

    def plain_card(self, repo_id: str) -> str:
        """The policy's own."""
        return self.policy.plain_card(repo_id)

    def write_artefact(self, folder: Path) -> None:
        """Write the policy."""
        self.policy.save_pretrained(folder)


def _collate(steps: list[int]) -> dict[str, Tensor]:
    return {"step": torch.tensor(steps)}
