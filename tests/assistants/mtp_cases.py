"""MTP modules in every publisher's layout, and what they compute, in loops over the raw tensors.

The arithmetic calls nothing of the package and no layer of Transformers.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from tests.conftest import build_target


H, V, WIDE, LAYERS = 32, 64, 48, 4  # hidden size, vocabulary, width of the MLP and layers of the targets
HEADS, KEY_HEADS, WIDTH = 4, 2, 8
EXPERTS, ACTIVE, EXPERT_WIDTH = 4, 2, 16
LOW_RANK = {"q": 12, "kv": 8, "rope": 4, "nope": 8, "value": 8}
Raw = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A module as published.

    Attributes:
        name: of the family.
        target: the model type of its target, or of one that stands in for it.
        config: of the target.
        stated: what config.json says besides.
        depths: layers of the module.
        names: of enorm, hnorm, eh_proj and norm, and what is in front of the decoder layer's tensors; `{k}` is the
            depth, `{n}` the number after the target's own layers.
        inside: what the decoder layer calls a tensor otherwise than Transformers.
        does: how the family computes, see `Reference`.
    """

    name: str
    target: str
    names: dict[str, str]
    config: dict[str, Any] = field(default_factory=dict)
    stated: dict[str, Any] = field(default_factory=dict)
    depths: int = 1
    attention: str = "sdpa"
    inside: dict[str, str] = field(default_factory=dict)
    does: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    def build(self) -> PreTrainedModel:
        """The target, with weights that matter."""
        target = build_target(
            self.target, **{"rms_norm_eps": 1e-6, "attn_implementation": self.attention} | self.config
        )
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for weight in target.parameters():
                scale = 1 / math.sqrt(weight.shape[-1]) if weight.dim() > 1 else 0.3
                weight.copy_(torch.randn(weight.shape, generator=generator) * scale + (weight.dim() == 1) * weight)
        return target

    def part(self, depth: int, part: str) -> str:
        return self.names[part].format(k=depth, n=LAYERS + depth)

    def inner(self, depth: int, name: str) -> str:
        for ours, theirs in self.inside.items():
            name = name.replace(ours, theirs)
        return self.part(depth, "block") + name

    def raw(self) -> Raw:
        """Random tensors of the module by their published names."""
        generator = torch.Generator().manual_seed(sum(map(ord, self.name)))
        shapes: dict[str, tuple[int, ...]] = {}
        for depth in range(self.depths):
            block = _attention(self.does) | _mlp(self.does)
            block |= {"input_layernorm.weight": (H,), "post_attention_layernorm.weight": (H,)}
            shapes |= {self.inner(depth, name): shape for name, shape in block.items()}
            for part in ("enorm", "hnorm", "norm"):
                if part in self.names:
                    shapes[f"{self.part(depth, part)}.weight"] = (H,)
            shapes[f"{self.part(depth, 'eh_proj')}.weight"] = (H, 2 * H)
            if "head" in self.names:
                shapes[f"{self.part(depth, 'head')}.weight"] = (self.config.get("vocab_size", V), H)
            if self.does.get("projection_bias"):
                shapes[f"{self.part(depth, 'eh_proj')}.bias"] = (H,)
        is_plain = not self.does.get("zero_centred")
        return {
            name: torch.randn(shape, generator=generator) * (1 / math.sqrt(shape[-1]) if len(shape) > 1 else 0.3)
            + (is_plain and "norm" in name)
            for name, shape in shapes.items()
        }

    def write(self, folder: Path, target: PreTrainedModel, raw: Raw, **stated: Any) -> None:
        """A checkpoint in two shards, of which the second has the module; the target then comes from there."""
        folder.mkdir(parents=True, exist_ok=True)
        theirs = {name: tensor.clone().contiguous() for name, tensor in target.state_dict().items() if "norm" in name}
        shards = {"model-00001-of-00002.safetensors": theirs, "model-00002-of-00002.safetensors": raw}
        for name, tensors in shards.items():
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / name)
        weight_map = {key: name for name, tensors in shards.items() for key in tensors}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        config = target.config.to_dict() | self.stated | stated
        (folder / "config.json").write_text(json.dumps(config, default=str))
        target.config.name_or_path = str(folder)


def _attention(does: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    attn = "self_attn."
    if does.get("latent"):
        rank, rope, nope, value = (LOW_RANK[key] for key in ("kv", "rope", "nope", "value"))
        return {
            f"{attn}q_a_proj.weight": (LOW_RANK["q"], H),
            f"{attn}q_a_layernorm.weight": (LOW_RANK["q"],),
            f"{attn}q_b_proj.weight": (HEADS * (nope + rope), LOW_RANK["q"]),
            f"{attn}kv_a_proj_with_mqa.weight": (rank + rope, H),
            f"{attn}kv_a_layernorm.weight": (rank,),
            f"{attn}kv_b_proj.weight": (HEADS * (nope + value), rank),
            f"{attn}o_proj.weight": (H, HEADS * value),
        }
    keys = does.get("key_heads", KEY_HEADS)
    rows = {"q": HEADS * WIDTH * (2 if does.get("gate") else 1), "k": keys * WIDTH, "v": keys * WIDTH}
    shapes: dict[str, tuple[int, ...]] = {f"{attn}{part}_proj.weight": (count, H) for part, count in rows.items()}
    if does.get("qkv_bias"):
        shapes |= {f"{attn}{part}_proj.bias": (count,) for part, count in rows.items()}
    if does.get("qk_norm"):
        shapes |= {f"{attn}{part}_norm.weight": (WIDTH,) for part in "qk"}
    if does.get("sinks"):
        shapes[f"{attn}sinks"] = (HEADS,)
    return shapes | {f"{attn}o_proj.weight": (H, HEADS * WIDTH)}


def _mlp(does: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    def dense(at: str, width: int) -> dict[str, tuple[int, ...]]:
        return {
            f"{at}gate_proj.weight": (width, H),
            f"{at}up_proj.weight": (width, H),
            f"{at}down_proj.weight": (H, width),
        }

    router = does.get("router")
    if router is None:
        return dense("mlp.", WIDE)
    shapes: dict[str, tuple[int, ...]] = {"mlp.gate.weight": (EXPERTS, H)}
    if does.get("fused"):
        shapes |= {"mlp.experts.gate_up_proj": (EXPERTS, 2 * EXPERT_WIDTH, H)}
        shapes |= {"mlp.experts.down_proj": (EXPERTS, H, EXPERT_WIDTH)}
    else:
        for expert in range(EXPERTS):
            shapes |= dense(f"mlp.experts.{expert}.", EXPERT_WIDTH)
    if router == "sigmoid":
        shapes |= {"mlp.gate.e_score_correction_bias": (EXPERTS,)} | dense("mlp.shared_experts.", EXPERT_WIDTH)
    elif does.get("shared"):
        shapes |= {"mlp.shared_expert_gate.weight": (1, H)} | dense("mlp.shared_expert.", EXPERT_WIDTH)
    return shapes


class Reference:
    """What a module computes over the pairs of a text, one at a time.

    Args:
        case: gives `does`: zero_centred, fed, fed_back, hidden_first, zeroed_start; latent, gate, qk_norm, qkv_bias,
            sinks, key_heads, window, value_scale; rotary (share of the width), theta; router, fused, shared.
        raw: the module's tensors.
        target: gives the final norm, the embedding and the output head.
    """

    def __init__(self, case: Case, raw: Raw, target: PreTrainedModel) -> None:
        self.case, self.does, self.raw = case, case.does, raw
        self.final_norm = target.get_decoder().norm.weight.detach()
        self.embedding = target.get_input_embeddings().weight.detach()
        self.head = target.get_output_embeddings().weight.detach()

    def norm(self, states: Tensor, weight: Tensor) -> Tensor:
        scale = 1 + weight if self.does.get("zero_centred") else weight
        return states / torch.sqrt((states**2).mean(-1, keepdim=True) + 1e-6) * scale

    def outputs(self, states: Tensor, tokens: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Of `[s, h]` states and the tokens `[s]` after them: of each depth, what it feeds back, and its logits.

        The first k pairs of depth k mean nothing.
        """
        fed, logits, given = [], [], self.given(states)
        for depth in range(self.case.depths):
            for found, kept in zip(self.step(depth, given, tokens), (fed, logits), strict=True):
                kept.append(found)
            given = torch.cat([torch.zeros(1, H), fed[-1][:-1]])  # of the token before
        return fed, logits

    def given(self, states: Tensor) -> Tensor:
        return states if self.does.get("fed") == "before" else self.norm(states, self.final_norm)

    def step(self, depth: int, given: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """What is fed back, and the logits."""
        output = normed = self.layer(depth, given, tokens)
        if "norm" in self.case.names:
            normed = self.norm(output, self.raw[f"{self.case.part(depth, 'norm')}.weight"])
        head = self.raw[f"{self.case.part(depth, 'head')}.weight"] if "head" in self.case.names else self.head
        fed = {"after": normed, "before": output, "target": given}[self.does.get("fed_back", "after")]
        return fed, normed @ head.T

    def log_prob(self, states: Tensor, tokens: Tensor, path: list[int]) -> float:
        """Of a path after the last token, by a module of one depth."""
        given, found = self.given(states), 0.0
        for token in path:
            fed, logits = self.step(0, given, tokens)
            found += float(logits[-1].log_softmax(-1)[token])
            given, tokens = torch.cat([given, fed[-1:]]), torch.cat([tokens, torch.tensor([token])])
        return found

    def layer(self, depth: int, given: Tensor, tokens: Tensor) -> Tensor:
        def inner(name: str) -> Tensor:
            return self.raw[self.case.inner(depth, name)]

        embeddings = self.embedding[tokens].clone()
        if self.does.get("zeroed_start"):
            embeddings[0] = 0
        parts = [
            self.norm(embeddings, self.raw[f"{self.case.part(depth, 'enorm')}.weight"]),
            self.norm(given, self.raw[f"{self.case.part(depth, 'hnorm')}.weight"]),
        ]
        if self.does.get("hidden_first"):
            parts.reverse()
        joined = torch.cat(parts, dim=-1) @ self.raw[f"{self.case.part(depth, 'eh_proj')}.weight"].T
        joined = joined + self.raw.get(f"{self.case.part(depth, 'eh_proj')}.bias", torch.zeros(H))
        normed = self.norm(joined, inner("input_layernorm.weight"))
        attend = self.latent if self.does.get("latent") else self.grouped
        joined = joined + attend(normed, inner, first=depth)
        normed = self.norm(joined, inner("post_attention_layernorm.weight"))
        return joined + torch.stack([self.mlp(state, inner) for state in normed])

    def turned(self, vector: Tensor, position: int, width: int) -> Tensor:
        """The first `width` numbers turned by RoPE, in pairs (i, i + width / 2), or of neighbours."""
        if self.does.get("neighbours") or self.does.get("latent"):
            vector = torch.cat([vector[::2], vector[1::2]])
        half, found = width // 2, vector.clone()
        for pair in range(half):
            angle = position / self.does.get("theta", 10000.0) ** (2 * pair / width)
            a, b = vector[pair], vector[pair + half]
            found[pair] = a * math.cos(angle) - b * math.sin(angle)
            found[pair + half] = b * math.cos(angle) + a * math.sin(angle)
        return found

    def seen(self, position: int, first: int) -> list[int]:
        window = self.does.get("window") or 10**6
        return [other for other in range(first, position + 1) if other > position - window] or [position]

    def attended(
        self, queries: Tensor, keys: Tensor, values: Tensor, first: int, sinks: Tensor | None = None
    ) -> Tensor:
        """`[s, heads, hd]` each, keys and values for as many heads -> `[s, heads * value width]`."""
        rows = []
        for position in range(len(queries)):
            others, heads = self.seen(position, first), []
            for head in range(HEADS):
                scores = keys[others, head] @ queries[position, head] / math.sqrt(queries.shape[-1])
                sink = scores.new_full((1,), -math.inf) if sinks is None else sinks[head : head + 1]
                shares = torch.cat([scores, sink]).softmax(0)[:-1]
                heads.append(shares @ values[others, head])
            rows.append(torch.cat(heads))
        return torch.stack(rows)

    def grouped(self, states: Tensor, inner: Any, first: int) -> Tensor:
        does, keys_count = self.does, self.does.get("key_heads", KEY_HEADS)
        projected = {}
        for part in "qkv":
            projected[part] = states @ inner(f"self_attn.{part}_proj.weight").T
            if does.get("qkv_bias"):
                projected[part] = projected[part] + inner(f"self_attn.{part}_proj.bias")
        queries = projected["q"].view(len(states), HEADS, -1)
        queries, gate = queries.split(WIDTH, dim=-1) if does.get("gate") else (queries, None)
        keys, values = (projected[part].view(len(states), keys_count, WIDTH) for part in "kv")
        values = values * does.get("value_scale", 1.0)
        if does.get("qk_norm"):
            queries = self.norm(queries, inner("self_attn.q_norm.weight"))
            keys = self.norm(keys, inner("self_attn.k_norm.weight"))
        width = int(WIDTH * does.get("rotary", 1.0))
        queries, keys = (
            torch.stack([torch.stack([self.turned(head, at, width) for head in row]) for at, row in enumerate(part)])
            for part in (queries, keys)
        )
        shared = HEADS // keys_count
        keys, values = (part.repeat_interleave(shared, dim=1) for part in (keys, values))
        sinks = inner("self_attn.sinks") if does.get("sinks") else None
        found = self.attended(queries, keys, values, first, sinks)
        if gate is not None:
            found = found * torch.sigmoid(gate.flatten(1))
        return found @ inner("self_attn.o_proj.weight").T

    def latent(self, states: Tensor, inner: Any, first: int) -> Tensor:
        rope, nope = LOW_RANK["rope"], LOW_RANK["nope"]
        low = self.norm(states @ inner("self_attn.q_a_proj.weight").T, inner("self_attn.q_a_layernorm.weight"))
        queries = (low @ inner("self_attn.q_b_proj.weight").T).view(len(states), HEADS, nope + rope)
        both = states @ inner("self_attn.kv_a_proj_with_mqa.weight").T
        low = self.norm(both[:, :-rope], inner("self_attn.kv_a_layernorm.weight"))
        up = (low @ inner("self_attn.kv_b_proj.weight").T).view(len(states), HEADS, nope + LOW_RANK["value"])

        full_queries, keys = [], []
        for at in range(len(states)):
            key = self.turned(both[at, -rope:], at, rope)
            full_queries.append(
                torch.stack([torch.cat([q[:nope], self.turned(q[nope:], at, rope)]) for q in queries[at]])
            )
            keys.append(torch.stack([torch.cat([u[:nope], key]) for u in up[at]]))
        found = self.attended(torch.stack(full_queries), torch.stack(keys), up[..., nope:], first)
        return found @ inner("self_attn.o_proj.weight").T

    def mlp(self, state: Tensor, inner: Any) -> Tensor:
        def dense(at: str) -> Tensor:
            gate, up = (inner(f"{at}{part}_proj.weight") @ state for part in ("gate", "up"))
            return inner(f"{at}down_proj.weight") @ (torch.nn.functional.silu(gate) * up)

        def expert(number: int) -> Tensor:
            if not self.does.get("fused"):
                return dense(f"mlp.experts.{number}.")
            gate, up = (inner("mlp.experts.gate_up_proj")[number] @ state).chunk(2)
            return inner("mlp.experts.down_proj")[number] @ (torch.nn.functional.silu(gate) * up)

        router = self.does.get("router")
        if router is None:
            return dense("mlp.")
        scores = inner("mlp.gate.weight") @ state
        scores = scores.sigmoid() if router == "sigmoid" else scores.softmax(0)
        choice = scores + inner("mlp.gate.e_score_correction_bias") if router == "sigmoid" else scores
        groups = self.does.get("groups", 1)
        if groups > 1:  # only the experts of the best group
            sums = [part.topk(2).values.sum() for part in choice.chunk(groups)]
            best = int(torch.stack(sums).argmax())
            size = EXPERTS // groups
            choice = torch.stack(
                [choice[at] if at // size == best else torch.tensor(-math.inf) for at in range(EXPERTS)]
            )
        chosen = choice.topk(ACTIVE).indices.tolist()
        weights = scores[chosen] / scores[chosen].sum() * self.does.get("scaling", 1.0)
        found = sum(weight * expert(number) for weight, number in zip(weights, chosen, strict=True))
        if router == "sigmoid":
            return found + dense("mlp.shared_experts.")
        if self.does.get("shared"):
            return found + torch.sigmoid(inner("mlp.shared_expert_gate.weight") @ state) * dense("mlp.shared_expert.")
        return found


_QWEN = {
    "enorm": "mtp.pre_fc_norm_embedding",
    "hnorm": "mtp.pre_fc_norm_hidden",
    "eh_proj": "mtp.fc",
    "norm": "mtp.norm",
    "block": "mtp.layers.{k}.",
}


def _numbered(
    root: str = "model.layers.{n}.", norm: str = "shared_head.norm", block: str = "", **parts: str
) -> dict[str, str]:
    usual = {"enorm": "enorm", "hnorm": "hnorm", "eh_proj": "eh_proj", "norm": norm} | parts
    return {part: root + name for part, name in usual.items()} | {"block": root + block}


_HYBRID = {
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "head_dim": WIDTH,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 0.5},
}
_GATED = {"zero_centred": True, "gate": True, "qk_norm": True, "rotary": 0.5, "theta": 1000.0}
_EXPERTS = {"num_experts": EXPERTS, "num_experts_per_tok": ACTIVE, "moe_intermediate_size": EXPERT_WIDTH}
_SHARED = _EXPERTS | {"shared_expert_intermediate_size": EXPERT_WIDTH}
_ROUTED = {
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "num_experts_per_tok": ACTIVE,
    "moe_intermediate_size": EXPERT_WIDTH,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 1.5,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
}
_LATENT = _ROUTED | {
    "q_lora_rank": LOW_RANK["q"],
    "kv_lora_rank": LOW_RANK["kv"],
    "qk_rope_head_dim": LOW_RANK["rope"],
    "qk_nope_head_dim": LOW_RANK["nope"],
    "v_head_dim": LOW_RANK["value"],
    "num_key_value_heads": HEADS,
}
_SIGMOID = {"router": "sigmoid", "groups": 2, "scaling": 1.5}
_WINDOW = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}

CASES = [
    Case("Qwen3.5", "qwen3_5_text", _QWEN, _HYBRID, {"mtp_num_hidden_layers": 1}, does=_GATED),
    Case(
        "Qwen3.5-MoE",
        "qwen3_5_moe_text",
        _QWEN,
        _HYBRID | _SHARED,
        {"mtp_num_hidden_layers": 1},
        does=_GATED | {"router": "softmax", "shared": True, "fused": True},
    ),
    Case("Qwen3-Next", "qwen3_next", _QWEN, _HYBRID | _SHARED, does=_GATED | {"router": "softmax", "shared": True}),
    Case("DeepSeek-V3", "deepseek_v3", _numbered(), _LATENT, does=_SIGMOID | {"latent": True}),
    Case("GLM-4.7-Flash", "glm4_moe_lite", _numbered(), _LATENT, does=_SIGMOID | {"latent": True}),
    Case(
        "GLM-4.6",
        "glm4_moe",
        _numbered(),
        _ROUTED | {"head_dim": WIDTH, "attention_bias": True, "partial_rotary_factor": 0.5, "use_qk_norm": True},
        does=_SIGMOID | {"qkv_bias": True, "qk_norm": True, "rotary": 0.5},
    ),
    Case(
        "EXAONE-MoE",
        "exaone_moe",
        _QWEN,
        _ROUTED | _WINDOW | {"head_dim": WIDTH, "num_experts": EXPERTS},
        inside={"mlp.gate.e_score_correction_bias": "mlp.e_score_correction_bias"},
        does=_SIGMOID | {"qk_norm": True, "rotary": 0.0},  # without RoPE, as all its layers that see everything
    ),
    Case(
        "Qwen3-MoE",
        "qwen3_moe",
        _QWEN,
        _EXPERTS | {"head_dim": WIDTH, "norm_topk_prob": True},
        does={"router": "softmax", "qk_norm": True},
    ),
    Case(
        "MiMo-7B",
        "qwen2",
        {
            "enorm": "model.mtp_layers.{k}.token_layernorm",
            "hnorm": "model.mtp_layers.{k}.hidden_layernorm",
            "eh_proj": "model.mtp_layers.{k}.input_proj",
            "norm": "model.mtp_layers.{k}.final_layernorm",
            "block": "model.mtp_layers.{k}.",
        },
        does={"hidden_first": True, "zeroed_start": True, "qkv_bias": True},
    ),
    Case(
        "MiMo-V2-Flash",
        "mimo_v2_flash",
        _numbered("model.mtp.layers.{k}.", "final_layernorm"),
        _ROUTED
        | {
            "head_dim": WIDTH,
            "v_head_dim": WIDTH,
            "num_key_value_heads": 1,
            "sliding_window": 4,
            "attention_value_scale": 0.7,
            "rope_parameters": {
                kind: {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": 0.5}
                for kind, theta in (("full_attention", 500.0), ("sliding_attention", 1000.0))
            },
        },
        depths=3,
        attention="eager",
        inside={"post_attention_layernorm": "pre_mlp_layernorm", "sinks": "attention_sink_bias"},
        does={
            "fed_back": "target",
            "sinks": True,
            "key_heads": 2,
            "window": 4,
            "value_scale": 0.7,
            "rotary": 0.5,
            "theta": 1000.0,
        },
    ),
    Case(
        "Step-3.5",
        "qwen3",
        _numbered(block="transformer.", norm="transformer.shared_head.norm", head="transformer.shared_head.output"),
        {"head_dim": WIDTH},
        {"model_type": "step3p5", "num_nextn_predict_layers": 3},
        depths=3,
        does={"fed": "before", "fed_back": "before", "qk_norm": True},
    ),
    Case(
        "three chained",
        "llama",
        _numbered("model.language_model.layers.{n}."),
        stated={"num_nextn_predict_layers": 3},
        depths=3,
    ),
    Case(
        "ERNIE-4.5",
        "ernie4_5_moe",
        {
            part: f"model.mtp_{name}.{{k}}"
            for part, name in (("enorm", "emb_norm"), ("hnorm", "hidden_norm"), ("eh_proj", "linear_proj"))
        }
        | {"block": "model.mtp_block.{k}."},
        _EXPERTS | {"moe_num_experts": EXPERTS},
        does={
            "fed_back": "before",
            "zeroed_start": True,
            "projection_bias": True,
            "neighbours": True,
            "theta": 500000.0,
        },
    ),
    Case(
        "Bailing",
        "glm4_moe",
        _numbered(norm="final_layernorm"),
        _ROUTED | {"head_dim": WIDTH, "partial_rotary_factor": 1.0},
        inside={"mlp.gate.e_score_correction_bias": "mlp.gate.expert_bias"},
        does=_SIGMOID,
    ),
    Case(
        "LongCat",
        "deepseek_v3",
        {
            "enorm": "model.mtp.layers.0.enorm.m",
            "hnorm": "model.mtp.layers.0.hnorm.m",
            "eh_proj": "model.mtp.layers.0.eh_proj",
            "norm": "model.mtp.norm",
            "block": "model.mtp.layers.0.",
        },
        _LATENT,
        inside={"mlp.": "transformer_layer.mlp."},
        does={"latent": True},
    ),
    Case(
        "Mellum",
        "mellum",
        _QWEN,
        _EXPERTS | _WINDOW | {"head_dim": WIDTH, "norm_topk_prob": True},
        does={"router": "softmax", "qk_norm": True, "window": 4},
    ),
]
