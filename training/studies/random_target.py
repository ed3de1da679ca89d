"""Part of the study `engine_speed`: targets of real sizes with random weights, which are sure of what they write.

Models of random weights write near-ties, which half precision and compilation decide otherwise at every turn.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel


def _sizes(vocab: int, hidden: int, intermediate: int, layers: int, heads: int, key_heads: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
    }


_TINY, _SMALL = _sizes(512, 64, 96, 4, 4, 2), _sizes(49152, 512, 1536, 24, 8, 2)
_LLAMA = {"model_type": "llama"}


def _gated_delta_net(sizes: dict[str, Any], heads: int, width: int) -> dict[str, Any]:
    """A hybrid as Qwen3.5: of four layers three are gated delta nets, with heads of `width`."""
    own = {"linear_num_key_heads": heads, "linear_num_value_heads": heads}
    own |= {"linear_key_head_dim": width, "linear_value_head_dim": width}
    own |= {"head_dim": sizes["hidden_size"] // sizes["num_attention_heads"], "layer_types": _kinds(sizes)}
    return {"model_type": "qwen3_5_text"} | sizes | own


def _mamba_2(sizes: dict[str, Any], heads: int, states: int) -> dict[str, Any]:
    """A hybrid as Granite 4 H without experts: of four layers three are Mamba-2."""
    own = {"num_local_experts": 0, "shared_intermediate_size": sizes["intermediate_size"], "mamba_expand": 2}
    own |= {"mamba_n_heads": heads, "mamba_d_state": states, "mamba_n_groups": 1, "layer_types": _kinds(sizes)}
    return {"model_type": "granitemoehybrid", "attention_multiplier": 0.1} | sizes | own


def _kinds(sizes: dict[str, Any]) -> list[str]:
    four = ["linear_attention"] * 3 + ["full_attention"]
    return four * (sizes["num_hidden_layers"] // len(four))


# Llamas as SmolLM2-135M, Llama-3.2-1B and Llama-3.1-8B, with output rows of their own; hybrids as large as the first.
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": _LLAMA | _TINY,
    "tiny-gdn": _gated_delta_net(_TINY, heads=4, width=16),
    "tiny-mamba2": _mamba_2(_TINY, heads=4, states=16),
    "0.1b": _LLAMA | _sizes(49152, 576, 1536, 30, 9, 3),
    "0.1b-gdn": _gated_delta_net(_SMALL, heads=8, width=128),
    "0.1b-mamba2": _mamba_2(_SMALL, heads=16, states=128),
    "1b": _LLAMA | _sizes(128256, 2048, 8192, 16, 32, 8),
    "8b": _LLAMA | _sizes(128256, 4096, 14336, 32, 32, 8),
}
_LOUDNESS = 8.0  # of the embedding: what the layers of the largest shape add stays below
_LOGIT = 20.0  # of the next token, at most


def following(vocab_size: int, seed: int = 0) -> Tensor:
    """The token after each, `[v]`: one cycle through the whole vocabulary."""
    order = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(seed), device="cpu")
    after = torch.empty_like(order)
    after[order] = order.roll(-1)
    return after


@torch.no_grad()
def random_target(
    shape: str, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> PreTrainedModel:
    """Make a target that never ends a text and never repeats a token.

    Its layers are random. Its output rows are the embedding rows of the token before, see `following`, so that
    rounding decides nothing.

    Args:
        shape: of `SHAPES`.
        dtype: of the weights.
        device: that they are made on.
        seed: of the weights.
    """
    config = AutoConfig.for_model(
        **SHAPES[shape],
        max_position_embeddings=65536,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(seed)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
        rows = model.get_input_embeddings().weight.normal_(std=_LOUDNESS)
        after = following(config.vocab_size, seed).to(device)
        model.get_output_embeddings().weight[after] = rows * (_LOGIT / config.hidden_size / _LOUDNESS)
    made: PreTrainedModel = model.eval()
    return made
