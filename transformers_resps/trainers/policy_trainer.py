"""Train a policy on prompts, in the manner of TRL: the recording and the measuring happen inside."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_utils import TrainOutput

from ..data import write_training_prompts
from ..head import DraftHead
from ..policy import BaselineGuard, ReSpSPolicy, SavedPolicy, ThroughputPolicy
from .checkpoints import check_resumable, newest_checkpoint
from .checks import check_kinds
from .loading import default_folder
from .pair import Pair
from .policy_comparison import PolicyComparison
from .policy_config import PolicyTrainingConfig
from .policy_data import PolicyData
from .renamed import check_renamed
from .rewards import RewardFunc
from .rollout_trainer import RolloutTrainer
from .starting_policy import loaded_policy, new_resps_policy
from .throughput_fit import compare, fit, recorded_depths


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
