"""Every architecture the contract is held on: tiny, random, its vocabulary so small that wide trees are right."""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel


VOCABULARY = 19
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class Architecture:
    model_type: str
    config: dict[str, Any] = field(default_factory=dict)
    attention: tuple[str, ...] = ("sdpa", "eager")
    name: str = ""

    @property
    def has_experts(self) -> bool:
        return "num_experts_per_tok" in self.config

    def __str__(self) -> str:
        return self.name or self.model_type

    def dtype(self, attention: str) -> torch.dtype:
        """fp64, so that rounding can hide nothing.

        Eager attention takes its softmax in fp32, where the mask of fp64 is minus infinity and a padded row NaN, so
        plain `generate` itself fails there: fp32. So do grouped experts, which have no fp64 kernel.
        """
        return torch.float64 if attention == "sdpa" and not self.has_experts else torch.float32

    def build(self, attention: str, seed: int = 0) -> PreTrainedModel:
        """A random model without special tokens."""
        config = AutoConfig.for_model(self.model_type, **(SIZES | {"initializer_range": 0.6} | self.config))
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=self.dtype(attention))
        return model.eval()


_MIXED = ["sliding_attention", "full_attention"] * 2
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_local_experts": 4}
_MLA = {
    "q_lora_rank": 12,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "head_dim": 4,
}

ARCHITECTURES = [
    Architecture("llama"),
    Architecture("mistral", {"sliding_window": None}),
    Architecture("mistral", {"sliding_window": 8}, name="mistral-window"),
    Architecture("qwen2"),
    Architecture(
        "qwen2", {"use_sliding_window": True, "sliding_window": 8, "layer_types": _MIXED}, name="qwen2-mixed-windows"
    ),
    Architecture("qwen3"),
    Architecture("qwen3_moe", _EXPERTS),
    Architecture("gemma"),
    Architecture("gemma2", {"sliding_window": 8, "query_pre_attn_scalar": 8}, ("eager",)),
    Architecture("gemma3_text", {"sliding_window": 8, "layer_types": _MIXED, "query_pre_attn_scalar": 8}),
    Architecture("phi3"),
    Architecture("gpt_neox", {"rotary_pct": 0.5}),
    Architecture("gpt2", {"n_embd": 32, "n_head": 4, "n_layer": 4, "n_positions": 256}),
    Architecture("mixtral", _EXPERTS | {"sliding_window": None}),
    Architecture("olmo2"),
    Architecture("cohere2", {"sliding_window": 8, "layer_types": _MIXED}),
    Architecture("granite"),
    Architecture("smollm3"),
    Architecture("deepseek_v3", _MLA),
    Architecture("gpt_oss", _EXPERTS | {"sliding_window": 8, "layer_types": _MIXED}, ("eager",)),
]
