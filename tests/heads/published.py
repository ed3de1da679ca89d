"""Small checkpoints in every publisher's exact layout, and what they must compute, written from the specification.

The arithmetic here is plain torch in fp32 and calls nothing of the package.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor


V, D, H, WIDE = 64, 16, 32, 48  # target vocabulary, draft vocabulary, hidden size of target and of a wider head
LAYERS = 8  # of the target
DEFAULT = [2, 4, 5]  # hidden_states 2, n // 2, n - 3


@dataclass(frozen=True)
class Published:
    """One checkpoint: how it is written, and what it must mean."""

    name: str
    write: Callable[[Path, dict[str, Tensor], "Published"], None]
    config: dict[str, Any]
    layers: list[int] = field(default_factory=lambda: DEFAULT)  # in hidden_states indices
    format: str = "eagle"
    hidden: int = H
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    extra_layers: int = 0
    full_vocabulary: bool = False
    output_head: bool = True
    qk_norm: bool = False
    input_norm: bool = False
    fc_norm: bool = False
    norm_before_residual: bool = False
    post_norm: bool = False
    theta: float = 10000.0
    llama3: bool = False
    dtype: torch.dtype = torch.bfloat16
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


def random_tensors(case: Published) -> dict[str, Tensor]:
    """Random weights by the names of EAGLE's own code, in the published dtype."""
    generator = torch.Generator().manual_seed(sum(map(ord, case.name)))

    def matrix(rows: int, columns: int) -> Tensor:
        return (torch.randn(rows, columns, generator=generator) / math.sqrt(columns)).to(case.dtype)

    def norm(width: int) -> Tensor:
        return (1 + 0.3 * torch.randn(width, generator=generator)).to(case.dtype)

    hidden, count = case.hidden, len(case.layers)
    tensors = {
        "fc.weight": matrix(hidden, count * H),
        "norm.weight": norm(hidden),
        "embed_tokens.weight": matrix(V, hidden),
        "midlayer.hidden_norm.weight": norm(hidden),
    }
    for index in range(1 + case.extra_layers):
        prefix, width = ("midlayer.", 2 * hidden) if index == 0 else (f"layers.{index}.", hidden)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{name}.weight"] = norm(hidden)
        for name, heads in (("q", case.heads), ("k", case.kv_heads), ("v", case.kv_heads)):
            tensors[f"{prefix}self_attn.{name}_proj.weight"] = matrix(heads * case.head_dim, width)
        tensors[f"{prefix}self_attn.o_proj.weight"] = matrix(hidden, case.heads * case.head_dim)
        if case.qk_norm:
            tensors[f"{prefix}self_attn.q_norm.weight"] = norm(case.head_dim)
            tensors[f"{prefix}self_attn.k_norm.weight"] = norm(case.head_dim)
        for name, shape in (("gate", (40, hidden)), ("up", (40, hidden)), ("down", (hidden, 40))):
            tensors[f"{prefix}mlp.{name}_proj.weight"] = matrix(*shape)
    norms = {"input_norm.weight": count * H} if case.input_norm else {}
    norms |= {f"fc_norm.{index}.weight": H for index in range(count if case.fc_norm else 0)}
    tensors |= {name: norm(width) for name, width in norms.items()}
    if case.output_head:
        tensors["lm_head.weight"] = matrix(V if case.full_vocabulary else D, hidden)
    return tensors if case.full_vocabulary else tensors | draft_vocabulary(generator)


def draft_vocabulary(generator: torch.Generator) -> dict[str, Tensor]:
    ids = torch.randperm(V, generator=generator)[:D].sort().values
    return {"d2t": ids - torch.arange(D), "t2d": torch.zeros(V, dtype=torch.bool).index_fill_(0, ids, True)}


def write_config(folder: Path, config: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))


def rename(tensors: dict[str, Tensor], *drop: str, **spellings: str) -> dict[str, Tensor]:
    """Without the dropped names; `midlayer="layers.0"` respells a beginning."""
    renamed = {}
    for name, tensor in tensors.items():
        for ours, theirs in spellings.items():
            ours = ours.replace("__", ".")
            if name == ours or name.startswith(f"{ours}."):
                name = theirs + name.removeprefix(ours)
        if name not in drop:
            renamed[name] = tensor
    return renamed


def reference_logits(
    case: Published, tensors: dict[str, Tensor], features: Tensor, embedding: Tensor, output: Tensor, tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits `[t, d]` of a prefix and `[1, d]` one level deeper, from `[t, A * H]` features and `[t + 1]` tokens."""
    w = {name: tensor.float() for name, tensor in tensors.items()}
    embedded = embedding.float()[tokens]
    memory: list[tuple[Tensor, Tensor]] = [(torch.zeros(0), torch.zeros(0))] * (1 + case.extra_layers)
    length = len(features)
    hidden = _layers(case, w, _fuse(case, w, features), embedded[:length], 0, memory)
    first = _rms(hidden, w["norm.weight"]) @ output.float().T
    fed = _rms(hidden[-1:], w["norm.weight"]) if case.post_norm else hidden[-1:]
    deeper = _layers(case, w, fed, embedded[length:], length, memory)
    return first, _rms(deeper, w["norm.weight"]) @ output.float().T


def _fuse(case: Published, w: dict[str, Tensor], features: Tensor) -> Tensor:
    if case.input_norm:
        features = _rms(features, w["input_norm.weight"])
    if case.fc_norm:
        parts = features.split(H, dim=-1)
        features = torch.cat([_rms(part, w[f"fc_norm.{index}.weight"]) for index, part in enumerate(parts)], dim=-1)
    return features @ w["fc.weight"].T


def _layers(
    case: Published, w: dict[str, Tensor], hidden: Tensor, embedded: Tensor, start: int, memory: list[Any]
) -> Tensor:
    for index in range(1 + case.extra_layers):
        p = "midlayer." if index == 0 else f"layers.{index}."
        residual = hidden
        if index == 0:
            normed = _rms(hidden, w[f"{p}hidden_norm.weight"])
            residual = normed if case.norm_before_residual else hidden
            states = torch.cat([_rms(embedded, w[f"{p}input_layernorm.weight"]), normed], dim=-1)
        else:
            states = _rms(hidden, w[f"{p}input_layernorm.weight"])
        hidden = residual + _attention(case, w, f"{p}self_attn.", states, start, index, memory)
        x = _rms(hidden, w[f"{p}post_attention_layernorm.weight"])
        gated = F.silu(x @ w[f"{p}mlp.gate_proj.weight"].T) * (x @ w[f"{p}mlp.up_proj.weight"].T)
        hidden = hidden + gated @ w[f"{p}mlp.down_proj.weight"].T
    return hidden


def _attention(
    case: Published, w: dict[str, Tensor], p: str, states: Tensor, start: int, index: int, memory: list[Any]
) -> Tensor:
    length = len(states)
    q = (states @ w[f"{p}q_proj.weight"].T).view(length, case.heads, case.head_dim)
    k = (states @ w[f"{p}k_proj.weight"].T).view(length, case.kv_heads, case.head_dim)
    v = (states @ w[f"{p}v_proj.weight"].T).view(length, case.kv_heads, case.head_dim)
    if case.qk_norm:
        q, k = _rms(q, w[f"{p}q_norm.weight"]), _rms(k, w[f"{p}k_norm.weight"])
    q, k = _rotate(case, q, start), _rotate(case, k, start)
    if start:
        k, v = torch.cat([memory[index][0], k]), torch.cat([memory[index][1], v])
    memory[index] = (k, v)
    rows = []
    for i in range(length):
        seen = start + i + 1
        for head in range(case.heads):
            group = head // (case.heads // case.kv_heads)
            weights = (k[:seen, group] @ q[i, head] / math.sqrt(case.head_dim)).softmax(0)
            rows.append(weights @ v[:seen, group])
    return torch.stack(rows).view(length, -1) @ w[f"{p}o_proj.weight"].T


def _rotate(case: Published, x: Tensor, start: int) -> Tensor:
    half = case.head_dim // 2
    rates = case.theta ** (-torch.arange(half) / half)
    if case.llama3:  # factor 8, low 1, high 4, original length 64
        for i, rate in enumerate(rates.tolist()):
            turns = 64 * rate / (2 * math.pi)
            if turns < 1:
                rates[i] = rate / 8
            elif turns < 4:
                smooth = (turns - 1) / (4 - 1)
                rates[i] = (1 - smooth) * rate / 8 + smooth * rate
    angles = (start + torch.arange(len(x)))[:, None, None] * rates
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1)


def _rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * weight


def save(folder: Path, tensors: dict[str, Tensor], shards: int = 1) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    names = sorted(tensors)
    where = {name: f"model-{i * shards // len(names) + 1:05d}.safetensors" for i, name in enumerate(names)}
    for shard in set(where.values()):
        save_file({name: tensors[name] for name in names if where[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
