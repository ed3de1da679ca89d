"""FlashAttention reads prompts and lone tokens; a fake stands for its kernel, which takes no tree's mask."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.modeling_utils import AttentionInterface

from tests.targets import Architecture
from transformers_resps import DraftHead, FixedPolicy, TreeShape, attach
from transformers_resps.verifying.attention import use_gqa_attention


FLASH = "flash_attention_2"
PROMPTS = torch.tensor([[5, 7, 11, 3, 9, 7, 11], [0, 0, 4, 8, 4, 8, 4]])
INPUTS = {"input_ids": PROMPTS, "attention_mask": (PROMPTS > 0).long()}


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each forward that the fake kernel attends to."""
    counts: list[int] = []

    def fake(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        assert attention_mask is None or attention_mask.dim() == 2, "the kernel fails on a mask for each node"
        counts.append(query.shape[2])
        order = torch.arange(key.shape[2])
        slots = order[-query.shape[2] :, None]
        shown = (order <= slots) & (order > slots - (options.get("sliding_window") or len(order)))
        if attention_mask is not None:
            shown = shown & attention_mask[:, None, None].bool() | (order == slots)
        key, value = (repeat_kv(states, module.num_key_value_groups) for states in (key, value))
        scale = options.get("scaling")
        return functional.scaled_dot_product_attention(query, key, value, shown, scale=scale).transpose(1, 2), None

    monkeypatch.setitem(AttentionInterface._global_mapping, FLASH, fake)
    return counts


def flashing(**config: Any) -> Any:
    target = Architecture("mistral", {"sliding_window": None} | config).build("sdpa")
    target.config._attn_implementation = FLASH
    return attach(target)


@pytest.mark.parametrize("config", [{}, {"sliding_window": 5}], ids=["full", "window"])
@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("rows", [1, 2])
def test_trees_write_what_flash_attention_writes(
    read: list[int], config: dict[str, Any], do_sample: bool, rows: int
) -> None:
    target = flashing(**config)
    head = DraftHead.from_target(target)
    inputs = {name: value[:rows] for name, value in INPUTS.items()}
    texts, states = [], []
    for drafting in ({}, {"assistant_model": head, "policy": FixedPolicy(TreeShape(9, 3, 3))}):
        torch.manual_seed(0)
        read.clear()
        out = target.generate(
            **inputs, **drafting, do_sample=do_sample, max_new_tokens=16, return_dict_in_generate=True
        )
        texts.append(out.sequences.tolist())
        states.append(torch.get_rng_state())
    assert texts[0] == texts[1] and torch.equal(*states)
    assert PROMPTS.shape[1] in read, "it reads the prompt"
    assert max(map(max, (step.accepted for step in out.speculation.steps))) > 0
    assert target.config._attn_implementation == FLASH


def test_lone_tokens_are_read_as_in_plain_decoding(read: list[int]) -> None:
    """Bit for bit: FlashAttention computes in half precision."""
    target = flashing()
    with_trees: dict[str, Any] = {
        "assistant_model": DraftHead.from_target(target),
        "policy": FixedPolicy(TreeShape(9, 3, 3)),
    }
    lone = {}
    plain: dict[str, Any] = {"policy": FixedPolicy(TreeShape.plain())}
    for name, drafting in {"trees": with_trees, "none": plain}.items():
        target.generate(PROMPTS[:1], **drafting, max_new_tokens=2)  # the first call probes
        read.clear()
        target.generate(PROMPTS[:1], **drafting, max_new_tokens=12)
        assert set(read) <= {PROMPTS.shape[1], 1}
        lone[name] = read.count(1)
    assert lone["none"] == 11 * target.config.num_hidden_layers > lone["trees"]


def test_a_kernel_is_taught_once(read: list[int]) -> None:
    target = flashing()
    registered = []
    for _ in range(2):
        with use_gqa_attention(target):
            registered.append(AttentionInterface._global_mapping[FLASH])
    assert registered[0] is registered[1]


def test_a_target_that_takes_no_sdpa_is_refused(read: list[int]) -> None:
    """Gemma 2 caps its scores, which FlashAttention can and sdpa cannot."""
    target: Any = attach(Architecture("gemma2", {"sliding_window": 8, "query_pre_attn_scalar": 8}).build("eager"))
    head = DraftHead.from_target(target)
    target.config._attn_implementation = FLASH
    with pytest.raises(ValueError, match=r"Gemma2ForCausalLM.*flash_attention_2.*set_attn_implementation\('eager'\)"):
        target.generate(PROMPTS[:1], assistant_model=head, max_new_tokens=4)
    target.set_attn_implementation("eager")
    assert target.generate(PROMPTS[:1], assistant_model=head, max_new_tokens=4).shape == (1, PROMPTS.shape[1] + 4)
