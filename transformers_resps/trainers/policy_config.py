"""The settings of `PolicyTrainer`."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from .checks import check_setting


OBJECTIVES = ("full_information", "ppo", "max_entropy_ppo")
REWARDS = ("gain", "mean_rate")


@dataclass
class PolicyTrainingConfig(TrainingArguments):
    """Settings of `PolicyTrainer`: Transformers' `TrainingArguments` and those of policy optimisation.

    An update makes decisions over some texts, then takes `epochs * minibatches` optimiser steps on their outcomes.
    `max_steps`, `save_steps`, `logging_steps` and `eval_steps` follow from this and cannot be set.

    Raises:
        ValueError: a setting is out of its range.

    Source: Re-SpS (arXiv 2601.12212) and its code; training/recipes/policy_resps_paper.yaml has its values.
    """

    objective: str = field(
        default="full_information",
        metadata={
            "help": "full_information: maximise the expected gain; needs the outcome of every action (replayed "
            "texts). ppo: clipped policy gradient on the outcomes of the actions taken. "
            "max_entropy_ppo: ppo with the entropy bonus of Re-SpS."
        },
    )
    reward: str = field(
        default="gain",
        metadata={
            "help": "gain: tokens minus seconds x the current rate; it maximises total tokens / total seconds. "
            "mean_rate: mean of the steps' tokens per second, the reward of Re-SpS (equations 3 and 5)."
        },
    )
    updates: int = field(default=200, metadata={"help": "Number of updates."})
    texts_per_update: int = field(
        default=8,
        metadata={
            "help": "Whole texts per update. The code of Re-SpS cuts after 64 decisions, which is about 8 outputs; "
            "whole texts can be repeated exactly after a resume."
        },
    )
    persistence: int = field(default=10, metadata={"help": "Steps a decision is held in training; Re-SpS: 10."})
    epochs: int = field(default=4, metadata={"help": "Passes over the decisions of an update."})
    minibatches: int = field(default=2, metadata={"help": "Optimiser steps per pass."})
    clip: float = field(default=0.2, metadata={"help": "PPO: how far the probability ratio may be from 1."})
    entropy_coefficient: float | None = field(
        default=None,
        metadata={"help": "Weight of the entropy bonus; default 0.1, or 0.01 for ppo."},
    )
    value_coefficient: float = field(default=0.5, metadata={"help": "PPO: weight of the critic's loss."})
    discount: float = field(
        default=0.0,
        metadata={
            "help": "PPO: weight of the next decision of the same text; 0 for none. The code of Re-SpS sets 0.95, "
            "but ends an episode after every decision, which is the same as 0."
        },
    )
    gae_decay: float = field(
        default=0.9, metadata={"help": "PPO: lambda of the advantage estimate; unused if discount is 0."}
    )
    save_updates: int = field(default=50, metadata={"help": "Updates between two checkpoints."})
    logging_updates: int = field(default=10, metadata={"help": "Updates between two lines of metrics."})
    eval_updates: int = field(
        default=50, metadata={"help": "Updates between two evaluations, if eval_strategy is steps."}
    )

    learning_rate: float = field(default=3e-4, metadata={"help": "Learning rate of Adam; Re-SpS: 3e-4."})
    lr_scheduler_type: str = field(
        default="constant", metadata={"help": "Any learning rate schedule of Transformers."}
    )
    adam_epsilon: float = field(default=1e-5, metadata={"help": "Adam's epsilon, as in stable-baselines3."})
    max_grad_norm: float = field(default=0.5, metadata={"help": "Largest gradient norm; Re-SpS: 0.5."})

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]  # Transformers is untyped
        check_setting(self, "objective", self.objective in OBJECTIVES, f"one of {', '.join(OBJECTIVES)}")
        check_setting(self, "reward", self.reward in REWARDS, f"one of {', '.join(REWARDS)}")
        for name in ("updates", "texts_per_update", "persistence", "epochs", "minibatches"):
            check_setting(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("discount", "gae_decay"):
            check_setting(self, name, 0 <= getattr(self, name) <= 1, "from 0 to 1")
        steps = self._steps(self.updates)
        check_setting(self, "max_steps", self.max_steps in (-1, steps), "left out: set `updates`")
        is_whole = self.gradient_accumulation_steps == 1
        check_setting(self, "gradient_accumulation_steps", is_whole, "1: choose `minibatches` instead")
        self.remove_unused_columns = False
        self.per_device_train_batch_size = 1
        self.max_steps = steps
        self.save_steps = self._steps(self.save_updates)
        self.logging_steps = self._steps(self.logging_updates)
        self.eval_steps = self._steps(self.eval_updates)
        if self.entropy_coefficient is None:
            self.entropy_coefficient = 0.01 if self.objective == "ppo" else 0.1

    @property
    def steps_per_update(self) -> int:
        """Optimiser steps in an update."""
        return self._steps(1)

    def _steps(self, updates: int) -> int:
        return updates * self.epochs * self.minibatches
