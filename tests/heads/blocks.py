"""Small block heads in every publisher's exact layout, and what they must compute, written from the specification.

The arithmetic here is plain torch in fp32, a slot and a head at a time, and calls nothing of the package.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .published import draft_vocabulary, rename, save, write_config


V, D, H, WIDE, HD, HEADS, KV_HEADS = 64, 16, 32, 40, 8, 4, 2
LAYERS = 8  # of the target
MASK = 61
RANK, GROUP = 6, 8


@dataclass(frozen=True)
class Block:
    """One checkpoint: how it is written, and what it must mean."""

    name: str
    write: Callable[[Path, dict[str, Tensor], "Block"], None]
    config: dict[str, Any]
    layers: list[int] = field(default_factory=lambda: [2, 4, 6])  # in hidden_states indices
    format: str = "z-lab"
    block_size: int = 4
    shifted: bool = False
    causal: tuple[bool, ...] = (False, False)
    windows: tuple[int | None, ...] = (None, None)
    correction: str = "none"
    confidence: str = ""  # "hidden", "markov"
    convolutions: bool = False
    reduced: bool = False
    copies: bool = False  # of the target's embedding and output head, the latter of a fine-tune
    biases: bool = False
    theta: float = 10000.0
    embedding_scale: float = 1.0
    multiplier: float = 1.0
    softcap: float | None = None
    top: int = V  # candidates that are corrected

    def __str__(self) -> str:
        return self.name


def random_tensors(case: Block) -> dict[str, Tensor]:
    """Random weights by the names of z-lab's own code."""
    generator = torch.Generator().manual_seed(sum(map(ord, case.name)))

    def matrix(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, generator=generator) / math.sqrt(shape[-1])

    def norm(width: int) -> Tensor:
        return 1 + 0.3 * torch.randn(width, generator=generator)

    tensors = {"fc.weight": matrix(H, len(case.layers) * H), "hidden_norm.weight": norm(H), "norm.weight": norm(H)}
    for index in range(len(case.causal)):
        p = f"layers.{index}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{p}{name}.weight"] = norm(H)
        shapes = {"q": (HEADS * HD, H), "k": (KV_HEADS * HD, H), "v": (KV_HEADS * HD, H), "o": (H, HEADS * HD)}
        for name, shape in shapes.items():
            tensors[f"{p}self_attn.{name}_proj.weight"] = matrix(*shape)
            if case.biases:
                tensors[f"{p}self_attn.{name}_proj.bias"] = matrix(shape[0])
        for name in ("q_norm", "k_norm"):
            tensors[f"{p}self_attn.{name}.weight"] = norm(HD)
        for name, shape in (("gate", (WIDE, H)), ("up", (WIDE, H)), ("down", (H, WIDE))):
            tensors[f"{p}mlp.{name}_proj.weight"] = matrix(*shape)
    return tensors | _correction(case, matrix) | _tables(case, matrix, generator)


def _correction(case: Block, matrix: Callable[..., Tensor]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    parts = ("attention_conv", "mlp_conv") if case.convolutions else ()
    for p in (f"layers.{index}.{part}" for index in range(len(case.causal)) for part in parts):
        tensors[f"{p}.base_kernel"] = matrix(2, 2, H, scale=4.0)
        tensors[f"{p}.kernel_projection.weight"] = matrix(2 * 2 * (H // GROUP), H)
    rows = D if case.reduced else V
    if case.correction in ("vanilla", "gated", "rnn"):
        tensors |= {
            "markov_head.markov_w1.weight": matrix(V, RANK),
            "markov_head.markov_w2.weight": matrix(rows, RANK),
        }
    wide = {"gated": ("gate_proj", RANK, H + RANK), "rnn": ("joint_proj", 3 * RANK, 2 * RANK + H)}
    if case.correction in wide:
        name, outputs, inputs = wide[case.correction]
        tensors[f"markov_head.{name}.weight"] = matrix(outputs, inputs, scale=2.0)
        tensors[f"markov_head.{name}.bias"] = matrix(outputs)
    if case.correction == "selector":
        tensors["candidate_selector.predecessor_codebook"] = matrix(V, RANK, scale=3.0)
        tensors["candidate_selector.successor_codebook"] = matrix(V, RANK, scale=3.0)
        tensors["candidate_selector.hidden_projection.weight"] = matrix(RANK, H)
    if case.confidence:
        tensors["confidence_head.proj.weight"] = matrix(1, H + (RANK if case.confidence == "markov" else 0))
        tensors["confidence_head.proj.bias"] = matrix(1)
    return tensors


def _tables(case: Block, matrix: Callable[..., Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    if case.reduced:
        return {"lm_head.weight": matrix(D, H), **draft_vocabulary(generator)}
    return {name: matrix(V, H) for name in ("lm_head.weight", "embed_tokens.weight") if case.copies}


def reference_outputs(case: Block, w: dict[str, Tensor], features: Tensor, root: int, table: Tensor) -> Tensor:
    """Normed outputs `[block, H]` of the slots after features `[n, A * H]`."""
    n = len(features)
    context = torch.stack([_rms(w["fc.weight"] @ feature, w["hidden_norm.weight"]) for feature in features])
    tokens = [root] + [MASK] * (case.block_size - 1)
    y = torch.stack([table[token] * case.embedding_scale for token in tokens])
    for index, (is_causal, window) in enumerate(zip(case.causal, case.windows, strict=True)):
        p = f"layers.{index}."
        a = _rms(y, w[f"{p}input_layernorm.weight"])
        before, after = _kernels(case, w, f"{p}attention_conv", a)
        a = _attention(case, w, f"{p}self_attn.", context, _convolved(a, before), n, is_causal, window)
        y = y + _convolved(a, after)
        m = _rms(y, w[f"{p}post_attention_layernorm.weight"])
        before, after = _kernels(case, w, f"{p}mlp_conv", m)
        m = _convolved(m, before)
        gated = torch.nn.functional.silu(m @ w[f"{p}mlp.gate_proj.weight"].T) * (m @ w[f"{p}mlp.up_proj.weight"].T)
        y = y + _convolved(gated @ w[f"{p}mlp.down_proj.weight"].T, after)
    return _rms(y, w["norm.weight"])


def reference_scores(
    case: Block, w: dict[str, Tensor], outputs: Tensor, head: Tensor, root: int, path: list[int]
) -> Tensor:
    """Log probabilities `[V or D]` of the token after a path of drafted tokens below the root."""
    state = torch.zeros(RANK)
    slot = len(path) + (not case.shifted)
    before = [root, *path] if case.shifted else [root, root, *path]  # of each slot
    added, context = torch.zeros(len(head)), torch.zeros(RANK)
    for k in range(slot + 1):
        if case.correction in ("vanilla", "gated", "rnn"):
            context, state = _markov(case, w, outputs[k], before[k], state)
            added = w["markov_head.markov_w2.weight"] @ context
    if case.correction == "selector":
        hidden = w["candidate_selector.hidden_projection.weight"] @ outputs[slot]
        context = w["candidate_selector.predecessor_codebook"][before[slot]] * hidden
        added = w["candidate_selector.successor_codebook"] @ context
    base = head @ outputs[slot] * case.multiplier
    if case.softcap is not None:
        base = case.softcap * torch.tanh(base / case.softcap)
    kept = base.argsort(descending=True)[: case.top]
    mass = base[kept].exp().sum().log() - base.exp().sum().log()
    scores = torch.full_like(base, -math.inf)
    scores[kept] = (base + added)[kept].log_softmax(0) + mass
    if case.confidence:
        row = [w["markov_head.markov_w1.weight"][before[slot]]] if case.confidence == "markov" else []
        logit = w["confidence_head.proj.weight"][0] @ torch.cat([outputs[slot], *row])
        scores = scores - torch.log1p(torch.exp(-logit - w["confidence_head.proj.bias"][0]))
    return scores


def _markov(case: Block, w: dict[str, Tensor], h: Tensor, before: int, state: Tensor) -> tuple[Tensor, Tensor]:
    e = w["markov_head.markov_w1.weight"][before]
    if case.correction == "gated":
        gate = w["markov_head.gate_proj.weight"] @ torch.cat([h, e]) + w["markov_head.gate_proj.bias"]
        return torch.sigmoid(gate) * e, state
    if case.correction == "vanilla":
        return e, state
    z = w["markov_head.joint_proj.weight"] @ torch.cat([state, e, h]) + w["markov_head.joint_proj.bias"]
    gate, candidate, output = torch.sigmoid(z[:RANK]), torch.tanh(z[RANK : 2 * RANK]), torch.tanh(z[2 * RANK :])
    return output, gate * state + (1 - gate) * candidate


def _kernels(case: Block, w: dict[str, Tensor], p: str, y: Tensor) -> tuple[Any, Any]:
    """Kernels `[block, 2, H]` before and after a part, or nothing."""
    if not case.convolutions:
        return None, None
    groups = H // GROUP
    own = w[f"{p}.base_kernel"] + torch.zeros(len(y), 2, 2, H)
    for t, state in enumerate(y):
        dynamic = (w[f"{p}.kernel_projection.weight"] @ state).view(2, 2, groups)
        for channel in range(H):
            own[t, :, :, channel] += dynamic[:, :, channel // GROUP]
    return own[:, 0], own[:, 1]


def _convolved(y: Tensor, kernels: Tensor | None) -> Tensor:
    if kernels is None:
        return y
    rows = []
    for t in range(len(y)):
        row = kernels[t, 0] * y[t]
        rows.append(row + kernels[t, 1] * y[t - 1] if t else row)
    return torch.stack(rows)


def _attention(
    case: Block, w: dict[str, Tensor], p: str, context: Tensor, a: Tensor, n: int, is_causal: bool, window: int | None
) -> Tensor:
    def projected(states: Tensor, name: str) -> Tensor:
        bias = w.get(f"{p}{name}_proj.bias", torch.zeros(()))
        return (states @ w[f"{p}{name}_proj.weight"].T + bias).view(len(states), -1, HD)

    states = torch.cat([context, a])
    q = _rotated(case, _rms(projected(a, "q"), w[f"{p}q_norm.weight"]), n)
    k = _rotated(case, _rms(projected(states, "k"), w[f"{p}k_norm.weight"]), 0)
    v, rows = projected(states, "v"), []
    for i in range(len(a)):
        own = n + i
        seen = [j for j in range(len(states)) if not (is_causal and j > own) and (window is None or own - j < window)]
        for head in range(HEADS):
            group = head // (HEADS // KV_HEADS)
            weights = (k[seen, group] @ q[i, head] / math.sqrt(HD)).softmax(0)
            rows.append(weights @ v[seen, group])
    attended = torch.stack(rows).view(len(a), -1)
    return attended @ w[f"{p}o_proj.weight"].T + w.get(f"{p}o_proj.bias", torch.zeros(()))


def _rotated(case: Block, x: Tensor, start: int) -> Tensor:
    half = HD // 2
    angles = (start + torch.arange(len(x)))[:, None, None] * case.theta ** (-torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1)


def _rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight


BODY: dict[str, Any] = {
    "hidden_size": H,
    "intermediate_size": WIDE,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HD,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "vocab_size": V,
}
IDS = [1, 3, 5]  # outputs of layers, of the default [2, 4, 6]


def zlab(*, old: bool = False, architecture: str = "DFlashDraftModel", **more: Any) -> dict[str, Any]:
    """z-lab's config; the `old` one has the block size at the top."""
    own = {key: more.pop(key) for key in list(more) if key not in ("layer_types", "sliding_window", "is_causal")}
    dflash = {"mask_token_id": MASK, "target_layer_ids": IDS, **own}
    places = {"block_size": 4} if old else {}
    dflash |= {} if old else {"block_size": 4}
    shared = {"architectures": [architecture], "num_target_layers": LAYERS, "tie_word_embeddings": True}
    return {**BODY, **shared, **places, **more, "use_sliding_window": True, "dflash_config": dflash}


def deepspec(**more: Any) -> dict[str, Any]:
    flat = {"architectures": ["Qwen3DSparkModel"], "block_size": 4, "mask_token_id": MASK, "target_layer_ids": IDS}
    return {
        **BODY,
        **flat,
        "num_target_layers": LAYERS,
        "layer_types": ["full_attention"] * 2,
        "num_anchors": 8,
        **more,
    }


def speculators(kind: str, layer: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {
        "architectures": [f"{kind}DraftModel"],
        "speculators_model_type": kind,
        "speculators_config": {"algorithm": kind, "verifier": {"name_or_path": "some/target", "architectures": []}},
        "transformer_layer_config": {"model_type": "qwen3", **BODY, **(layer or {})},
        "block_size": 4,
        "mask_token_id": MASK,
        "aux_hidden_state_layer_ids": [2, 4, 6],
        "draft_vocab_size": V,
        "tie_word_embeddings": False,
        **more,
    }


def plainly(folder: Path, tensors: dict[str, Tensor], case: Block) -> None:
    write_config(folder, case.config)
    save(folder, tensors)


def with_bare_prefix(prefix: str) -> Callable[[Path, dict[str, Tensor], Block], None]:
    def write(folder: Path, tensors: dict[str, Tensor], case: Block) -> None:
        plainly(folder, {f"{prefix}{name}": tensor for name, tensor in tensors.items()}, case)

    return write


def as_embeddings(folder: Path, tensors: dict[str, Tensor], case: Block) -> None:
    """Codebooks as z-lab's own `save_pretrained` names them."""
    names = {f"candidate_selector__{name}": f"candidate_selector.{name}.weight" for name in CODEBOOKS}
    plainly(folder, rename(tensors, **names), case)


CODEBOOKS = ("predecessor_codebook", "successor_codebook")


def as_muse(folder: Path, tensors: dict[str, Tensor], case: Block) -> None:
    names = {"fc__weight": "encoder.fc.weight", "hidden_norm__weight": "encoder.output_norm_enc.weight"}
    plainly(folder, rename(tensors, **names), case)


SPARK = {"markov_rank": RANK, "enable_confidence_head": True, "confidence_head_with_markov": True}
SLIDING, FULL = "sliding_attention", "full_attention"
MIXED = {"layer_types": [SLIDING, FULL], "sliding_window": 6}
SELECTOR = {"conv_kernel_size": 2, "conv_group_size": GROUP, "selector_rank": RANK, "selector_top_k": 12}
MUSE = {
    **BODY,
    "model_type": "muse_glimmer_assistant",
    "architectures": ["MuseGlimmerAssistantModel"],
    "block_size": 4,
    "mask_token_id": MASK,
    "target_layer_ids": IDS,
    "layer_types": [SLIDING, SLIDING],
    "sliding_window": 6,
}
CASES = [
    Block("z-lab, old", plainly, zlab(old=True)),
    Block("z-lab, new, a sliding layer", plainly, zlab(**MIXED), causal=(True, False), windows=(6, None)),
    Block("z-lab, not causal", plainly, zlab(**MIXED, is_causal=False), windows=(6, None)),
    Block("z-lab, causal", plainly, zlab(is_causal=True), causal=(True, True)),
    Block("z-lab, biases", plainly, zlab() | {"attention_bias": True}, biases=True),
    Block(
        "z-lab, scales",
        plainly,
        zlab(input_embedding_scale=2.0, output_multiplier=0.5, final_logit_softcapping=3.0),
        embedding_scale=2.0,
        multiplier=0.5,
        softcap=3.0,
    ),
    Block("z-lab, prefixed", with_bare_prefix("model."), zlab()),
    Block("JetSpec", plainly, zlab(causal_head=True), causal=(True, True)),
    Block("DeepSpec DFlash", plainly, deepspec(markov_rank=0), format="deepspec", shifted=True, copies=True),
    *(
        Block(
            f"DeepSpec DSpark {kind}",
            plainly,
            deepspec(**SPARK, markov_head_type=kind),
            format="deepspec",
            shifted=True,
            copies=True,
            correction=kind,
            confidence="markov",
        )
        for kind in ("vanilla", "gated", "rnn")
    ),
    Block(
        "DSpark in a checkpoint's own tensors",
        with_bare_prefix("mtp_dspark."),
        deepspec(**SPARK | {"confidence_head_with_markov": False}),
        format="deepspec",
        shifted=True,
        copies=True,
        correction="vanilla",
        confidence="hidden",
    ),
    Block("speculators DFlash", plainly, speculators("dflash"), format="speculators"),
    Block(
        "speculators DFlash, reduced",
        plainly,
        speculators("dflash", draft_vocab_size=D),
        format="speculators",
        reduced=True,
    ),
    Block(
        "speculators DFlash, sliding",
        plainly,
        speculators("dflash", MIXED | {"use_sliding_window": True}),
        format="speculators",
        causal=(True, False),
        windows=(6, None),
    ),
    Block(
        "speculators DFlash, sliding and not causal",
        plainly,
        speculators("dflash", MIXED | {"use_sliding_window": True}, sliding_window_non_causal=True),
        format="speculators",
        windows=(6, None),
    ),
    *(
        Block(
            f"speculators DSpark {kind}, {'anchor' if anchor else 'in place'}",
            plainly,
            speculators("dspark", **SPARK, markov_head_type=kind, sample_from_anchor=anchor),
            format="speculators",
            shifted=anchor,
            correction=kind,
            confidence="markov",
        )
        for kind in ("vanilla", "rnn")
        for anchor in (True, False)
    ),
    Block(
        "speculators DSpark, reduced",
        plainly,
        speculators("dspark", **SPARK, draft_vocab_size=D),
        format="speculators",
        shifted=True,
        correction="vanilla",
        confidence="markov",
        reduced=True,
    ),
    *(
        Block(
            f"DFlash 2, {name}",
            write,
            config,
            format=layout,
            correction="selector",
            convolutions=True,
            top=12,
            windows=(6, None),
        )
        for name, write, config, layout in (
            ("z-lab", plainly, zlab(**MIXED, is_causal=False, **SELECTOR), "z-lab"),
            ("z-lab, saved", as_embeddings, zlab(**MIXED, is_causal=False, **SELECTOR), "z-lab"),
            ("speculators", plainly, speculators("dflash2", MIXED, **SELECTOR), "speculators"),
        )
    ),
    Block("Muse", as_muse, MUSE, format="muse", windows=(7, 7)),
]
