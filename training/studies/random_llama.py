"""Part of the study `engine_speed`: Llamas of real sizes with random weights, which are sure of what they write.

Models of random weights write near-ties, which half precision and compilation decide otherwise at every turn.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel


# As SmolLM2-135M, Llama-3.2-1B and Llama-3.1-8B, with output rows of their own.
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "0.1b": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
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
def random_llama(
    shape: str, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> PreTrainedModel:
    """Make a Llama that never ends a text and never repeats a token.

    Its layers are random. Its output rows are the embedding rows of the token before, see `following`, so that
    rounding decides nothing.

    Args:
        shape: of `SHAPES`.
        dtype: of the weights.
        device: that they are made on.
        seed: of the weights.
    """
    config = LlamaConfig(
        **SHAPES[shape],
        max_position_embeddings=4096,
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
