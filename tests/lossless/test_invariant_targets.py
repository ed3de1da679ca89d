"""With `invariant=True` every architecture writes one text in bfloat16, whatever drafts and reads: the same logits."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, set_seed

from tests.targets import _EXPERTS, _MIXED, _MLA, ARCHITECTURES, VOCABULARY, Architecture
from transformers_resps import DraftHead, FixedPolicy, TreeShape, attach


# So wide that the kernels of larger models run, which take products of 4,096 multiplications and more.
_WIDE = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32, "initializer_range": 0.25}
_WIDE_MLA = {"kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 24, "head_dim": 16}
# The others of the list are built of the same layers as these; `_has_same_bits` compares them all.
_NAMES = ("llama", "qwen2-mixed-windows", "qwen3_moe", "gemma3_text", "gpt_neox", "gpt2", "cohere2", "deepseek_v3")
_NAMES += ("gpt_oss",)
_GROUPED = {"n_group": 2, "topk_group": 2, "first_k_dense_replace": 1}
_SHARED = {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": VOCABULARY, "num_kv_shared_layers": 2}
SERVED = [each for each in ARCHITECTURES if str(each) in _NAMES] + [
    Architecture("gemma4_text", _SHARED | {"sliding_window": 8, "layer_types": _MIXED, "global_head_dim": 64}),
    Architecture("gpt_bigcode", {"n_head": 4, "n_layer": 4, "n_positions": 256}),
    Architecture("glm4_moe", _EXPERTS | _GROUPED | {"n_routed_experts": 32}),
]


def wide(architecture: Architecture) -> PreTrainedModel:
    """A random model of some width."""
    changed = dict(_WIDE)
    if architecture.config.keys() >= _MLA.keys():
        changed |= _WIDE_MLA
    if architecture.has_experts:
        changed |= {"moe_intermediate_size": 64}
    if architecture.model_type in ("gpt2", "gpt_bigcode"):
        changed |= {"n_embd": 128}
    widened = replace(architecture, config=architecture.config | changed)
    return attach(widened.build(architecture.attention[0]).to(torch.bfloat16))


def prompts(length: int) -> Tensor:
    """Two, without token 0, whose embedding is zero in some."""
    return torch.randint(1, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(2))


def written(target: Any, inputs: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """The tokens that the first row got, and their logits."""
    set_seed(3)
    call: dict[str, Any] = {
        "max_new_tokens": 6,
        "return_dict_in_generate": True,
        "output_logits": True,
        "suppress_tokens": [0],
    }
    out = target.generate(**inputs, **{"invariant": True} | call | options)
    return out.sequences[0, inputs["input_ids"].shape[1] :], torch.stack(out.logits, dim=1)[0]


LOOKUP: dict[str, Any] = {"policy": FixedPolicy(TreeShape(1, 0, 1, lookup=5))}
AUTO: dict[str, Any] = {"policy": "auto"}


@pytest.mark.parametrize("architecture", SERVED, ids=str)
def test_one_text_whatever_drafts_and_reads(architecture: Architecture) -> None:
    """The prompt ends where a part of it lies in a block; its window, if any, is far shorter."""
    target = wide(architecture)
    torch.manual_seed(1)
    head: dict[str, Any] = {
        "assistant_model": DraftHead.from_target(target),
        "policy": FixedPolicy(TreeShape(24, 3, VOCABULARY)),
    }
    tokens = prompts(75)
    mask = torch.ones_like(tokens)
    mask[0, :6] = 0
    alone = {"input_ids": tokens[:1, 6:], "attention_mask": mask[:1, 6:]}
    batch = {"input_ids": tokens * mask, "attention_mask": mask}
    expected, logits = written(target, alone)
    arms = [(alone, head | {"prefill_chunk_size": 64}), (alone, AUTO | {"prefill_chunk_size": 7}), (batch, head)]
    for inputs, options in arms:
        text, found = written(target, inputs, **options)
        assert text.tolist() == expected.tolist()
        assert torch.equal(found, logits)
    expected, logits = written(target, alone, do_sample=True)
    text, found = written(target, alone, do_sample=True, **LOOKUP)
    assert text.tolist() == expected.tolist()
    assert torch.equal(found, logits)
    if not architecture.has_experts:  # whose choice rounding may turn
        stock = target(alone["input_ids"]).logits[0, -1]
        logits = written(target, alone)[1][0]
        assert (logits - stock).abs().max() < 0.15 * stock.abs().max(), "not the same model"


def test_in_the_normal_mode_logits_differ() -> None:
    """The control; and there is only one chunk size left to try, a forward for each token."""
    target = wide(SERVED[0])
    tokens = prompts(75)[:1]
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    expected = written(target, inputs)[1]
    assert torch.equal(written(target, inputs, prefill_chunk_size=1)[1], expected)
    plain = written(target, inputs, invariant=False)[1]
    assert not torch.equal(written(target, inputs, invariant=False, prefill_chunk_size=1)[1][0], plain[0])


_LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": [2.0] * 16, "rope_theta": 10000.0}
REFUSED = {
    "chunked_attention": Architecture("llama4_text", {"attention_chunk_size": 8, "intermediate_size_mlp": 64}),
    "attn_logit_softcapping": next(each for each in ARCHITECTURES if each.model_type == "gemma2"),
    "experts of JetMoe": Architecture("jetmoe", _EXPERTS),
    "longrope": Architecture("phi3", {"rope_parameters": _LONGROPE | {"original_max_position_embeddings": 96}}),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_others_are_refused_by_name(reason: str) -> None:
    tokens = prompts(9)[:1]
    with pytest.raises(ValueError, match=reason):
        written(wide(REFUSED[reason]), {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)})
