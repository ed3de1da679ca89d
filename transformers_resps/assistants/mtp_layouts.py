"""How publishers store MTP layers: the settings of each model family, and the names of the tensors.

The names are from SGLang 0.5.23 (`*_mtp.py`, `*_nextn.py`, `ernie4_eagle.py`). Only JSON and the MTP layers' tensors
are loaded, from safetensors.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from ..drafting.kinds import MTP
from ..hub.checkpoint import CheckpointFiles, tensor_of


@dataclass(frozen=True, slots=True)
class MtpConfig:
    """Settings of MTP layers: what they compute, and which parts they have."""

    depths: int = 1  # number of layers; each drafts one token, but a single layer drafts any number
    feature_layer: int | None = None  # target layer whose output is read, counted from 1; `None`: the last
    fed: Literal["after", "before"] = "after"  # whether that output is read after or before the final norm
    # Input of the next drafted token: the layer's output after or before its norm, or the target's state again.
    fed_back: Literal["after", "before", "target"] = "after"
    hidden_first: bool = False  # whether the projection reads (state, embedding), not (embedding, state)
    zero_centred: bool | None = None  # whether norms in the file multiply by 1 + weight; `None`: as the target's
    zeroed_start: bool = False  # whether a text's first hidden state is paired with zeros, not an embedding
    layer_types: tuple[str, ...] = ()  # "full_attention" or "sliding_attention" for each layer; empty: full
    experts: tuple[bool, ...] = ()  # whether each layer has a mixture of experts; empty: none has
    projection_bias: bool = False
    own_norm: bool = True  # whether the layers have norms before the output head
    own_embedding: bool = False  # whether the layers have their own embeddings, not the target's
    own_output_head: bool = False  # whether the layers have their own output heads, not the target's
    draft_token_ids: tuple[int, ...] | None = None  # the tokens that can be proposed, ascending; `None` for all

    def __post_init__(self) -> None:
        for name, allowed in (("fed", ("after", "before")), ("fed_back", ("after", "before", "target"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` must be one of {allowed}, got {getattr(self, name)!r}.")

    def layer_type(self, depth: int) -> str:
        return self.layer_types[depth] if self.layer_types else "full_attention"


# Substring of tensor names, or prefix of `model_type` -> settings of that model family.
_FAMILIES: dict[str, dict[str, Any]] = {
    "mtp_layers.0.input_proj.": {"hidden_first": True, "zeroed_start": True},  # MiMo-7B
    "mtp_linear_proj.0.": {"fed_back": "before", "zeroed_start": True},  # ERNIE-4.5
    "mimo_v2": {"fed_back": "target", "layer_types": ("sliding_attention",)},
    "mellum": {"layer_types": ("sliding_attention",)},
    "step3": {"fed": "before", "fed_back": "before"},
}
# Substring of tensor names -> why such layers are not supported, as the end of the error message.
_REFUSED = {
    ".e_proj.": "carries a stream of hyper-connections from token to token, as DeepSeek-V4's",
    "mtp.fc_embedding.": "carries a stream of hyper-connections from token to token, as Qwen4's",
    ".mixer.": "runs several layers of different kinds for one token, as Nemotron-H's",
    ".indexer.": "attends to what an indexer selects, as DeepSeek-V3.2's and GLM-5's",
    "mtp_dspark.": "is a block head (DSpark), which drafts several tokens at once",
}

# Published prefixes of tensor names -> replacements. Replaced names begin with `mtp.layers` or `layers`.
_ROOTS = {
    r"^(?:(?:model|language_model)\.)+": "",
    r"^mtp\.(?=(?:fc|norm|embed_tokens|pre_fc_norm_(?:embedding|hidden))\.)": "mtp.layers.0.",
    r"^mtp_(block|emb_norm|hidden_norm|linear_proj)\.(\d+)\.": r"mtp.layers.\2.\1.",
}
# Prefix of a layer, numbered from 0 (with `mtp`) or after the target's layers (without). `transformer` is dropped.
_LAYER = re.compile(r"(mtp[._])?layers\.(\d+)\.(?:transformer(?:_layer)?\.)?")
# Our name of a part -> publishers' names. All other tensors belong to the decoder layer, `block`.
_PARTS = {
    "enorm": r"enorm(?:\.m)?|emb_norm|pre_fc_norm_embedding|token_layernorm",
    "hnorm": r"hnorm(?:\.m)?|hidden_norm|pre_fc_norm_hidden|hidden_layernorm",
    "eh_proj": r"eh_proj|fc|input_proj|linear_proj",
    "norm": r"norm|final_layernorm|shared_head\.norm",
    "head": r"head|shared_head\.(?:head|output)",
    "embed_tokens": r"embed_tokens",
    "block": r"block",
}
_PART = re.compile(rf"(?:{'|'.join(f'(?P<{ours}>{theirs})' for ours, theirs in _PARTS.items())})\.")
# Published prefixes of names in the decoder layer -> Transformers' prefixes.
_INSIDE = {
    "pre_mlp_layernorm.": "post_attention_layernorm.",
    "self_attn.attention_sink_bias": "self_attn.sinks",
    "mlp.e_score_correction_bias": "mlp.gate.e_score_correction_bias",
    "mlp.gate.expert_bias": "mlp.gate.e_score_correction_bias",
    "mlp.moe_statics.": "mlp.gate.moe_statics.",
    "moe.router_bias": "mlp.gate.e_score_correction_bias",
    "moe.gate.": "mlp.gate.",
    "share_expert.": "mlp.shared_experts.",
}
# Names of one expert's tensor or, without a number, of all experts'. `_MERGED`: projection -> our tensor and its half.
_EXPERT = re.compile(r"(.*block\.)(?:mlp\.experts\.(\d+)|moe)\.(gate|up|down)_proj\.weight")
_MERGED = {"gate": ("gate_up_proj", 0), "up": ("gate_up_proj", 1), "down": ("down_proj", 0)}

_SCALE = "_scale_inv"  # Suffix of the name of an FP8 tensor's scales, one for each block.
_BLOCK = (128, 128)  # Default rows and columns of a block.
_QUANTISED = ("_packed", "_scale", "_scale_2", "zero_point", "qweight", "qzeros", ".scales", ".g_idx", ".absmax")
_NOT_OURS = (_SCALE, ".inv_freq", ".cos_cached", ".sin_cached")  # Scales, and tensors that are computed here.
# Config fields that may state the number of MTP layers.
_DEPTHS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers", "mtp_num_layers")
_COMPARED = 64  # Number of rows that are compared to recognise a copy.


@dataclass(frozen=True, slots=True)
class Stored:
    """Names of the tensors in a checkpoint that together make one tensor of our MTP layers. Publishers store this
    tensor whole or as two halves of its rows, and may divide the whole or each half into one tensor for each expert.
    """

    # For each half: expert -> name. The key -1 means one tensor for all experts.
    parts: tuple[dict[int, str], dict[int, str]] = field(default_factory=lambda: ({}, {}))

    @property
    def names(self) -> list[list[str]]:
        """The names of each stored half, or of the whole tensor, in the order of the experts."""
        return [[part[key] for key in sorted(part)] for part in self.parts if part]

    @property
    def _is_apart(self) -> bool:
        return -1 not in self.parts[0]

    def joined(self, tensor_of: Callable[[str], Tensor]) -> Tensor:
        rows = [
            torch.stack([tensor_of(name) for name in names]) if self._is_apart else tensor_of(names[0])
            for names in self.names
        ]
        return torch.cat(rows, dim=1) if len(rows) > 1 else rows[0]

    def split(self, tensor: Tensor) -> dict[str, Tensor]:
        """Split our tensor into the stored tensors, by name; the inverse of `joined`."""
        rows = tensor.chunk(len(self.names), dim=1) if len(self.names) > 1 else (tensor,)
        each = [part.unbind(0) if self._is_apart else (part,) for part in rows]
        return {
            name: one
            for names, ones in zip(self.names, each, strict=True)
            for name, one in zip(names, ones, strict=True)
        }


def stored_names(names: Iterable[str], layer_count: int) -> dict[str, Stored]:
    """Map our name of each MTP tensor to its `names` in a checkpoint whose target has `layer_count` layers."""
    stored: dict[str, Stored] = {}
    for name in names:
        ours = _canonical(name, layer_count)
        if ours is None or ours.endswith(_NOT_OURS):
            continue
        key, place = -1, 0
        if expert := _EXPERT.fullmatch(ours):
            merged, place = _MERGED[expert[3]]
            ours = f"{expert[1]}mlp.experts.{merged}"
            key = int(expert[2] or -1)
        stored.setdefault(ours, Stored()).parts[place][key] = name
    return stored


def _canonical(name: str, layer_count: int) -> str | None:
    """Return our name, `layers.{depth}.{part}`, of a stored tensor; `None` if it belongs to no MTP layer."""
    for theirs, ours in _ROOTS.items():
        name = re.sub(theirs, ours, name)
    layer = _LAYER.match(name)
    depth = -1 if layer is None else int(layer[2]) - (0 if layer[1] else layer_count)
    if layer is None or depth < 0:
        return None
    rest = name[layer.end() :]
    part = _PART.match(rest)
    if part and part.lastgroup != "block":
        return f"layers.{depth}.{part.lastgroup}.{rest[part.end() :]}"
    rest = rest[part.end() :] if part else rest
    renamed = (ours + rest.removeprefix(theirs) for theirs, ours in _INSIDE.items() if rest.startswith(theirs))
    return f"layers.{depth}.block.{next(renamed, rest)}"


def names_mtp(config: dict[str, Any]) -> bool:
    """Return whether a config says that its checkpoint has MTP layers, with or without their target."""
    parts = (config, *(part for part in config.values() if isinstance(part, dict)))
    return config.get("model_type") == MTP.saved_as or any(part.get(key) for part in parts for key in _DEPTHS)


class MtpCheckpoint:
    """Reads MTP layers from a checkpoint of their target, or from a checkpoint that contains only MTP layers.

    `name` is a Hub id or folder; `hub` has keywords of `huggingface_hub.hf_hub_download`. Raises a `ValueError` if the
    checkpoint is damaged or has no MTP layers that are supported, an `OSError` if the Hub refuses the request.
    """

    def __init__(self, name: str, hub: dict[str, Any]) -> None:
        self.name, self._checkpoint = name, CheckpointFiles(name, hub)
        config = self._checkpoint.config()
        if config is None:
            raise ValueError(
                f"There is no config.json in {name}. Pass the repository or folder of the original checkpoint, with "
                "config.json and safetensors, and check whether you are offline."
            )
        self._config = config
        nested = (self._config.get(key) for key in ("text_config", "language_config", "llm_config"))
        self._text: dict[str, Any] = next(filter(None, nested), self._config)
        places = self._checkpoint.places("model.safetensors.index.json", "model.safetensors")
        if places is None:
            raise ValueError(
                f"There is neither model.safetensors nor its index in {name}. Pass the original repository, "
                "which has them, and check whether you are offline."
            )
        self._files = places  # tensor -> file
        self.stored = stored_names(self._files, int(self.stated("num_hidden_layers") or 0))
        self._check()

    def stated(self, key: str) -> Any:
        """Look up a field of the text decoder's config; `None` if it is missing."""
        return self._text.get(key, self._config.get(key))

    def _check(self) -> None:
        mine = [name for name in self._files if "mtp" in name]
        mine += [name for stored in self.stored.values() for names in stored.names for name in names]
        for part, reason in _REFUSED.items():
            if any(part in name for name in mine):
                raise ValueError(
                    f"The MTP module of {self.name} {reason}. Draft with a head or a small model instead."
                )
        if not (mine or names_mtp(self._config)):
            raise ValueError(
                f"{self.name} is a {self._config.get('model_type')} model without MTP layers: neither its config nor "
                "its files name any. Pass a draft head or a small model, or `policy='auto'` alone to draft by lookup."
            )
        if "layers.0.eh_proj.weight" not in self.stored:
            found = f"only {', '.join(sorted(mine)[:3])}" if mine else "none"
            raise ValueError(
                f"{self.name} holds no MTP weights that we know ({found}). Conversions often drop them: pass the "
                "original repository to `MtpHead.from_pretrained(id, target=model)`."
            )
        quantised = [name for name in mine if name.endswith(_QUANTISED)]
        if quantised:
            raise ValueError(
                f"{self.name} stores its MTP module quantised ({quantised[0]}), in a way that we do not read. Pass a "
                "repository in bfloat16 or block-wise FP8 (`weight_scale_inv`)."
            )
        stated = max((int(self.stated(key) or 0) for key in _DEPTHS), default=0)
        if stated > self._depths:
            raise ValueError(
                f"The config of {self.name} names {stated} MTP layers, but its files hold {self._depths}. Download it "
                "again, or pass the original repository."
            )

    def check_target(self, target: dict[str, Any]) -> None:
        """Raise a `ValueError` if the sizes in `target`, a `target_identity`, differ from the checkpoint's."""
        wrong = [
            f"{key} {self.stated(key)} (the target: {target[key]})"
            for key in ("hidden_size", "vocab_size")
            if self.stated(key) not in (None, target[key])
        ]
        if wrong:
            raise ValueError(
                f"The MTP layers of {self.name} need {', '.join(wrong)}. Pass a checkpoint of the target's own model, "
                f"which is {target['name_or_path'] or target['model_type']}."
            )

    @property
    def _depths(self) -> int:
        return 1 + max(int(name.split(".")[1]) for name in self.stored)

    def config(self) -> MtpConfig:
        """Infer the `MtpConfig`: the model family decides what the layers compute, the tensors which parts exist."""
        if self._config.get("model_type") == MTP.saved_as:
            lists = {key: tuple(value) for key, value in self._config["mtp"].items() if isinstance(value, list)}
            return MtpConfig(**self._config["mtp"] | lists)
        depths, known = self._depths, dict[str, Any]()
        kinds = [str(config.get("model_type")) for config in (self._text, self._config)]
        for sign, fields in _FAMILIES.items():
            if any(kind.startswith(sign) for kind in kinds) or any(sign in name for name in self._files):
                known |= fields
        above = (self.stated("layer_types") or [])[self.stated("num_hidden_layers") :]
        types = tuple((self.stated("mtp_layer_types") or above)[:depths])
        return MtpConfig(
            depths,
            layer_types=types or known.pop("layer_types", ()) * depths,
            experts=tuple(f"layers.{depth}.block.mlp.gate.weight" in self.stored for depth in range(depths)),
            projection_bias="layers.0.eh_proj.bias" in self.stored,
            own_norm="layers.0.norm.weight" in self.stored,
            own_embedding="layers.0.embed_tokens.weight" in self.stored,
            own_output_head="layers.0.head.weight" in self.stored,
            **{key: value for key, value in known.items() if key != "layer_types"},
        )

    def is_copy(self, ours: str, weight: Tensor) -> bool:
        """Return whether rows of tensor `ours`, a sample, equal those of the target's `weight`; false if offloaded."""
        if weight.is_meta:
            return False
        name = self.stored[ours].names[0][0]
        some = range(0, len(weight), max(1, len(weight) // _COMPARED))

        def rows(file: Any, name: str) -> Tensor | None:
            part = file.get_slice(name)
            return torch.stack([part[row] for row in some]) if part.get_shape() == list(weight.shape) else None

        found = self._checkpoint.read({name: self._files[name]}, rows)[name]
        theirs = weight.detach()[list(some)].cpu()
        return found is not None and torch.equal(found.to(theirs.dtype), theirs)

    def read(self, ours: Iterable[str], dtype: torch.dtype, *, sizes_only: bool = False) -> dict[str, Tensor]:
        """Load the tensors with our names `ours` to the CPU: FP8 tensors as `dtype`, others as stored. `sizes_only`
        makes meta tensors instead. Raises a `ValueError` if a file is damaged or FP8 scales are missing.
        """
        wanted = {name: self.stored[name] for name in ours}
        raw = [name for stored in wanted.values() for names in stored.names for name in names]
        raw += [name + _SCALE for name in raw if name + _SCALE in self._files]
        take = _size_of if sizes_only else tensor_of
        found = self._checkpoint.read({name: self._files[name] for name in raw}, take)
        return {name: stored.joined(partial(self._whole, found, dtype)) for name, stored in wanted.items()}

    def _whole(self, found: dict[str, Tensor], dtype: torch.dtype, name: str) -> Tensor:
        """Pop a tensor from `found`, multiplied by its scales if it is in FP8. Transformers' `Fp8Dequantize` refuses
        an incomplete last block, which DeepSeek-V3's `kv_a_proj_with_mqa` has.
        """
        tensor, scales = found.pop(name), found.pop(name + _SCALE, None)
        if tensor.dtype != torch.float8_e4m3fn:
            return tensor
        sizes = (self.stated("quantization_config") or {}).get("weight_block_size") or _BLOCK
        needed = [-(-length // size) for length, size in zip(tensor.shape[-2:], sizes, strict=True)]
        if scales is None or list(scales.shape[-2:]) != needed:
            raise ValueError(
                f"{self.name} stores {name} in FP8 without a scale for each block of {sizes[0]} x {sizes[1]} "
                f"(`{name + _SCALE}`). Pass a repository in bfloat16."
            )
        for dim, size in zip((-2, -1), sizes, strict=True):
            scales = scales.repeat_interleave(size, dim).narrow(dim, 0, tensor.shape[dim])
        return (tensor.float() * scales).to(dtype)


def _size_of(file: Any, name: str) -> Tensor:
    part = file.get_slice(name)
    return torch.empty(part.get_shape(), dtype=part[:0].dtype, device="meta")
