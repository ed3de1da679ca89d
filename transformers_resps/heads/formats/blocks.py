"""Convert a published block head to this package's config and tensors.

The conventions are taken from the code of z-lab/dflash, deepseek-ai/DeepSpec, vllm-project/speculators,
hao-ai-lab/JetSpec and Transformers. Publishers use the same tensors, but differ in three ways: which token a slot
predicts, which positions a slot sees, and whether layer ids number layers or hidden states.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ...drafting.kinds import bare_names
from ..config import BlockHeadConfig, default_layer_ids
from .publishers import Publisher
from .reading import Checkpoint, PublishedHead


_SPELLINGS = {
    "encoder.fc.weight": "fc.weight",
    "encoder.output_norm_enc.weight": "hidden_norm.weight",
    "candidate_selector.predecessor_codebook": "candidate_selector.predecessor_codebook.weight",
    "candidate_selector.successor_codebook": "candidate_selector.successor_codebook.weight",
}
_QUERY = "layers.0.self_attn.q_proj"
_EVERY = ("fc.weight", "hidden_norm.weight", "norm.weight", f"{_QUERY}.weight", "layers.0.self_attn.q_norm.weight")
_MUSE_BASE = 5e5  # RoPE base of Muse-Glimmer heads whose config states none.
# Substrings of tensor names in unsupported heads -> end of the error message.
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
# Config fields that name a kind of head -> the supported kinds.
_KINDS = {
    "speculators_model_type": (None, "dflash", "dflash2", "dspark"),
    "projector_type": (None, "dflash", "dflash2", "dspark"),
    "markov_head_type": (None, "vanilla", "gated", "rnn"),
}


def read_block(
    checkpoint: Checkpoint, target: PreTrainedModel | None, overrides: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a block head's fields for our config, and its tensors by our names; for the arguments see `Reader`."""
    names, config = bare_names(checkpoint.tensors), checkpoint.config
    publisher = _publisher_of(config, names)
    nested = config.get("transformer_layer_config") or {}, config, config.get("dflash_config") or {}, overrides
    fields = {key: value for part in nested for key, value in part.items() if value is not None}
    rope = fields.get("rope_parameters") or {}
    fields |= {"rope_parameters": rope["sliding_attention"]} if "sliding_attention" in rope else {}
    if publisher is Publisher.MUSE and not rope:
        fields = {"rope_theta": _MUSE_BASE, **fields}
    tensors = {_SPELLINGS.get(name, name): part for name, part in names.items()}
    return _PublishedBlock(checkpoint.name, fields, overrides, publisher, tensors, target).read()


class _PublishedBlock(PublishedHead):
    def read(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the fields for `BlockHeadConfig`, and the tensors by this package's names."""
        self._refuse_others()
        sizes, identity = self.sizes(), self.identity()
        if sizes["hidden_size"] != sizes["target_hidden_size"]:
            raise ValueError(
                f"{self.source} is {sizes['hidden_size']} wide and reads features of {sizes['target_hidden_size']}, "
                "but a block head is as wide as its target. Use another head."
            )
        windows = self._windows(sizes["num_hidden_layers"])
        fields = {
            **self.copied_fields(),
            **sizes,
            **self._correction(),
            "attention_bias": f"{_QUERY}.bias" in self.tensors,
            "block_size": self._needed("block_size"),
            "mask_token_id": self._needed("mask_token_id"),
            "shifted": self._is_shifted,
            "causal": self._causal(windows),
            "windows": [window or None for window in windows],
            "feature_layers": self._feature_layers(sizes, identity.get("num_hidden_layers")),
            "embedding_scale": float(self.stated.get("input_embedding_scale", 1.0)),
            "output_multiplier": float(self.stated.get("output_multiplier", 1.0)),
            "final_logit_softcapping": self.stated.get("final_logit_softcapping") or None,
            "rope_parameters": self.rope_parameters(),
            "target": identity,
            "source": {"format": str(self.publisher), "layer_ids": self.layer_ids},
        }
        fields, tensors = self.without_borrowed(fields)
        return {key: fields[key] for key in fields if key in BlockHeadConfig.field_types()}, tensors

    def _refuse_others(self) -> None:
        stated, names = self.stated, self.tensors
        reasons = [reason for part, reason in _OTHER_PARTS.items() if any(part in name.lower() for name in names)]
        reasons += ["is a LiLiCorr head" for key in stated if "lilicorr" in key.lower()]
        reasons += [
            f"is quantised (`{key}`)" for key in ("quantization_config", "compression_config") if key in stated
        ]
        reasons += [
            f"is of an unknown kind (`{key}` {stated[key]!r})"
            for key, known in _KINDS.items()
            if stated.get(key) not in known
        ]
        if reasons:
            raise ValueError(
                f"{self.source} {reasons[0]}, which no block head of this package has. Use a plain DFlash, DSpark, "
                "JetSpec or DFlash 2 head of the same target."
            )
        missing = [name for name in _EVERY if name not in names]
        if missing:
            raise ValueError(f"{self.source} lacks {missing}, which every block head has. Download it again.")

    def _needed(self, field: str) -> Any:
        if field not in self.stated:
            raise ValueError(f"{self.source} states no `{field}`. Pass `{field}=` as it was trained with.")
        return self.stated[field]

    @property
    def _is_shifted(self) -> bool:
        """Whether each position of a block predicts the token after it; see `BlockHeadConfig.shifted`."""
        if self.publisher is Publisher.SPECULATORS:
            default = self.stated.get("speculators_model_type") == "dspark"
            return bool(self.stated.get("sample_from_anchor", default))
        return self.publisher is Publisher.DEEPSPEC or bool(self.stated.get("shift_label"))

    def _windows(self, count: int) -> list[int | None]:
        """Return the window of each of `count` layers: `None` for full attention, 0 if config.json gives no size."""
        window = self.stated.get("sliding_window") if self.stated.get("use_sliding_window", True) else 0
        kinds = self.stated.get("layer_types") or ["full_attention"] * count
        if len(kinds) != count or set(kinds) - {"full_attention", "sliding_attention"}:
            raise ValueError(
                f"{self.source} has {count} layers and `layer_types` {kinds}, but each needs one, full or sliding. "
                "Correct config.json."
            )
        # In Transformers' Muse the window does not count the slot itself.
        more = 1 if self.publisher is Publisher.MUSE and window else 0
        return [(window or 0) + more if kind == "sliding_attention" else None for kind in kinds]

    def _causal(self, windows: list[int | None]) -> list[bool]:
        """Return for each layer whether it is causal: then positions of a block do not attend to later positions."""
        stated, is_sliding = self.stated, [window is not None for window in windows]
        if self.publisher in (Publisher.DEEPSPEC, Publisher.MUSE):
            return [False] * len(windows)
        if self.publisher is Publisher.SPECULATORS:
            default = stated.get("speculators_model_type") == "dflash2"
            return [False] * len(windows) if stated.get("sliding_window_non_causal", default) else is_sliding
        flags = [stated[key] for key in ("causal_head", "is_causal", "causal") if isinstance(stated.get(key), bool)]
        return [flags[0]] * len(windows) if flags else is_sliding

    def _feature_layers(self, sizes: dict[str, int], depth: int | None) -> list[int]:
        """Return the feature layers as indices of `output_hidden_states`.

        Published ids are one lower, except in files of the library speculators. Without ids, z-lab's defaults for a
        target of `depth` layers are returned. Raises a `ValueError` if their number does not fit the head's `fc`.
        """
        ids, count = self.layer_ids, self.feature_count(sizes["target_hidden_size"])
        layers: list[int] | None = self.stated.get("feature_layers")
        if layers is None and ids is not None:
            layers = [layer + (self.publisher is not Publisher.SPECULATORS) for layer in ids]
        elif layers is None and depth is not None:
            layers = [layer + 1 for layer in default_layer_ids(depth, sizes["num_hidden_layers"])]
        if layers is None or len(layers) != count:
            raise ValueError(
                f"{self.source} has an fc that reads {count} layers of its target, and its config names "
                f"{layers or 'none'}. Pass `feature_layers=[...]`, counted as in `output_hidden_states`."
            )
        return layers

    def _correction(self) -> dict[str, Any]:
        """Infer the config fields for correction, confidence head and convolutions from the head's tensors."""
        tensors, fields = self.tensors, dict[str, Any]()
        if "markov_head.markov_w1.weight" in tensors:
            parts = {"gate_proj": "gated", "joint_proj": "rnn"}
            found = [kind for part, kind in parts.items() if f"markov_head.{part}.weight" in tensors]
            rank = tensors["markov_head.markov_w1.weight"].shape[1]
            fields = {"correction": next(iter(found), "vanilla"), "correction_rank": rank}
        elif "candidate_selector.hidden_projection.weight" in tensors:
            rank = len(tensors["candidate_selector.hidden_projection.weight"])
            top_k = self._needed("selector_top_k")
            fields = {"correction": "selector", "correction_rank": rank, "selector_top_k": top_k}
        if "confidence_head.proj.weight" in tensors:
            width = tensors["confidence_head.proj.weight"].shape[1] - len(tensors["norm.weight"])
            fields |= {"confidence": True, "confidence_with_markov": width > 0}
        kernel = tensors.get("layers.0.attention_conv.base_kernel")
        if kernel is not None:
            groups = len(tensors["layers.0.attention_conv.kernel_projection.weight"]) // (2 * kernel.shape[1])
            fields |= {"conv_kernel_size": kernel.shape[1], "conv_group_size": kernel.shape[2] // max(groups, 1)}
        return fields


def _publisher_of(config: dict[str, Any], names: Mapping[str, Any]) -> Publisher:
    if "encoder.fc.weight" in names:
        return Publisher.MUSE
    if {"speculators_model_type", "transformer_layer_config"} & set(config):
        return Publisher.SPECULATORS
    is_spark = any(kind.endswith("DSparkModel") for kind in config.get("architectures") or ())
    is_flat = "target_layer_ids" in config and "dflash_config" not in config
    has_copies = is_flat and not {"embed_tokens.weight", "lm_head.weight"}.isdisjoint(names)
    has_markov = any(name.startswith("markov_head.") for name in names)
    return Publisher.DEEPSPEC if is_spark or has_copies or has_markov else Publisher.ZLAB
