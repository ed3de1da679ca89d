"""Trains a policy on prompts: records the target's answers, measures the costs of steps, and learns from both."""

import copy
import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback

from ..compat import text_config
from ..data import write_training_prompts
from ..drafting import DraftCall
from ..heads import BlockHead, DraftHead
from ..policies.action_grid import ActionGrid
from ..policies.base import Policy
from ..policies.costs import CostModel
from ..policies.guard import BaselineGuard
from ..policies.resps import ReSpSConfig, ReSpSPolicy
from ..policies.saving import AutoPolicy
from ..policies.throughput import ThroughputPolicy
from ..replay import OutcomeTable, RankedText, RecordedText, fitted_policy, replay_policy
from ..telemetry.report import Timing, bootstrap_interval, rate
from .base import (
    ArtefactTrainer,
    add_metrics,
    check_resumable,
    check_type,
    make_unmeasured_repository,
    newest_checkpoint,
    write_recipe,
    write_whole,
)
from .data import PolicyData
from .loading import Pair, default_folder
from .policy_config import PolicyTrainingConfig
from .ppo import RewardFunc, Update, reward_func_of, seeded
from .rollouts import ReplayRollouts, Rollouts


logger = logging.getLogger(f"transformers.{__name__}")


class RolloutTrainer(ArtefactTrainer):
    """Trains a `ReSpSPolicy` in place: it learns from the decisions and results that `rollouts` collects.

    `evaluate` uses `eval_rollouts`, recorded held-out texts. See `PolicyTrainer` for `reward_func`.
    """

    args: PolicyTrainingConfig
    artefact_name = "policy"

    def __init__(
        self,
        policy: ReSpSPolicy,
        args: PolicyTrainingConfig,
        rollouts: Rollouts | None = None,
        eval_rollouts: ReplayRollouts | None = None,
        *,
        reward_func: str | RewardFunc = "tokens_per_second",
        **kwargs: Any,
    ) -> None:
        self.reward_func = reward_func_of(reward_func)
        if rollouts is not None and args.objective == "full_information" and not rollouts.knows_all_outcomes:
            raise ValueError(
                f"Got objective='full_information' with {type(rollouts).__name__}, but live decoding shows only the "
                "outcome of the action taken. Record the texts and pass `ReplayRollouts`, or set objective='ppo'."
            )
        kwargs.setdefault("eval_dataset", eval_rollouts)
        super().__init__(model=policy.network, args=args, **kwargs)
        self.model_accepts_loss_kwargs = False
        self.policy, self.rollouts, self.eval_rollouts = policy, rollouts, eval_rollouts
        self.steps_per_update, self._has_warned = args.steps_per_update, False
        self._update: Update | None = None
        self._noted: dict[str, list[float]] = defaultdict(list)  # values since the last logged metrics

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._update = None
        return super().train(*args, **kwargs)

    def get_train_dataloader(self) -> DataLoader[int]:
        """Return a loader that only counts the steps of an epoch, since each `Update` collects its own decisions."""
        if self.rollouts is None:
            raise ValueError("`rollouts` are missing, but training needs decisions. Pass `ReplayRollouts`.")
        numbers, size = len(self.rollouts) * self.steps_per_update, self.args.per_device_train_batch_size
        return DataLoader(cast(Any, range(numbers)), size, collate_fn=lambda steps: {"step": torch.tensor(steps)})

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        number, step = divmod(self.state.global_step, self.steps_per_update)
        if self._update is None or self._update.number != number:
            assert self.rollouts is not None  # else there would be no loader
            self._update = Update(number, self.policy, self.rollouts, self.reward_func, self.args)
            for name, value in self._update.metrics.items():
                self._noted[name].append(value)
        loss, entropy = self._update.loss(model, step)
        self._noted["entropy"].append(entropy)
        return (loss, {}) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        logs |= {name: sum(values) / len(values) for name, values in self._noted.items()}
        self._noted.clear()
        super().log(logs, start_time)

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """Compare the policy with the best fixed tree and the fastest sequence of trees (oracle) on held-out texts.

        `eval_dataset` holds prompts for a `PolicyTrainer`, `ReplayRollouts` for a `RolloutTrainer`; `None` uses the
        trainer's own. After training the result is written to `metrics.json` in the policy's folder.

        Returns `tokens_per_second`; `best_fixed_tokens_per_second`, for the fixed tree that is fastest on the training
        texts (with live rollouts, on the held-out texts); `gain_over_best_fixed`, the ratio of both, with its 95%
        interval over texts in `gain_over_best_fixed_low` and `_high`; `oracle_regret`, the share by which the oracle's
        time is exceeded; `distinct_actions`, the number of chosen trees; and `held_out_texts`.
        """
        comparison = self.compared(eval_dataset)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in comparison.metrics().items()}
        super().log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if not self.is_in_train:
            self.judge(comparison)
        return metrics

    def compared(self, eval_dataset: Any = None) -> "PolicyComparison":
        """Compare the policy with the best fixed tree on held-out texts, like `evaluate`, but log nothing."""
        held_out, training = eval_dataset or self.eval_rollouts, self.rollouts
        if held_out is None:
            raise ValueError("`eval_dataset` is missing, but evaluation needs held-out texts. Pass `eval_rollouts`.")
        return self.compared_on(held_out, training if isinstance(training, ReplayRollouts) else held_out)

    def compared_on(self, held_out: ReplayRollouts, searched: ReplayRollouts) -> "PolicyComparison":
        """Replay `held_out` with the policy's decoding settings, and with the fixed tree fastest on `searched`."""
        texts, use = torch.arange(len(held_out)), self.policy.config
        generator = seeded(self.args.seed, 0, 0) if use.sample else None
        decisions = held_out.follow(self.policy, texts, use.persistence, generator, temperature=use.temperature)
        table, ends = held_out.table, decisions.ends.long()
        seconds = torch.zeros(len(texts), dtype=torch.float64)
        seconds.index_add_(0, ends.cumsum(0) - ends, decisions.outcomes.seconds.double())
        tokens = (table.stops - table.starts).tolist()
        return PolicyComparison(
            list(map(Timing, tokens, seconds.tolist())),
            list(map(Timing, tokens, table.fixed_seconds[:, searched.table.best_fixed].tolist())),
            float(table.best_seconds.sum()),
            len(decisions.actions.unique()),
        )

    def judge(self, comparison: "PolicyComparison") -> None:
        """Warn, only once, if `comparison` raises doubts; after training, write it to the policy's `metrics.json`."""
        if not self.is_world_process_zero():
            return
        if not self._has_warned:
            self._has_warned = comparison.warn()
        if self._is_trained:
            comparison.save(self.artefact_folder)

    def plain_card(self, repo_id: str) -> str:
        return self.policy.plain_card(repo_id)

    def write_artefact(self, folder: Path) -> None:
        self.policy.save_pretrained(folder)


class PolicyTrainer(RolloutTrainer):
    """Trains a Re-SpS policy for a target and its head on your prompts. For the policy "auto", call `fit_policy`.

    The target answers the prompts once, and the result of every tree at every position is recorded
    (`OUTPUT_DIR/replay`). The costs of steps are measured on this machine (`OUTPUT_DIR/costs.json`). Then the policy
    learns from both without decoding; with `args.live_rollouts` it learns by decoding. Recordings and costs are
    reused, so after `train(resume_from_checkpoint=True)` a stopped run ends with the result of an unstopped run.

    The finished policy is in `OUTPUT_DIR/policy`, for `AutoPolicy.from_pretrained`. With an `eval_dataset`, it is
    compared with the best fixed tree: the result is in `metrics.json` there, and a warning says if it is no better.

    Each update logs `tokens_per_second`; `reward` if `reward_func` is not the default; `entropy` in nats; and
    `distinct_actions`, the number of trees that are the likeliest choice at some position. On recorded texts it also
    logs `gain_regret`, the tokens per step lost against the best trees, and `oracle_regret`, the time lost against the
    fastest sequence of trees, as a share of that sequence's time. Live rollouts log `dropped`, the number of decisions
    ignored because the clock jumped.

    Args:
        model: "resps" for a new policy with the trees that can pay on this machine; or a `ReSpSPolicy`, which may be
            in a `BaselineGuard`, or its folder or Hub id. The policy is trained in place.
        train_dataset: a `datasets.Dataset` with a column `prompt` (a string, without a chat template, or messages) or
            `messages` (used up to the last question).
        eval_dataset: held-out prompts, in the same columns.
        processing_class: the target's tokenizer; `None` loads it from the target's folder or repository.
        target: the model that decodes, attached or not, or its folder or Hub id.
        head: the target's draft head or block head, or its folder or Hub id.
        reward_func: the objective. "tokens_per_second": total tokens over total seconds. "mean_rate": mean of the
            steps' tokens per second, as in Re-SpS. Or a function that returns a tensor with one reward per outcome. It
            gets the keywords `emitted`, `seconds` and `mean_rates` (tensors of one shape: tokens, seconds and mean
            tokens per second while an action is kept), `rate` (tokens per second of the policy) and `persistence`
            (number of steps for which an action is kept).
        kwargs: passed to `transformers.Trainer`.
    """

    def __init__(
        self,
        model: ReSpSPolicy | BaselineGuard | str,
        args: PolicyTrainingConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        callbacks: list[TrainerCallback] | None = None,
        *,
        target: PreTrainedModel | str,
        head: DraftHead | BlockHead | str,
        reward_func: str | RewardFunc = "tokens_per_second",
        **kwargs: Any,
    ) -> None:
        args = args or PolicyTrainingConfig(default_folder(target, self.artefact_name))
        check_type("args", args, PolicyTrainingConfig)
        datasets = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
        policy, self._is_guarded = (None, False) if model in ("resps", "auto") else without_guard(model)
        if model == "auto" or isinstance(policy, ThroughputPolicy):
            raise ValueError(
                "`model` is what policy='auto' means, which is fitted in one go instead of trained by steps. Call "
                "`fit_policy` with the same arguments, or pass 'resps' for a new Re-SpS policy."
            )
        if not isinstance(policy, ReSpSPolicy | None):
            raise ValueError(
                f"`model` is a {type(policy).__name__}, but must be a `ReSpSPolicy`, or the folder or Hub id of one. "
                "Pass 'resps' for a new one."
            )
        self.data = PolicyData(Pair.of(target, head, processing_class, args), args, **datasets)
        if policy is None:
            policy = new_resps_policy(self.data.pair, args, self.data.costs, self.data.usual_context)
        policy.check_identity(**self.data.pair.identity)
        super().__init__(policy, args, reward_func=reward_func, callbacks=callbacks, **datasets, **kwargs)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Record missing answers, then train as `ArtefactTrainer.train` does.

        If there is no checkpoint yet, `resume_from_checkpoint=True` starts from the beginning. Raises `ValueError` if
        a checkpoint in the output folder was trained on other inputs, or if `train_dataset` is missing.
        """
        data, folder, grid = self.data, str(self.args.output_dir), self.policy.config.grid
        data.check_has("train_dataset", "training")
        with self.args.main_process_first(desc="comparing with the run that is resumed"):
            check_resumable(folder, data.facts(grid))
        self.rollouts = data.live() if self.args.live_rollouts else data.replays("train_dataset", grid)
        if "eval_dataset" in data.prompts:
            data.replays("eval_dataset", grid)
        newest = newest_checkpoint(folder) if resume_from_checkpoint is True else resume_from_checkpoint
        result = super().train(newest, *args, **kwargs)
        if self._is_trained and "eval_dataset" in data.prompts:
            self.judge(self.compared())
        return result

    def compared(self, eval_dataset: Any = None) -> "PolicyComparison":
        data, held_out = self.data, "eval_dataset" if eval_dataset is None else "test"
        if eval_dataset is not None:
            data.add(held_out, eval_dataset)
        data.check_has(held_out, "evaluation")
        searched = held_out if self.args.live_rollouts or "train_dataset" not in data.prompts else "train_dataset"
        grid = self.policy.config.grid
        comparison = self.compared_on(data.replays(held_out, grid), data.replays(searched, grid))
        return replace(comparison, learned_prompts=data.learned(held_out))

    def metrics(self) -> dict[str, Any]:
        return {"training": {"steps": self.state.global_step} | self.data.training}

    def models(self) -> dict[str, str | None]:
        return self.data.pair.names

    def write_artefact(self, folder: Path) -> None:
        """Write the policy (in a `BaselineGuard` if `model` was in one) and hashes of its training prompts."""
        policy = ReSpSPolicy(replace(self.policy.config, **self.data.pair.identity), self.policy.network)
        (BaselineGuard(policy) if self._is_guarded else policy).save_pretrained(folder)
        write_training_prompts(folder, self.data.first_questions("train_dataset", "eval_dataset"))


def fit_policy(
    model: ThroughputPolicy | BaselineGuard | str = "auto",
    args: PolicyTrainingConfig | None = None,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
    *,
    target: PreTrainedModel | str,
    head: DraftHead | BlockHead | str,
) -> BaselineGuard:
    """Fit the policy "auto" to your prompts: measure how likely drafts are accepted, which holds for every machine.

    The target answers the prompts once, and the head's drafts are recorded in `OUTPUT_DIR/replay`; existing recordings
    are reused. The policy is written to `OUTPUT_DIR/policy`, for `AutoPolicy.from_pretrained`. With an `eval_dataset`
    it is compared with the best fixed tree, with costs of this machine (`OUTPUT_DIR/costs.json`): `metrics.json` holds
    the same values as `PolicyTrainer.evaluate` returns, and a warning says if the policy is no better.

    `model` is "auto", or a `ThroughputPolicy` (perhaps in a `BaselineGuard`) whose sizes are kept, or its folder or
    Hub id. `args` has `output_dir` and the settings of answers; see `PolicyTrainer` for the other arguments. With
    `args.push_to_hub`, raises an `OSError` if the Hub refuses or the repository has a results file.
    """
    args = args or PolicyTrainingConfig(default_folder(target, "policy"))
    check_type("args", args, PolicyTrainingConfig)
    begun = ThroughputPolicy() if model == "auto" else without_guard(model)[0]
    check_type("model", begun, ThroughputPolicy)
    sizes = begun.to_config()
    datasets = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
    data = PolicyData(Pair.of(target, head, processing_class, args), args, **datasets)
    data.check_has("train_dataset", "fitting")
    begun.check_identity(**data.pair.identity)
    if args.push_to_hub and args.should_save:
        make_unmeasured_repository(args)  # early, so that no work is lost if the Hub refuses

    # Deep enough for the policy's drafts and for the fixed trees of the comparison
    depths = dict.fromkeys(sorted({*_TOP_KS, *begun.widths}), max(_DEPTH, sizes["depth"]))
    texts = data.record("train_dataset", RecordedText, depths)
    kept = {name: sizes[name] for name in ("depth", "top_k", "most_nodes")}
    policy = BaselineGuard(fitted_policy(texts, **kept, **data.pair.identity))
    comparison = None
    if eval_dataset is not None:
        comparison = compare(policy, texts, data.record("eval_dataset", RecordedText, depths), data.costs)
        comparison = replace(comparison, learned_prompts=data.learned("eval_dataset"))

    def write(folder: Path) -> None:
        policy.save_pretrained(folder)
        write_training_prompts(folder, data.first_questions("train_dataset"))
        add_metrics(folder, {"training": data.training})
        write_recipe(folder, args, "fit_policy", data.pair.names)
        if comparison is not None:
            comparison.save(folder)

    if args.should_save:
        if comparison is not None:
            comparison.warn()
        write_whole(Path(str(args.output_dir)) / "policy", write)
    return policy


_DEPTH, _TOP_KS, _LOOKUPS = 6, (1, 2, 4), (0, 4, 8)  # Sizes of the fixed trees with which a fitted policy is compared.


def compare(
    policy: Policy, searched: Sequence[RecordedText], held_out: Sequence[RecordedText], costs: CostModel
) -> "PolicyComparison":
    """Replay `held_out` with a copy of `policy`, which keeps learning, and with the best fixed tree on `searched`."""
    small = ActionGrid.small()
    grid = (small.within(searched[0].depth) if searched[0].block_nodes else small).with_lookups(_LOOKUPS)
    in_searched, in_held_out = (
        OutcomeTable([RankedText.from_recording(text).outcomes(grid, costs) for text in texts])
        for texts in (searched, held_out)
    )
    learner = copy.deepcopy(policy)
    reports = [replay_policy(text, learner, costs) for text in held_out]
    fixed = in_held_out.fixed_seconds[:, in_searched.best_fixed].tolist()
    return PolicyComparison(
        [Timing(len(text), report.seconds) for text, report in zip(held_out, reports, strict=True)],
        [Timing(len(text), seconds) for text, seconds in zip(held_out, fixed, strict=True)],
        float(in_held_out.best_seconds.sum()),
        len({step.verified for report in reports for step in report.steps}),
    )


def without_guard(model: Any) -> tuple[Any, bool]:
    """Return a policy without its `BaselineGuard`, and whether it had one; load the policy if `model` is a name."""
    policy = AutoPolicy.from_pretrained(model) if isinstance(model, str) else model
    return (policy.policy, True) if isinstance(policy, BaselineGuard) else (policy, False)


def new_resps_policy(pair: Pair, args: PolicyTrainingConfig, costs: CostModel, context: int) -> ReSpSPolicy:
    """Make an untrained Re-SpS policy; `drop_hopeless` removes shapes that cannot save time at `context` positions."""
    grid = every = ActionGrid.paper() if args.grid == "paper" else ActionGrid.small()
    levels = pair.head.drafter(DraftCall(pair.target)).most_levels
    if levels is not None:
        grid = every = every.within(levels)
    if args.drop_hopeless:
        grid = every.affordable(lambda shape: costs.step_seconds(shape, context))
    if len(grid.shapes) == 1:
        raise ValueError(
            f"None of the {len(every.shapes)} shapes could pay on this machine, even with all drafts accepted. Decode "
            "with `policy='auto'`, or set `drop_hopeless=False`."
        )
    width = len(pair.head.feature_layers) * text_config(pair.target).hidden_size
    config = ReSpSConfig.paper(width) if args.preset == "paper" else ReSpSConfig(width)
    in_use: dict[str, Any] = {"grid": grid, "persistence": args.persistence_in_use, **pair.identity}
    return ReSpSPolicy(replace(config, **in_use), seed=args.seed)


FEW_TEXTS = 10
_AS_FAST = 0.995  # A smaller loss than half a percent is none to a user.


@dataclass(frozen=True)
class PolicyComparison:
    """Timings of the same held-out texts, once with a policy and once with the best fixed tree."""

    own: Sequence[Timing]  # each text with the policy
    fixed: Sequence[Timing]  # each text with the fixed tree that is fastest on the training texts
    oracle_seconds: float  # least possible seconds of all texts
    distinct_actions: int  # number of different trees that the policy chose
    learned_prompts: int = 0  # number of held-out prompts on which the policy was trained

    @property
    def gain(self) -> float:
        """Ratio of the policy's tokens per second to those of the best fixed tree."""
        return rate(self.own) / rate(self.fixed)

    @cached_property
    def interval(self) -> tuple[float, float]:
        """The 95% interval of `gain` by bootstrap: texts are drawn with replacement."""
        return bootstrap_interval([self.own], [self.fixed])

    def metrics(self) -> dict[str, float]:
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
    def is_slower(self) -> bool:
        """Whether the policy is significantly slower than the best fixed tree, by a difference worth naming."""
        return self.interval[1] < 1.0 and self.gain < _AS_FAST

    @property
    def doubts(self) -> list[str]:
        """Reasons to doubt that the policy is better than the best fixed tree; empty if it clearly is."""
        low, high = self.interval
        reasons = []
        if low <= 1.0:
            figures = f"{self.gain:.3f} times its speed, 95% interval {low:.3f} to {high:.3f}"
            compared = "slower" if self.is_slower else "not faster"
            reasons.append(f"it is {compared} than the best fixed tree beyond chance ({figures})")
        if self.distinct_actions == 1:
            reasons.append("it chose one tree everywhere, which a `FixedPolicy` does as well")
        if self.learned_prompts:
            reasons.append(f"{self.learned_prompts} of the held-out prompts are among those that it was trained on")
        if len(self.own) < FEW_TEXTS:
            count = len(self.own)
            reasons.append(f"it was judged on {count} held-out text{'s' * (count != 1)}, which prove little")
        return reasons

    @property
    def verdict(self) -> str:
        """The result in one sentence, for the model card."""
        if self.doubts:
            opening = f"{1 - self.gain:.0%} slower, do not use it" if self.is_slower else "Not shown to pay"
            return f"{opening}: {'; '.join(self.doubts)}."
        low, high = self.interval
        return (
            f"Faster than the best fixed tree: {self.gain:.3f} times its speed, 95% interval {low:.3f} to {high:.3f} "
            f"over {len(self.own)} held-out texts."
        )

    def warn(self) -> bool:
        """If there are `doubts`, log the `verdict` as a warning; return whether there are any."""
        if self.doubts:
            logger.warning("Compared on held-out texts: %s", self.verdict)
        return bool(self.doubts)

    def save(self, folder: Path) -> None:
        add_metrics(folder, {**self.metrics(), "verdict": self.verdict})
