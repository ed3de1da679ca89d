"""Fit a `ThroughputPolicy` to recorded answers, and compare it on others.

The policy that training starts from: one that is given, or a new one for the target, the head and the machine.

Train a policy on prompts, in the manner of TRL: the recording and the measuring happen inside.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_utils import TrainOutput

from ..data import write_training_prompts
from ..heads import DraftHead
from ..policies import (
    ActionGrid,
    AutoPolicy,
    BaselineGuard,
    CostModel,
    Policy,
    ReSpSConfig,
    ReSpSPolicy,
    SavedPolicy,
    ThroughputPolicy,
)
from ..replay import Oracle, OutcomeTable, RankedText, RecordedText, fitted_policy, replay_policy
from ..telemetry.report import Timing
from ..tree import TreeShape
from .base import check_kinds, check_resumable, newest_checkpoint
from .loading import Pair, default_folder
from .policy_config import PolicyTrainingConfig
from .policy_data import PolicyData
from .renamed import check_renamed
from .rollout_trainer import PolicyComparison, RolloutTrainer
from .rollouts import RewardFunc


_DEPTH, _TOP_KS = 6, (1, 2, 4)  # what the fixed trees ask for that a policy is compared with
_LOOKUPS = (0, 4, 8)


def recorded_depths(policy: ThroughputPolicy) -> dict[int, int]:
    """Levels to record for each `top_k`, so that the policy and the fixed trees can be replayed."""
    sizes = policy.to_config()
    return dict.fromkeys(sorted({*_TOP_KS, sizes["top_k"]}), max(_DEPTH, sizes["depth"]))


def fit(policy: ThroughputPolicy, texts: Sequence[RecordedText], pair: Pair) -> BaselineGuard:
    """A policy of the same sizes, fitted to `texts`, in its guard."""
    sizes: dict[str, Any] = {name: policy.to_config()[name] for name in ("depth", "top_k", "most_nodes")}
    return BaselineGuard(fitted_policy(texts, **sizes, **pair.identity))


def compare(
    policy: Policy, searched: Sequence[RecordedText], held_out: Sequence[RecordedText], costs: CostModel
) -> PolicyComparison:
    """Replay held-out texts with a policy, which goes on learning as in use, and with the best fixed tree.

    Args:
        policy: not changed.
        searched: the texts on which the best fixed tree is found.
        held_out: the texts on which both are compared.
        costs: of steps.
    """
    grid = ActionGrid.small().with_lookups(_LOOKUPS)
    found, tested = (
        Oracle(OutcomeTable([RankedText.from_recording(text).outcomes(grid, costs) for text in texts]))
        for texts in (searched, held_out)
    )
    learner = copy.deepcopy(policy)
    reports = [replay_policy(text, learner, costs) for text in held_out]
    fixed = tested.fixed_seconds[:, found.best_fixed].tolist()
    return PolicyComparison(
        [Timing(len(text), report.seconds) for text, report in zip(held_out, reports, strict=True)],
        [Timing(len(text), seconds) for text, seconds in zip(held_out, fixed, strict=True)],
        float(tested.best_seconds.sum()),
        len({step.verified for report in reports for step in report.steps}),
    )


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


RENAMED = {
    "policy": "`model`",
    "rollouts": "`train_dataset`",
    "eval_rollouts": "`eval_dataset`",
    "tokenizer": "`processing_class`",
    "reward_funcs": "`reward_func`",
}


class PolicyTrainer(RolloutTrainer):
    """Trains a policy for a target and its head on your prompts.

    The target answers the prompts once, and it is recorded what every tree would have emitted at every position
    (`OUTPUT_DIR/replay`). What steps cost is measured on this machine (`OUTPUT_DIR/costs.json`). Then a `ReSpSPolicy`
    learns from both, without decoding; with `args.live_rollouts` it learns by decoding. A `ThroughputPolicy` is fitted
    to the recorded answers in one go. Recordings and costs that are there are used again, so a run that was stopped at
    any moment goes on with `train(resume_from_checkpoint=True)`, and ends as an uninterrupted one.

    The finished policy is in `OUTPUT_DIR/policy`, for `AutoPolicy.from_pretrained`. If there is an `eval_dataset`,
    `metrics.json` beside it compares it with the best fixed tree, and a warning says if it is no better.

    Logged for each update: `tokens_per_second`; `reward`, of another reward than the default; `entropy` in nats;
    `distinct_actions`, how many actions are the likeliest one of some decision. On recorded texts also `gain_regret`,
    the tokens per step lost compared with the best actions, and `oracle_regret`, the time lost compared with the
    fastest sequence of shapes, as a share of the fastest time. Live also `dropped`, the decisions left out because the
    clock jumped.

    Args:
        model: the policy: "resps" for a new `ReSpSPolicy` over the trees that can pay on this machine; "auto" for what
            `policy="auto"` means in `generate`, to be fitted; or a `ReSpSPolicy` or `ThroughputPolicy`, guarded or
            not, or its folder or Hub id. A `ReSpSPolicy` is trained in place.
        args: see `PolicyTrainingConfig`.
        train_dataset: a `datasets.Dataset` with a column `prompt` (a string, taken as it is, or messages) or
            `messages` (used up to the last question).
        eval_dataset: held-out prompts, in the same columns.
        processing_class: the target's tokenizer; `None` loads it from where the target came from.
        callbacks: added to the usual ones.
        target: the model that decodes, attached or not, or its folder or Hub id.
        head: its draft head, or the folder or Hub id of it.
        reward_func: what a `ReSpSPolicy` maximises. "tokens_per_second": total tokens over total seconds. "mean_rate":
            mean of the steps' tokens per second, as in Re-SpS. Or a function that returns one reward per outcome, of
            keywords `emitted`, `seconds` and `mean_rates` (tensors of one shape: tokens and seconds of an action while
            it is held, and the mean of its steps' tokens per second), `rate` (tokens per second of the policy) and
            `persistence` (steps that an action is held).
        kwargs: passed to `transformers.Trainer`.

    Raises:
        ValueError: an argument is something else, or they do not fit together.
    """

    def __init__(
        self,
        model: ReSpSPolicy | ThroughputPolicy | BaselineGuard | str,
        args: PolicyTrainingConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        *,
        target: PreTrainedModel | str,
        head: DraftHead | str,
        reward_func: str | RewardFunc = "tokens_per_second",
        **kwargs: Any,
    ) -> None:
        check_renamed("PolicyTrainer", kwargs, RENAMED)
        args = args or PolicyTrainingConfig(default_folder(target, self.artefact_name))
        check_kinds("PolicyTrainer", args=(args, PolicyTrainingConfig))
        self.data = PolicyData(Pair.of(target, head, processing_class, args), args)
        policy, self._is_guarded = loaded_policy(model, self.data.pair)
        given = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
        for name, dataset in given.items():
            if dataset is not None:
                self.data.add(name, dataset)
        if isinstance(policy, ThroughputPolicy) and (args.live_rollouts or reward_func != "tokens_per_second"):
            raise ValueError(
                "A `ThroughputPolicy` is fitted to recorded answers and maximises tokens per second. Leave out "
                "`live_rollouts` and `reward_func`, or train `model='resps'`."
            )
        if policy is None:
            policy = new_resps_policy(self.data.pair, args, self.data.costs, self.data.usual_context)
        super().__init__(policy, args, reward_func=reward_func, callbacks=callbacks, **given, **kwargs)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Record what is not recorded yet, then train; see `ArtefactTrainer.train`.

        Args:
            resume_from_checkpoint: a checkpoint's folder; `True` for the newest one in `output_dir`, or for none if
                the run was stopped before it wrote one.
            args: see `transformers.Trainer.train`.
            kwargs: see there.

        Raises:
            ValueError: there is no `train_dataset`, or a checkpoint in the output folder was trained on other inputs.
            KeyboardInterrupt: Ctrl-C was pressed.
            SystemExit: SIGTERM was received.
        """
        data, folder = self.data, str(self.args.output_dir)
        if "train_dataset" not in data.prompts:
            raise ValueError("`train_dataset` is missing, but training needs prompts. Pass a dataset of them.")
        if isinstance(self.policy, ReSpSPolicy):
            grid = self.policy.config.grid
            with self.args.main_process_first(desc="comparing with the run that is resumed"):
                check_resumable(folder, data.facts(grid))
            self.rollouts = data.live() if self.args.live_rollouts else data.replays("train_dataset", grid)
            if "eval_dataset" in data.prompts:
                data.replays("eval_dataset", grid)
            newest = newest_checkpoint(folder) if resume_from_checkpoint is True else resume_from_checkpoint
            result: TrainOutput = super().train(newest, *args, **kwargs)
        else:
            result = self._fit(_unguarded(self.policy))
        self._is_trained = self.is_finished
        if self._is_trained and "eval_dataset" in data.prompts:
            self.judge(self.compared())
        return result

    def _fit(self, policy: ThroughputPolicy) -> TrainOutput:
        """Fit the policy to the recorded answers."""
        texts = self.data.texts("train_dataset", recorded_depths(policy))
        self.policy = fit(policy, texts, self.data.pair)
        metrics: dict[str, float] = {"texts": len(texts), "tokens": sum(map(len, texts))}
        self.log(dict(metrics))
        if self.args.should_save:
            self._finish()
        return TrainOutput(0, 0.0, metrics)

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """Compare the policy with the best fixed tree and the oracle on held-out prompts, recorded if they are not
        yet, with the costs of this machine. After training, `metrics.json` in the policy's folder tells the result.

        Args:
            eval_dataset: prompts; `None` for those of the trainer.
            ignore_keys: not used.
            metric_key_prefix: stands before each name.

        Returns:
            With the prefix: `tokens_per_second`; `best_fixed_tokens_per_second`, of the fixed tree that is fastest on
            the training prompts (on the held-out ones if training is live); `gain_over_best_fixed`, their ratio, and
            its 95% interval over texts, `gain_over_best_fixed_low` and `_high`; `oracle_regret`; `distinct_actions`,
            how many trees it chose; `held_out_texts`.

        Raises:
            ValueError: there are no prompts.
        """
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def compared(self, eval_dataset: Any = None) -> PolicyComparison:
        """As `evaluate`, but logs nothing."""
        data, held_out = self.data, "eval_dataset" if eval_dataset is None else "test"
        if eval_dataset is not None:
            data.add(held_out, eval_dataset)
        if held_out not in data.prompts:
            raise ValueError("There is no `eval_dataset`, but evaluation needs held-out prompts. Pass some.")
        searched = held_out if self.args.live_rollouts or "train_dataset" not in data.prompts else "train_dataset"
        if isinstance(self.policy, ReSpSPolicy):
            grid = self.policy.config.grid
            comparison = self.compared_on(data.replays(held_out, grid), data.replays(searched, grid))
        else:
            depths = recorded_depths(_unguarded(self.policy))
            texts = (data.texts(searched, depths), data.texts(held_out, depths))
            comparison = compare(self.policy, *texts, data.costs)
        return replace(comparison, learned_prompts=data.learned(held_out))

    def write_artefact(self, folder: Path) -> None:
        """Write the policy for its target and head, in its guard if it came in one, and hashes of its prompts."""
        policy = self.policy
        if isinstance(policy, ReSpSPolicy):
            policy = ReSpSPolicy(replace(policy.config, **self.data.pair.identity), policy.network)
            policy = BaselineGuard(policy) if self._is_guarded else policy
        policy.save_pretrained(folder)
        write_training_prompts(folder, self.data.first_questions)


def _unguarded(policy: SavedPolicy) -> ThroughputPolicy:
    return cast(ThroughputPolicy, policy.policy if isinstance(policy, BaselineGuard) else policy)
