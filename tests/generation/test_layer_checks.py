"""Layers that draw random numbers: with a tree there are other forwards, and so another text."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from tests.targets import VOCABULARY, Architecture
from transformers_resps import DraftHead, FixedPolicy, TreeShape, attach


PROMPT = torch.tensor([[5, 7, 11, 3]])
ADAPTER = LoraConfig(target_modules=["q_proj"], lora_dropout=0.5, init_lora_weights=False)


@pytest.fixture
def target() -> PreTrainedModel:
    return attach(Architecture("llama").build("sdpa"))


def generate(target: Any, head: Any, **settings: Any) -> Any:
    torch.manual_seed(0)
    policy = None if head is None else FixedPolicy(TreeShape(9, 3, 2))
    return target.generate(
        input_ids=PROMPT, assistant_model=head, policy=policy, do_sample=True, max_new_tokens=8, **settings
    )[0].tolist()


@pytest.mark.parametrize(
    ("model_type", "config", "layer"),
    [("gpt2", {"n_embd": 32, "n_head": 4, "n_layer": 4}, "drop"), ("llama", {"attention_dropout": 0.1}, "self_attn")],
)
def test_a_target_with_dropout_in_training_is_refused(model_type: str, config: dict[str, Any], layer: str) -> None:
    target = attach(Architecture(model_type, config).build("sdpa"))
    head = DraftHead.from_target(target)
    plain = generate(target, None)
    assert generate(target, head) == plain
    target.train()
    with pytest.raises(ValueError, match=f"training mode, where its layer `.*{layer}` draws.*Call `.eval"):
        generate(target, head)


def test_a_target_without_dropout_may_be_in_training(target: PreTrainedModel) -> None:
    head = DraftHead.from_target(target).train()
    assert generate(target.train(), head) == generate(target, None)


def test_an_adapter_with_dropout_is_refused_in_training_alone(target: PreTrainedModel) -> None:
    head, adapted = DraftHead.from_target(target), get_peft_model(target, ADAPTER)
    with pytest.raises(ValueError, match="LlamaForCausalLM is in training mode.*lora_dropout"):
        generate(adapted, head)
    adapted.eval()
    assert generate(adapted, head) == generate(adapted, None)


def test_a_head_whose_adapter_would_draw_the_texts_random_numbers_is_refused(target: PreTrainedModel) -> None:
    """Its dropout takes them from the generator that tokens are sampled from."""
    head = get_peft_model(DraftHead.from_target(target, VOCABULARY), ADAPTER)
    with pytest.raises(ValueError, match="DraftHead is in training mode.*lora_dropout"):
        generate(target, head)
    assert generate(target, head.eval()) == generate(target, None)
