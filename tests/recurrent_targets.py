"""Targets that mix attention with recurrent layers: tiny, random, and such that what the layers remember decides."""

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.targets import Architecture
from transformers_resps.compat import HAS_RECURRENT_STATES


NEEDS_STATES = pytest.mark.skipif(
    not HAS_RECURRENT_STATES, reason="this release refuses targets with recurrent layers"
)
VOCABULARY = 7  # so few that trees hold most pairs of tokens: paths of several nodes are accepted


@dataclass(frozen=True)
class RecurrentArchitecture(Architecture):
    """In fp32, as the recurrences compute in any dtype.

    Attributes:
        seed: of its weights, chosen for a lively text.
    """

    seed: int = 0

    def dtype(self, attention: str) -> torch.dtype:
        return torch.float32

    def build(self, attention: str = "sdpa", seed: int | None = None) -> PreTrainedModel:
        """A random model whose text is lively and depends on the states, without special tokens."""
        untied = replace(self, config=_SIZES | self.config)
        model = super(RecurrentArchitecture, untied).build(attention)
        _redraw(model, torch.Generator().manual_seed(5 + (self.seed if seed is None else seed)))
        return model


@torch.no_grad()
def _redraw(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Draw all weights anew: projections keep their input's size, filters count, and the states fade within tokens."""

    def drawn(weight: Tensor, scale: float = 1.0) -> Tensor:
        return torch.randn(weight.shape, generator=generator) * scale

    for name, weight in model.named_parameters():
        if name.endswith("dt_bias"):
            weight.copy_(drawn(weight) - 2)
        elif "conv" in name and weight.dim() == 3:
            weight.copy_(drawn(weight, 0.5))
        elif "embed" in name:
            weight.copy_(drawn(weight))
        elif weight.dim() >= 2 and "A_log" not in name:
            weight.copy_(drawn(weight, 1 / math.sqrt(weight.shape[-1])))


_SIZES = {"vocab_size": VOCABULARY, "num_hidden_layers": 3, "tie_word_embeddings": False}  # tied, texts repeat a token
_MIXED = ["linear_attention", "full_attention", "linear_attention"]
_CONVOLUTIONS: dict[str, Any] = {"layer_types": ["conv", "full_attention", "conv"], "conv_L_cache": 3}
_DELTA_NET: dict[str, Any] = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "layer_types": _MIXED,
}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_SHARED_EXPERT = _EXPERTS | {"shared_expert_intermediate_size": 16}
_LATENT: dict[str, Any] = {
    "layer_types": _MIXED,
    "mlp_layer_types": ["dense"] * 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
_MAMBA: dict[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
    "mamba_n_groups": 1,
}
_GRANITE = _MAMBA | {
    "layer_types": _MIXED,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "shared_intermediate_size": 16,
    "position_embedding_type": "rope",
}
_FALCON = _MAMBA | {"mamba_d_ssm": 64, "num_hidden_layers": 2}
# Time steps below the least are raised where a text is read in chunks, and not where its tokens come one by one: here
# about half of them are.
_NEMOTRON: dict[str, Any] = {
    "hybrid_override_pattern": "M*M-",
    "num_hidden_layers": 4,
    "ssm_state_size": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "n_groups": 2,
    "chunk_size": 8,
    "expand": 2,
    "time_step_min": 0.1,
}
_ZAMBA: dict[str, Any] = {
    "layers_block_type": ["hybrid", "linear_attention", "hybrid"],
    "mamba_d_state": 8,
    "mamba_expand": 2,
    "n_mamba_heads": 8,
    "mamba_headdim": 8,
    "mamba_ngroups": 1,
    "chunk_size": 8,
    "num_mem_blocks": 1,
    "use_shared_attention_adapter": False,
    "time_step_min": 0.1,
}
_SLIDING = {"sliding_window": 8}

RECURRENT = [
    RecurrentArchitecture("qwen3_next", _DELTA_NET | _SHARED_EXPERT | {"mlp_only_layers": []}),
    RecurrentArchitecture("qwen3_5_text", _DELTA_NET, seed=3),
    RecurrentArchitecture("qwen3_5_moe_text", _DELTA_NET | _SHARED_EXPERT),
    RecurrentArchitecture("olmo_hybrid", _DELTA_NET),
    RecurrentArchitecture("kimi_linear", _LATENT | {"linear_head_dim": 4, "linear_num_heads": 2}),
    RecurrentArchitecture(
        "bailing_hybrid", _LATENT | {"head_dim": 4, "n_group": 2, "topk_group": 1, "num_mtp_layers": 0}
    ),
    RecurrentArchitecture(
        "lara_mini",
        _DELTA_NET
        | _SHARED_EXPERT
        | _SLIDING
        | {"layer_types": ["sliding_attention", *_MIXED], "num_hidden_layers": 4},
    ),
    RecurrentArchitecture("bamba", _MAMBA | {"attn_layer_indices": [1]}),
    RecurrentArchitecture("granitemoehybrid", _GRANITE),
    RecurrentArchitecture("falcon_h1", _FALCON, seed=7),
    RecurrentArchitecture("falcon_h1", _FALCON | {"time_step_limit": (0.1, 0.3)}, name="falcon_h1-clamped", seed=7),
    RecurrentArchitecture("nemotron_h", _NEMOTRON),
    RecurrentArchitecture("zamba2", _ZAMBA),
    RecurrentArchitecture("lfm2", _CONVOLUTIONS, seed=7),
    RecurrentArchitecture("lfm2_moe", _CONVOLUTIONS | _EXPERTS | {"num_dense_layers": 1}, seed=7),
    RecurrentArchitecture("lfm3", _SLIDING | {"layer_types": ["conv", "sliding_attention", "conv"]}, seed=4),
]


def recurrent(*names: str) -> list[RecurrentArchitecture]:
    """Some of them, by name."""
    return [architecture for architecture in RECURRENT if str(architecture) in names]
