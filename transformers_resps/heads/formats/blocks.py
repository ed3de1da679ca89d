"""One published checkpoint of a block head -> the config and tensors of our canonical one, or why it is none.

The sources are read commits of z-lab/dflash, deepseek-ai/DeepSpec, vllm-project/speculators, hao-ai-lab/JetSpec and
Transformers. They share tensors and differ in which slot predicts which token, in what a slot sees, and in what layer
ids count.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..block_head import BlockHeadConfig
from ..identity import target_identity
from .kinds import check_class, raw_names
from .publishers import PublishedConfig, Publisher
from .reading import PUBLISHED_ONLY, Checkpoint, draft_offsets, is_targets
from .tensor_names import layer_count


class Layout(StrEnum):
    """Who wrote a file, as far as it decides what the file means."""

    ZLAB = "z-lab"
    DEEPSPEC = "deepspec"
    SPECULATORS = "speculators"
    MUSE = "muse"


_SPELLINGS = {
    "encoder.fc.weight": "fc.weight",
    "encoder.output_norm_enc.weight": "hidden_norm.weight",
    "candidate_selector.predecessor_codebook": "candidate_selector.predecessor_codebook.weight",
    "candidate_selector.successor_codebook": "candidate_selector.successor_codebook.weight",
}
_COPIED = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "initializer_range": 0.02}
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_ATTENTION = "layers.0.self_attn."
_MUSE_BASE = 5e5  # of RoPE, where its config leaves it out
# Parts of tensors' names -> what they are of, which no block head of ours has.
_OTHER_PARTS = {
    "qkv_proj": "has fused projections of queries, keys and values (`qkv_proj`)",
    ".g_proj": "gates its attention (`g_proj`)",
    "aux_hidden_norms": "norms each feature alone (`aux_hidden_norms`)",
    "kv_a_proj": "has MLA attention (low-rank keys and values)",
    "q_a_proj": "has MLA attention (low-rank queries)",
    "sink": "has attention sinks",
    "weight_packed": "is quantised (`weight_packed`)",
    "weight_scale": "is quantised (`weight_scale`)",
    "qweight": "is quantised (`qweight`)",
    "prefix_gru": "is a Domino head (`prefix_gru`)",
    "lilicorr": "is a LiLiCorr head",
    "feedforward_layernorm": "has the layers of Gemma (`pre_feedforward_layernorm`)",
    "mlp.experts": "has a mixture of experts in its layers",
}
_KINDS = (None, "dflash", "dflash2", "dspark")  # `speculators_model_type`


def canonical_block_head(
    checkpoint: Checkpoint, target: PreTrainedModel | None, overrides: dict[str, Any]
) -> tuple[BlockHeadConfig, dict[str, Tensor]]:
    """Config and tensors of the block head in `checkpoint`, from any publisher.

    Args:
        checkpoint: what was read.
        target: the model the head is for; gives what the config leaves out.
        overrides: corrections, by field of `BlockHeadConfig`, and `rope_theta`.

    Raises:
        ValueError: it is no block head, is one that cannot be read, contradicts itself, or does not fit the target.
    """
    check_class(checkpoint.name, checkpoint.config, checkpoint.tensors, "BlockHead")
    ours = {key: value for key, value in overrides.items() if key not in PUBLISHED_ONLY}
    if checkpoint.config.get("model_type") == BlockHeadConfig.model_type:
        fields, theta = checkpoint.config | ours, overrides.get("rope_theta")
        if theta is not None:
            fields["rope_parameters"] = {**fields["rope_parameters"], "rope_theta": float(theta)}
        return BlockHeadConfig.from_dict(fields), checkpoint.tensors
    fields, tensors = _PublishedBlock(checkpoint, target, overrides).read()
    return BlockHeadConfig(**fields | ours), tensors


class _PublishedBlock:
    """Another publisher's block head, read into the fields of our config and the tensors of our head."""

    def __init__(self, checkpoint: Checkpoint, target: PreTrainedModel | None, overrides: dict[str, Any]) -> None:
        self._source, self._target, self._overrides = checkpoint.name, target, overrides
        names, config = raw_names(checkpoint.tensors), checkpoint.config
        self._layout = _layout_of(config, names)
        self._tensors: dict[str, Tensor] = {_SPELLINGS.get(name, name): part for name, part in names.items()}
        nested = (config.get("transformer_layer_config") or {}, config, config.get("dflash_config") or {})
        flat = {key: value for part in nested for key, value in part.items() if value is not None}
        self._stated = {key: value for key, value in (flat | overrides).items() if value is not None}

    def read(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        self._refuse_others()
        sizes, identity = self._sizes(), self._identity()
        windows = self._windows(sizes["num_hidden_layers"])
        fields = {
            **{key: self._stated.get(key, default) for key, default in _COPIED.items()},
            **{key: self._stated.get(key) for key in _TOKEN_IDS},
            **sizes,
            **self._correction(),
            "attention_bias": f"{_ATTENTION}q_proj.bias" in self._tensors,
            "block_size": self._needed("block_size"),
            "mask_token_id": self._needed("mask_token_id"),
            "shifted": self._is_shifted,
            "causal": self._causal(windows),
            "windows": [window or None for window in windows],
            "feature_layers": self._feature_layers(sizes, identity.get("num_hidden_layers")),
            "embedding_scale": float(self._stated.get("input_embedding_scale", 1.0)),
            "output_multiplier": float(self._stated.get("output_multiplier", 1.0)),
            "final_logit_softcapping": self._stated.get("final_logit_softcapping") or None,
            "rope_parameters": self._rope_parameters(),
            "target": identity,
            "source": {"format": str(self._layout), "layer_ids": self._layer_ids},
        }
        return self._without_borrowed(fields)

    def _refuse_others(self) -> None:
        stated, names = self._stated, self._tensors
        reasons = [reason for part, reason in _OTHER_PARTS.items() if any(part in name.lower() for name in names)]
        reasons += ["is a LiLiCorr head" for key in stated if "lilicorr" in key.lower()]
        reasons += [f"is quantised ({key})" for key in ("quantization_config", "compression_config") if key in stated]
        for key, known in (("speculators_model_type", _KINDS), ("projector_type", (None, "dflash", "dspark"))):
            if stated.get(key) not in known:
                reasons.append(f"is of an unknown kind ({key} {stated[key]!r})")
        if reasons:
            raise ValueError(
                f"{self._source} {reasons[0]}, which no block head of this package has. Use a plain DFlash, DSpark, "
                "JetSpec or DFlash 2 head of the same target."
            )
        missing = [name for name in ("fc.weight", "hidden_norm.weight", "norm.weight") if name not in names]
        missing += [name for name in (f"{_ATTENTION}q_proj.weight", f"{_ATTENTION}q_norm.weight") if name not in names]
        if missing:
            raise ValueError(f"{self._source} lacks {missing}, which every block head has. Download it again.")

    def _needed(self, field: str) -> int:
        if field not in self._stated:
            raise ValueError(
                f"The config of {self._source} states no `{field}`. Pass `{field}=` as it was trained with."
            )
        value: int = self._stated[field]
        return value

    @property
    def _is_shifted(self) -> bool:
        """Whether the root's slot predicts the first token."""
        if self._layout is Layout.SPECULATORS:
            default = self._stated.get("speculators_model_type") == "dspark"
            return bool(self._stated.get("sample_from_anchor", default))
        return self._layout is Layout.DEEPSPEC or bool(self._stated.get("shift_label"))

    def _windows(self, count: int) -> list[int | None]:
        """Of each layer, the positions that a slot sees; 0 for all in a sliding layer, `None` in a full one."""
        window = self._stated.get("sliding_window") or 0
        if not self._stated.get("use_sliding_window", True):
            window = 0
        kinds = self._stated.get("layer_types") or ["full_attention"] * count
        unknown = set(kinds) - {"full_attention", "sliding_attention"}
        if len(kinds) != count or unknown:
            raise ValueError(
                f"The config of {self._source} has {len(kinds)} `layer_types`, {sorted(set(kinds))}, but its {count} "
                "layers need one each, sliding or full. Correct it."
            )
        # Transformers' own sees one position more to the left: a distance of at most the window
        more = 1 if self._layout is Layout.MUSE and window else 0
        return [window + more if kind == "sliding_attention" else None for kind in kinds]

    def _causal(self, windows: list[int | None]) -> list[bool]:
        """Of each layer, whether a slot sees no later one."""
        stated, is_sliding = self._stated, [window is not None for window in windows]
        if self._layout in (Layout.DEEPSPEC, Layout.MUSE):
            return [False] * len(windows)
        if self._layout is Layout.SPECULATORS:
            default = stated.get("speculators_model_type") == "dflash2"
            return [False] * len(windows) if stated.get("sliding_window_non_causal", default) else is_sliding
        flags = [stated[key] for key in ("causal_head", "is_causal", "causal") if isinstance(stated.get(key), bool)]
        return [flags[0]] * len(windows) if flags else is_sliding

    @property
    def _layer_ids(self) -> list[int] | None:
        """The published layer ids, as they are."""
        key = "aux_hidden_state_layer_ids" if self._layout is Layout.SPECULATORS else "target_layer_ids"
        return self._stated.get(key)

    def _feature_layers(self, sizes: dict[str, int], depth: int | None) -> list[int]:
        """In the `output_hidden_states` convention: speculators' ids are that already, all others count layers."""
        ids, count = self._layer_ids, self._tensors["fc.weight"].shape[1] // sizes["hidden_size"]
        layers: list[int] | None = self._stated.get("feature_layers")
        if layers is None and ids is not None:
            layers = [layer + (self._layout is not Layout.SPECULATORS) for layer in ids]
        elif layers is None and depth is not None:
            layers = [layer + 1 for layer in default_layer_ids(depth, sizes["num_hidden_layers"])]
        if layers is None:
            raise ValueError(
                f"{self._source} does not say which layers of its target it reads; the default depends on the depth. "
                "Pass `target=`, or `feature_layers=[...]`, counted as in `output_hidden_states`."
            )
        if len(layers) != count:
            raise ValueError(
                f"{self._source} has an fc that reads {count} layers, but its layers are {layers}. Pass "
                f"`feature_layers=[...]` with {count} ids, counted as in `output_hidden_states`."
            )
        return layers

    def _rope_parameters(self) -> dict[str, Any]:
        rope = self._stated.get("rope_parameters") or {}
        nested = rope.get("sliding_attention") or rope.get("full_attention")
        fields = self._stated if nested is None else {**self._stated, "rope_parameters": nested}
        if self._layout is Layout.MUSE:
            fields = {"rope_theta": rope.get("rope_theta", _MUSE_BASE), **fields}
        return PublishedConfig(fields, self._overrides, Publisher.DEEPSPEC, self._source).rope_parameters()

    def _sizes(self) -> dict[str, int]:
        """The sizes of the config, as the tensors have them; the published config must agree."""
        head_dim = len(self._tensors[f"{_ATTENTION}q_norm.weight"])
        query, key = (len(self._tensors[f"{_ATTENTION}{name}_proj.weight"]) for name in "qk")
        sizes = {
            "hidden_size": len(self._tensors["norm.weight"]),
            "intermediate_size": len(self._tensors["layers.0.mlp.gate_proj.weight"]),
            "num_hidden_layers": layer_count(self._tensors),
            "num_attention_heads": query // head_dim,
            "num_key_value_heads": key // head_dim,
            "head_dim": head_dim,
            "vocab_size": self._vocab_size(),
        }
        wrong = [
            f"{key} {self._stated[key]} (the tensors: {size})"
            for key, size in sizes.items()
            if self._stated.get(key, size) != size
        ]
        if wrong:
            raise ValueError(f"The config of {self._source} states {', '.join(wrong)}. Download the head again.")
        width = self._stated.get("target_hidden_size") or sizes["hidden_size"]
        if width != sizes["hidden_size"] or self._tensors["fc.weight"].shape[1] % width:
            raise ValueError(
                f"{self._source} is {sizes['hidden_size']} wide and reads features of {width}, but a block head is as "
                "wide as its target. Use another head."
            )
        return sizes

    def _vocab_size(self) -> int:
        """The target's, from a tensor that shows it, the target, or the config."""
        shown = [
            len(self._tensors[name])
            for name in ("embed_tokens.weight", "t2d", "markov_head.markov_w1.weight")
            if name in self._tensors
        ]
        theirs = None if self._target is None else self._target.config.get_text_config().vocab_size
        found: int | None = next(iter(shown), None) or theirs or self._stated.get("vocab_size")
        if found is None:
            raise ValueError(f"{self._source} states no `vocab_size`. Pass `target=`, or `vocab_size=`.")
        if theirs is not None and theirs != found:
            raise ValueError(
                f"{self._source} was made for a vocabulary of {found} tokens, but the target has {theirs}. Load the "
                "head that was made for this target."
            )
        return found

    def _identity(self) -> dict[str, Any]:
        """The given target's identity, or what the config says about it."""
        depth = self._stated.get("num_target_layers")
        if self._target is None:
            name = (self._stated.get("speculators_config") or {}).get("verifier", {}).get("name_or_path")
            told = {"name_or_path": name, "num_hidden_layers": depth}
            return {key: value for key, value in told.items() if value is not None}
        identity = target_identity(self._target)
        if depth not in (None, identity["num_hidden_layers"]):
            raise ValueError(
                f"The head was made for a target of {depth} layers, but this target has "
                f"{identity['num_hidden_layers']}. Load the head that was made for this target."
            )
        return identity

    def _correction(self) -> dict[str, Any]:
        """What the tensors have beside the body, and what the config must say of it."""
        tensors, fields = self._tensors, dict[str, Any]()
        if "markov_head.markov_w1.weight" in tensors:
            parts = {"gate_proj": "gated", "joint_proj": "rnn"}
            found = [kind for part, kind in parts.items() if f"markov_head.{part}.weight" in tensors]
            kind = next(iter(found), "vanilla")
            if self._stated.get("markov_head_type", kind) != kind:
                raise ValueError(
                    f"{self._source} states `markov_head_type` {self._stated['markov_head_type']!r}, but its tensors "
                    f"are those of {kind!r}. Use a head with a known one: vanilla, gated or rnn."
                )
            fields = {"correction": kind, "correction_rank": tensors["markov_head.markov_w1.weight"].shape[1]}
        elif "candidate_selector.hidden_projection.weight" in tensors:
            rank = len(tensors["candidate_selector.hidden_projection.weight"])
            fields = {"correction": "selector", "correction_rank": rank}
            fields["selector_top_k"] = self._needed("selector_top_k")
        if "confidence_head.proj.weight" in tensors:
            width = tensors["confidence_head.proj.weight"].shape[1] - len(tensors["norm.weight"])
            fields |= {"confidence": True, "confidence_with_markov": width > 0}
        kernel = tensors.get("layers.0.attention_conv.base_kernel")
        if kernel is not None:
            groups = len(tensors["layers.0.attention_conv.kernel_projection.weight"]) // (2 * kernel.shape[1])
            fields |= {"conv_kernel_size": kernel.shape[1], "conv_group_size": kernel.shape[2] // max(groups, 1)}
        return fields

    def _without_borrowed(self, fields: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Leave out the tensors that the head borrows from its target, and say in `fields` what it keeps."""
        kept = {name: part for name, part in self._tensors.items() if name not in ("t2d", "d2t")}
        output, table = kept.get("lm_head.weight"), kept.get("embed_tokens.weight")
        rows = fields["vocab_size"] if output is None else len(output)
        offsets = draft_offsets(self._tensors, rows, fields["vocab_size"], self._source)
        if offsets is not None:
            kept["d2t"] = offsets
            fields |= {"draft_vocab_size": len(offsets)}
        owns = {"owns_output_head": output is not None, "owns_embedding": table is not None}
        if self._target is not None:
            if output is not None and offsets is None and is_targets(output, self._target.get_output_embeddings()):
                owns["owns_output_head"] = False
            if table is not None and is_targets(table, self._target.get_input_embeddings()):
                owns["owns_embedding"] = False
        if not owns["owns_output_head"]:
            kept.pop("lm_head.weight", None)
        if not owns["owns_embedding"]:
            kept.pop("embed_tokens.weight", None)
        return fields | owns, kept


def _layout_of(config: dict[str, Any], names: Mapping[str, Any]) -> Layout:
    """Who wrote a file, by the names of its tensors where they tell."""
    if "encoder.fc.weight" in names:
        return Layout.MUSE
    if {"speculators_model_type", "transformer_layer_config"} & set(config):
        return Layout.SPECULATORS
    is_spark = any(kind.endswith("DSparkModel") for kind in config.get("architectures") or ())
    holds_copies = {"embed_tokens.weight", "lm_head.weight"} & set(names)
    is_flat = "target_layer_ids" in config and "dflash_config" not in config
    is_deepspec = (
        is_spark or (is_flat and bool(holds_copies)) or any(name.startswith("markov_head.") for name in names)
    )
    return Layout.DEEPSPEC if is_deepspec else Layout.ZLAB


def default_layer_ids(depth: int, count: int) -> list[int]:
    """The layers of a target of this depth that z-lab's head of `count` layers reads where its config says nothing.

    Source: z-lab/dflash, `build_target_layer_ids`.
    """
    if count == 1:
        return [depth // 2]
    return [round(1 + index * (depth - 4) / (count - 1)) for index in range(count)]
