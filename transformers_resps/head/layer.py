"""One decoder layer of a draft head; its attention is passed in, with the keys that the caller keeps."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP

from .configuration import DraftHeadConfig


# (layer index, queries [b, heads, q, hd], keys [b, kv heads, t, hd], values) -> [b, heads, q, hd]; the queries are
# those of the q <= t wanted positions
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
# Which positions of `[b, t]` get an output: a part of them, or `[b, q]` positions of each text
Wanted = slice | Tensor


class Rope(NamedTuple):
    """The angles by which RoPE turns queries and keys: `[b, t, hd]`, or `[b, 1, hd]` where all t share a position.

    Attributes:
        cosine: of each angle.
        sine: of each angle; negative in the first half, where a vector's second half comes in.
    """

    cosine: Tensor
    sine: Tensor

    @classmethod
    def of(cls, cosine: Tensor, sine: Tensor) -> "Rope":
        """From what `LlamaRotaryEmbedding` gives."""
        first, second = sine.chunk(2, dim=-1)
        return cls(cosine, torch.cat([-first, second], dim=-1))

    def at(self, wanted: Wanted) -> "Rope":
        """Those of some positions."""
        return Rope(*(_at(part, wanted) for part in self))

    def turn(self, states: Tensor) -> Tensor:
        """`[b, heads, t, hd]` turned by the angles of its positions."""
        half = states.shape[-1] // 2
        return torch.addcmul(states * self.cosine[:, None], states.roll(half, dims=-1), self.sine[:, None])


class DraftAttention(nn.Module):
    """Projections of the attention; the first layer reads embedding and feature side by side, `2h` wide."""

    def __init__(self, config: DraftHeadConfig, layer_index: int) -> None:
        super().__init__()
        assert config.head_dim is not None
        self.layer_index = layer_index
        self.head_dim = config.head_dim
        width = 2 * config.hidden_size if layer_index == 0 else config.hidden_size
        key_width = config.num_key_value_heads * config.head_dim
        query_width = config.num_attention_heads * config.head_dim
        self.q_proj = nn.Linear(width, query_width, bias=config.attention_bias)
        self.k_proj = nn.Linear(width, key_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(width, key_width, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_width, config.hidden_size, bias=config.attention_output_bias)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)

    def forward(self, states: Tensor, rope: Rope, attend: Attend, wanted: Wanted) -> Tensor:
        """`[b, t, width]` -> `[b, q, h]` at the `wanted` positions."""
        heads = (-1, self.head_dim)
        queries = self.q_norm(self.q_proj(_at(states, wanted)).unflatten(-1, heads)).transpose(1, 2)
        keys = self.k_norm(self.k_proj(states).unflatten(-1, heads)).transpose(1, 2)
        values = self.v_proj(states).unflatten(-1, heads).transpose(1, 2)
        if queries.shape[2] == keys.shape[2]:  # turned in one go
            turned = rope.turn(torch.cat([queries, keys], dim=1))
            queries, keys = turned[:, : queries.shape[1]], turned[:, queries.shape[1] :]
        else:
            queries, keys = rope.at(wanted).turn(queries), rope.turn(keys)
        attended = attend(self.layer_index, queries, keys, values)
        return self.o_proj(attended.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]  # nn.Module is untyped


def _at(states: Tensor, wanted: Wanted) -> Tensor:
    """`[b, t, n]` -> `[b, q, n]`."""
    if isinstance(wanted, slice):
        return states[:, wanted]
    return states.gather(1, wanted[..., None].expand(-1, -1, states.shape[-1]))


class DraftLayer(nn.Module):
    """The first layer fuses embedding and feature (EAGLE-3, section 3.1); any further one is a plain decoder layer."""

    def __init__(self, config: DraftHeadConfig, layer_index: int) -> None:
        super().__init__()
        self.reads_embedding = layer_index == 0
        self.norm_before_residual = config.norm_before_residual
        if self.reads_embedding:
            self.hidden_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = DraftAttention(config, layer_index)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = LlamaMLP(config)

    def forward(self, hidden: Tensor, embeddings: Tensor, rope: Rope, attend: Attend, wanted: Wanted) -> Tensor:
        """`[b, t, h]` hidden states and token embeddings -> `[b, q, h]` at the `wanted` positions."""
        residual = hidden
        if self.reads_embedding:
            normed = self.hidden_norm(hidden)
            if self.norm_before_residual:
                residual = normed
            states = torch.cat([self.input_layernorm(embeddings), normed], dim=-1)  # embedding first, as published
        else:
            states = self.input_layernorm(hidden)
        residual = _at(residual, wanted) + self.self_attn(states, rope, attend, wanted)
        return residual + self.mlp(self.post_attention_layernorm(residual))  # type: ignore[no-any-return]  # untyped
