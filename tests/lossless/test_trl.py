"""TRL's trainers roll out through an attached model: the same completions and the same training."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

from tests.decoding.rows import Noted
from tests.targets import Architecture
from tests.tokenizers import letter_tokenizer
from transformers_resps import SuffixMemory, TreeShape, attach


ROWS = 4
SEEDS = 16  # of targets
GROUP = {"num_generations": ROWS, "max_completion_length": 32, "temperature": 0.3}
GRPO = {"trainer": GRPOTrainer, "config": partial(GRPOConfig, **GROUP)}
RLOO = {"trainer": RLOOTrainer, "config": partial(RLOOConfig, beta=0.0, **GROUP)}
ONLINE_DPO = {  # its rollouts go without a cache while it checkpoints gradients
    "trainer": OnlineDPOTrainer,
    "config": partial(OnlineDPOConfig, max_new_tokens=32, temperature=0.02, gradient_checkpointing=False),
}
LORA = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=4)
LOOKUPS = TreeShape(1, 0, 1, lookup=4)
WAYS = {"grpo": GRPO, "grpo with lora": GRPO | {"lora": LORA}, "rloo": RLOO, "online dpo": ONLINE_DPO}


@dataclass
class Training:
    """What a run wrote: completions, loss and gradient norm of each step, the trained numbers, and dtypes seen."""

    completions: list[str] = field(default_factory=list)
    steps: list[tuple[float, float]] = field(default_factory=list)
    weights: list[torch.Tensor] = field(default_factory=list)
    dtypes: set[torch.dtype] = field(default_factory=set)

    @property
    def shows_something(self) -> bool:
        """It wrote several texts and learned, so that equal numbers are no accident."""
        return len(set(self.completions)) > ROWS and sum(norm > 0 for _, norm in self.steps) >= 2

    def reward(self, completions: list[str], **_: Any) -> list[float]:
        self.completions += completions
        return [float(sum(map(ord, text)) % 7) for text in completions]


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., Training]:
    """Train a float32 target for three steps."""

    def run(
        trainer: Any,
        config: Any,
        lora: LoraConfig | None = None,
        bf16: bool = False,
        seed: int = 0,
        callbacks: list[TrainerCallback] | None = None,
        **given: Any,
    ) -> Training:
        found, sizes = Training(), {"max_position_embeddings": 128, "eos_token_id": 2}
        model: Any = Architecture("llama", sizes).build("sdpa", seed).float()
        model.model.layers[0].mlp.register_forward_hook(lambda _, __, output: found.dtypes.add(output.dtype))
        letters = "defghijklmnopqrs"
        steps = {"max_steps": 3, "per_device_train_batch_size": ROWS, "learning_rate": 1e-3, "logging_steps": 1}
        quiet = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True}
        args = config(output_dir=str(tmp_path), **steps, **quiet, bf16=bf16, seed=7)
        trained = trainer(
            model=attach(model, **given) if given else model,
            reward_funcs=found.reward,
            args=args,
            train_dataset=Dataset.from_dict({"prompt": [letters[i : i + 3] + letters[i : i + 2] for i in range(13)]}),
            processing_class=letter_tokenizer(),
            peft_config=lora,
            callbacks=callbacks,
        )
        trained.train()
        found.steps = [(row["loss"], row["grad_norm"]) for row in trained.state.log_history if "loss" in row]
        found.weights = [weight.detach() for weight in trained.model.parameters() if weight.requires_grad]
        return found

    return run


def drafted(train: Any, **options: Any) -> tuple[int, Training]:
    """A training in which drafted tokens were kept, and the seed of its target: rounding decides what each writes."""
    for seed in range(SEEDS):
        policy = Noted(LOOKUPS)
        found = train(**options, policy=policy, seed=seed)
        if policy.accepted and found.shows_something:
            return seed, found
    pytest.fail(f"Of {SEEDS} targets none kept a drafted token, wrote several texts and learned.")


@pytest.mark.parametrize("way", WAYS)
def test_three_steps_are_those_of_plain_training(way: str, train: Any) -> None:
    seed, found = drafted(train, **WAYS[way])
    plain = train(**WAYS[way], seed=seed)
    assert found.completions == plain.completions
    assert found.steps == plain.steps and len(plain.steps) == 3
    assert all(torch.equal(one, other) for one, other in zip(found.weights, plain.weights, strict=True))


class Forgetting(TrainerCallback):
    """Remembers the rollouts of the newest step alone."""

    def __init__(self, memory: SuffixMemory) -> None:
        self.memory, self.held = memory, list[int]()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.memory.advance(keep=1)
        self.held.append(len(self.memory))


def test_a_memory_of_rollouts_changes_no_training(train: Any) -> None:
    for seed in range(SEEDS):
        memory, policy = SuffixMemory(), Noted(LOOKUPS)
        forgetting = Forgetting(memory)
        found = train(**GRPO, assistant_model=memory, policy=policy, seed=seed, callbacks=[forgetting])
        assert len(forgetting.held) == 3 and all(0 < held <= ROWS * 33 for held in forgetting.held)
        if found.shows_something and sum(step.proposed.memory for step in policy.steps):
            break
    else:
        pytest.fail(f"Of {SEEDS} targets none kept a remembered token, wrote several texts and learned.")
    plain = train(**GRPO, seed=seed)
    assert found.completions == plain.completions and found.steps == plain.steps
    assert all(torch.equal(one, other) for one, other in zip(found.weights, plain.weights, strict=True))


def test_rollouts_under_bfloat16_autocast_train(train: Any) -> None:
    _, found = drafted(train, **GRPO, bf16=True)
    assert torch.bfloat16 in found.dtypes
    assert len(found.steps) == 3 and torch.isfinite(torch.tensor(found.steps)).all()


def test_dropout_is_refused_until_rollouts_are_told_to_leave_it_out(train: Any) -> None:
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=4, lora_dropout=0.5)
    with pytest.raises(ValueError, match="training mode"):
        train(**GRPO, lora=lora, policy=Noted(LOOKUPS))
    policy = Noted(LOOKUPS)
    found = train(**GRPO, lora=lora, policy=policy, eval_mode=True)
    assert len(found.steps) == 3 and policy.steps
    assert torch.isfinite(torch.tensor(found.steps)).all()
