"""Models that would write another text with a tree: by their architecture, or because their layers draw numbers."""

import re
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPTNeoConfig, GPTNeoForCausalLM, PreTrainedModel

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


@pytest.mark.parametrize("attention", ["paged|flash_attention_2", "flex_attention"])
def test_an_attention_without_tree_masks_is_refused(attention: str) -> None:
    target = attach(Architecture("llama").build("sdpa"))
    head = DraftHead.from_target(target)
    target.config._attn_implementation_internal = attention
    with pytest.raises(ValueError, match=rf"{re.escape(attention)}.*set_attn_implementation"):
        target.generate(PROMPT, assistant_model=head)


STATEFUL = {
    "mamba": ({}, "Mamba-1"),
    "bloom": ({"n_layer": 4, "n_head": 4}, "alibi"),
    "mpt": ({"d_model": 32, "n_heads": 4, "n_layers": 4}, "alibi"),
    "llama": ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic'"),
}


@pytest.mark.parametrize("model_type", STATEFUL)
def test_an_architecture_that_cannot_branch_is_refused(model_type: str) -> None:
    config, message = STATEFUL[model_type]
    target = attach(Architecture(model_type, config).build("eager"))
    text = target.config.get_text_config()
    head = DraftHead.from_target(
        Architecture("llama", {"num_hidden_layers": text.num_hidden_layers, "hidden_size": text.hidden_size}).build(
            "sdpa"
        )
    )
    head.config.target = None
    with pytest.raises(ValueError, match=message):
        target.generate(PROMPT, assistant_model=head, max_new_tokens=4)


def test_windows_counted_in_cache_slots_are_refused() -> None:
    """GPT-Neo's local layers, which a short probe would not find out."""
    config = GPTNeoConfig(
        vocab_size=19, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]
    )
    with pytest.raises(ValueError, match="local layers in cache slots"):
        attach(GPTNeoForCausalLM(config)).generate(PROMPT, policy="auto", max_new_tokens=2)
