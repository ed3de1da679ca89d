"""The settings of `PolicyTrainer` and `fit_policy`."""

import math
from dataclasses import dataclass

from transformers import TrainingArguments

from .base import InitKwargs, check_count, check_mapping, check_setting, option


_CHOICES = {
    "objective": ("full_information", "ppo", "max_entropy_ppo"),
    "grid": ("small", "paper"),
    "preset": ("repaired", "paper"),
}
_POSITIVE = ("persistence", "persistence_in_use", "num_ppo_epochs", "num_mini_batches", "max_steps")
_LEAST = {"max_completion_length": 2, "per_device_train_batch_size": 1, **dict.fromkeys(_POSITIVE, 1)}


@dataclass
class PolicyTrainingConfig(TrainingArguments):
    """Settings of `PolicyTrainer` and `fit_policy`: `TrainingArguments` plus settings of policy optimisation.

    An update decodes or replays `per_device_train_batch_size` prompts, then takes `num_ppo_epochs * num_mini_batches`
    optimiser steps on the results. `max_steps` and `save_steps` must be multiples of that number of steps.

    Source: Re-SpS (arXiv 2601.12212) and its code; training/recipes/policy_resps_paper.yaml has its values.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "target_init_kwargs"]

    objective: str = option(
        "full_information",
        "full_information: maximise the expected reward; needs the outcomes of all actions (replayed texts). ppo: "
        "clipped policy gradient on the actions taken. max_entropy_ppo: with Re-SpS' entropy bonus.",
    )
    live_rollouts: bool = option(False, "Learn by decoding, not from recorded answers; for the two ppo objectives.")
    max_completion_length: int = option(128, "Maximum length of an answer in tokens.")
    temperature: float = option(0.0, "Of the answers; 0 is greedy.")
    persistence: int = option(1, "Steps a decision is held in training; Re-SpS: 10.")
    num_ppo_epochs: int = option(1, "Passes over the decisions of an update; Re-SpS and TRL's PPO: 4.")
    num_mini_batches: int = option(4, "Optimiser steps per pass; Re-SpS: 2.")
    cliprange: float = option(0.2, "PPO: how far the probability ratio may be from 1.")
    entropy_coef: float | None = option(None, "Weight of the entropy bonus; default 0.1, or 0.01 for ppo.")
    vf_coef: float = option(0.5, "PPO: weight of the critic's loss.")
    # The code of Re-SpS sets 0.95 but ends an episode after every decision, so its effective value is 0
    gamma: float = option(0.0, "PPO: weight of the text's next decision; 0, as in effect in Re-SpS, for none.")
    lam: float = option(0.9, "PPO: lambda of the advantage estimate; unused if gamma is 0.")
    reward_includes_drafting: bool = option(True, "Count drafting as part of a step's time; Re-SpS does not.")

    target_init_kwargs: InitKwargs = option(None, "For a loaded target: dtype (default auto), revision, ...")
    grid: str = option("small", "Of a new policy. small: plain and up to 16 nodes. paper: the 177 shapes of Re-SpS.")
    drop_hopeless: bool = option(True, "Of a new policy: drop shapes that could not pay with all drafts accepted.")
    preset: str = option("repaired", "Of a new policy. repaired: normed features, top action. paper: raw, drawn.")
    persistence_in_use: int = option(1, "Of a new policy: steps that a decision is kept in use; Re-SpS: 30.")

    max_steps: int = option(800, "Optimiser steps of the run, in whole updates.")
    # The code of Re-SpS ends an update after 64 decisions, about 8 outputs; whole texts let a run resume exactly
    per_device_train_batch_size: int = option(8, "Prompts per update.")
    save_steps: float = option(80, "Steps between two checkpoints, in whole updates.")
    logging_steps: float = option(40, "Steps between two lines of metrics; the default is ten updates.")
    eval_steps: float | None = option(80, "Steps between two evaluations, if eval_strategy is steps.")
    learning_rate: float = option(3e-4, "Learning rate of Adam; Re-SpS: 3e-4.")
    lr_scheduler_type: str = option("constant", "Any learning rate schedule of Transformers.")
    adam_epsilon: float = option(1e-5, "Adam's epsilon, as in stable-baselines3.")
    max_grad_norm: float = option(0.5, "Largest gradient norm; Re-SpS: 0.5.")

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]  # Transformers is untyped
        for name, allowed in _CHOICES.items():
            check_setting(self, name, getattr(self, name) in allowed, f"one of {', '.join(allowed)}")
        for name, least in _LEAST.items():
            check_count(self, name, least)
        for name in ("temperature", "vf_coef"):
            check_setting(self, name, getattr(self, name) >= 0, "at least 0")
        check_setting(self, "entropy_coef", self.entropy_coef is None or self.entropy_coef >= 0, "at least 0, or None")
        check_setting(self, "cliprange", self.cliprange > 0, "above 0")
        for name in ("gamma", "lam"):
            check_setting(self, name, 0 <= getattr(self, name) <= 1, "from 0 to 1")
        check_mapping(self, "target_init_kwargs")
        is_whole = self.gradient_accumulation_steps == 1
        check_setting(self, "gradient_accumulation_steps", is_whole, "1: choose `num_mini_batches` instead")
        knows_all = self.objective == "full_information"
        needed = "'ppo' or 'max_entropy_ppo' with `live_rollouts`, which show the outcome of the taken action alone"
        check_setting(self, "objective", not (knows_all and self.live_rollouts), needed)
        self._check_updates()
        self.remove_unused_columns = False
        if self.entropy_coef is None:
            self.entropy_coef = 0.01 if self.objective == "ppo" else 0.1

    @property
    def steps_per_update(self) -> int:
        return self.num_ppo_epochs * self.num_mini_batches

    def _check_updates(self) -> None:
        """Raise `ValueError` if the run or a checkpoint would end inside an update, where a run cannot be resumed."""
        saves = str(self.save_strategy.value)  # type: ignore[attr-defined]  # `__post_init__` has made it an enum
        check_setting(self, "save_strategy", saves != "epoch", "'steps', 'best' or 'no': an epoch ends in an update")
        for name in ("max_steps", {"steps": "save_steps", "best": "eval_steps"}.get(saves, "max_steps")):
            steps = getattr(self, name)
            if 0 < steps < 1:
                steps = math.ceil(self.max_steps * steps)  # Transformers takes a number below 1 as a share
            below = int(steps) // self.steps_per_update * self.steps_per_update
            nearest = " or ".join(str(near) for near in (below, below + self.steps_per_update) if near)
            needed = f"whole updates of {self.steps_per_update} steps (num_ppo_epochs x num_mini_batches): {nearest}"
            check_setting(self, name, steps == below, needed)
