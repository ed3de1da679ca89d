"""TRL's trainers roll out through an attached model: the same training, fewer forwards of the target."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

from tests.targets import Architecture
from tests.tokenizers import letter_tokenizer
from transformers_resps import FixedPolicy, StepRecord, TreeShape, attach


LOGGED = ("reward", "completions/mean_length", "loss", "grad_norm", "entropy", "objective/entropy")
ROWS = 4
GROUP = {"num_generations": ROWS, "max_completion_length": 32}
GRPO = {"trainer": GRPOTrainer, "config": partial(GRPOConfig, **GROUP)}
RLOO = {"trainer": RLOOTrainer, "config": partial(RLOOConfig, beta=0.0, **GROUP)}
ONLINE_DPO = {  # its rollouts go without a cache while it checkpoints gradients
    "trainer": OnlineDPOTrainer,
    "config": partial(OnlineDPOConfig, max_new_tokens=32, gradient_checkpointing=False),
}
LORA = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=4)
WAYS = {
    "grpo": GRPO,
    "grpo in bfloat16": GRPO | {"bf16": True},
    "grpo with lora": GRPO | {"lora": LORA},
    "rloo": RLOO,
    "online dpo": ONLINE_DPO,
}


class Counted(FixedPolicy):
    """Looks four tokens up at every step, and counts what came of it."""

    def __init__(self) -> None:
        super().__init__(TreeShape(1, 0, 1, lookup=4))
        self.steps: list[StepRecord] = []

    def observe(self, record: StepRecord) -> None:
        self.steps.append(record)


def reward(completions: list[str], **_: Any) -> list[float]:
    return [float(len(text) % 7) for text in completions]


def prompts() -> Dataset:
    letters = "defghijklmnopqrs"
    return Dataset.from_dict({"prompt": [letters[i : i + 3] + letters[i : i + 2] for i in range(13)]})


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., tuple[list[dict[str, float]], list[float]]]:
    """Train for three steps at a temperature at which a random model repeats itself.

    Returns the log of each step, and the trained numbers.
    """

    def run(
        trainer: Any,
        config: Any,
        lora: LoraConfig | None = None,
        bf16: bool = False,
        **given: Any,
    ) -> tuple[list[dict[str, float]], list[float]]:
        model: Any = Architecture("llama", {"max_position_embeddings": 128, "eos_token_id": 2}).build("sdpa")
        args = config(
            output_dir=str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=ROWS,
            temperature=0.02,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=bf16,
            seed=7,
        )
        found = trainer(
            model=attach(model, **given) if given else model,
            reward_funcs=reward,
            args=args,
            train_dataset=prompts(),
            processing_class=letter_tokenizer(),
            peft_config=lora,
        )
        found.train()
        history = [row for row in found.state.log_history if "loss" in row]
        logs = [{name: row[name] for name in LOGGED if name in row} for row in history]
        return logs, [weight.double().sum().item() for weight in found.model.parameters() if weight.requires_grad]

    return run


@pytest.mark.parametrize("way", WAYS)
def test_three_steps_write_the_log_of_plain_training(way: str, train: Any) -> None:
    plain, plain_weights = train(**WAYS[way])
    policy = Counted()
    logs, weights = train(**WAYS[way], policy=policy)
    assert logs == plain and len(plain) == 3
    assert weights == plain_weights
    assert max(step.verified for step in policy.steps) > 1, "no rollout verified a tree"


def test_dropout_is_refused_until_rollouts_are_told_to_leave_it_out(train: Any) -> None:
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=4, lora_dropout=0.5)
    with pytest.raises(ValueError, match="training mode"):
        train(**GRPO, lora=lora, policy=Counted())
    policy = Counted()
    logs, _ = train(**GRPO, lora=lora, policy=policy, eval_mode=True)
    assert len(logs) == 3 and policy.steps
    assert torch.isfinite(torch.tensor([row["loss"] for row in logs])).all()
