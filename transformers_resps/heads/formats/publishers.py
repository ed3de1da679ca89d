"""Interpret the config of each publisher of EAGLE-3 heads: layer ids, RoPE, norms.

The conventions are taken from the code of SafeAILab/EAGLE, sgl-project/SpecForge, Tencent/AngelSlim,
NVIDIA/Model-Optimizer, vllm-project/speculators and deepseek-ai/DeepSpec.
"""

import logging
from collections.abc import Container
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..config import ROPE_BASE, default_feature_layers


logger = logging.getLogger(f"transformers.{__name__}")


class Publisher(StrEnum):
    """The project whose conventions a head's files follow; the last two projects publish block heads only."""

    EAGLE = "eagle"
    SPECFORGE = "specforge"
    ANGELSLIM = "angelslim"
    MODELOPT = "modelopt"
    SPECULATORS = "speculators"
    DEEPSPEC = "deepspec"
    ZLAB = "z-lab"
    MUSE = "muse"


# ModelOpt's flags for optional norms of a layer -> the value that an EAGLE-3 layer needs.
MODELOPT_LAYER = {"use_input_layernorm_in_first_layer": True, "use_last_layernorm": True, "use_mtp_layernorm": False}

_ID_FIELDS = ("eagle_aux_hidden_state_layer_ids", "aux_hidden_state_layer_ids", "target_layer_ids")
# In these publishers' files, layer id j means the input of layer j, as in `hidden_states`; in others, its output.
_BOUNDARY = {Publisher.EAGLE, Publisher.SPECULATORS}
_TRY_DOCTOR = "Try `resps doctor` if few tokens are accepted."


def publisher_of(config: dict[str, Any], names: Container[str]) -> Publisher:
    """Recognise the publisher of an EAGLE-3 head by its config, and by this package's names of its tensors."""
    architectures = config.get("architectures") or []
    if {"speculators_model_type", "transformer_layer_config"} & set(config):
        return Publisher.SPECULATORS
    is_full = "d2t" not in names and "layers.0.self_attn.q_norm.weight" in names
    if is_full and "target_layer_ids" in config:
        return Publisher.DEEPSPEC
    if "Eagle3LlamaForCausalLM" in architectures or "modal_type" in config:
        return Publisher.ANGELSLIM
    eagle = config.get("eagle_config")
    if MODELOPT_LAYER.keys() & (eagle or {}):
        return Publisher.MODELOPT
    if eagle is not None or "LlamaForCausalLMEagle3" in architectures:
        return Publisher.SPECFORGE
    return Publisher.EAGLE


@dataclass(slots=True)
class PublishedConfig:
    """A published head and its `config.json`, with the user's corrections."""

    source: str  # Hub id or folder, for messages
    stated: dict[str, Any]  # all fields of the config without nulls; nested fields (`transformer_layer_config`) too
    corrections: dict[str, Any]  # fields that the user passed; they are also in `stated`
    publisher: Publisher  # decides what the fields mean
    tensors: dict[str, Tensor]  # by this package's names
    target: PreTrainedModel | None

    @property
    def layer_ids(self) -> list[int] | None:
        """The published layer ids, sorted, since `fc` reads features in ascending order; ModelOpt does not sort."""
        return sorted(self.stated[self._id_field]) if self._id_field else None

    @property
    def _id_field(self) -> str:
        return next((field for field in _ID_FIELDS if self.stated.get(field)), "")

    def feature_layers(self, count: int, layer_count: int | None) -> list[int]:
        """Return the feature layers as ascending indices of `output_hidden_states`. Raises a `ValueError` if there
        are not `count` of them, as many as `fc` reads, or if the ids are ambiguous.
        """
        given, ids = self.stated.get("feature_layers"), self.layer_ids
        if given is not None:
            layers = sorted(given)
        elif ids is not None:
            layers = self._counted_as_hidden_states(ids, layer_count)
        elif layer_count is not None:
            layers = default_feature_layers(layer_count)
        else:
            raise ValueError(
                f"{self.source} does not say which layers of its target it reads; the default depends on the target's "
                "depth. Pass `target=`, or `feature_layers=[...]`, counted as in `output_hidden_states`."
            )
        if len(layers) != count:
            raise ValueError(
                f"{self.source} has an fc that reads {count} layers of this target, but its layers are {layers}. "
                "Load a head made for this target (this one may need another hidden size), or pass "
                f"`feature_layers=[...]` with {count} distinct ids, counted as in `output_hidden_states`."
            )
        return layers

    def _counted_as_hidden_states(self, ids: list[int], layer_count: int | None) -> list[int]:
        """Convert published ids to indices of `hidden_states`.

        An id means a layer or the boundary before a layer. Converters copy ids from one format to another, so the
        format alone does not decide. The smallest id does (sgl-project/sglang #25454): EAGLE-3's lowest features are
        the output of layer 1, which is boundary 2. With any other smallest id, the format decides.
        """
        are_layers = [layer + 1 for layer in ids]
        if self._id_field == "target_layer_ids":  # DeepSpec always counts layers
            return are_layers
        if self.publisher not in _BOUNDARY:
            # NVIDIA's gpt-oss v3 head states the ids 24, 30 and 36 for 36 layers (sglang #32226).
            beyond = layer_count is not None and ids[-1] == layer_count and ids[0] != 1
            if not (ids[0] == 2 or beyond):
                return are_layers
            logger.warning(
                "%s: the layer ids %s are read as boundaries, not as layers. %s", self.source, ids, _TRY_DOCTOR
            )
            return ids
        if ids[0] != 1:
            return ids
        if layer_count is None:
            raise ValueError(
                f"The layer ids {ids} of {self.source} may count layers or the boundaries before them. "
                "Pass `target=`, or `feature_layers=[...]`, counted as in `output_hidden_states`."
            )
        if ids[-1] >= layer_count:  # ids of layers end at `layer_count - 1`
            return ids
        logger.warning("%s: the layer ids %s are read as outputs of those layers. %s", self.source, ids, _TRY_DOCTOR)
        return are_layers

    def rope_parameters(self) -> dict[str, Any]:
        """Return RoPE in the form of Transformers 5, from `rope_parameters` or `rope_theta` and `rope_scaling`.

        AngelSlim's plain RoPE and SpecForge's M-RoPE are always trained with base 10000, so the config's base is
        ignored unless the user corrects it. M-RoPE is read as plain RoPE: for text they are the same, but after an
        image M-RoPE's positions are lower. Raises a `ValueError` if the config has two different bases.
        """
        rope = dict(self.stated.get("rope_parameters") or self.stated.get("rope_scaling") or {})
        rope = dict(rope.get("full_attention") or rope)  # per layer type, as Transformers 5 writes it
        legacy_kind = rope.pop("type", None)
        kind = rope.get("rope_type") or legacy_kind or "default"
        is_angelslim = self.publisher is Publisher.ANGELSLIM
        has_planes = kind == "mrope" or (is_angelslim and bool(rope.get("mrope_interleaved")))
        ignores_base = is_angelslim != has_planes and self.publisher in (Publisher.ANGELSLIM, Publisher.SPECFORGE)
        if has_planes:
            logger.warning(
                f"{self.source} was trained with M-RoPE; here its positions count tokens. That is the same for text, "
                "but fewer drafts may be accepted after an image."
            )
        rope = {key: value for key, value in rope.items() if not key.startswith("mrope")}
        kind = "default" if kind == "mrope" else kind
        inner, outer = rope.get("rope_theta"), self.stated.get("rope_theta")
        if inner is not None and outer is not None and inner != outer and "rope_theta" not in self.corrections:
            raise ValueError(
                f"The config states two RoPE bases, {inner} and {outer}. Pass the one used in training as "
                "`rope_theta=`; `resps doctor` tells which that is."
            )
        theta = self.corrections.get("rope_theta") or inner or outer or ROPE_BASE
        if ignores_base and not {"rope_theta", "rope_parameters"} & set(self.corrections):
            if theta != ROPE_BASE:
                logger.warning(
                    f"{self.source}: such heads are trained with RoPE base 10000; the config's {theta} is ignored. "
                    f"{_TRY_DOCTOR}"
                )
            theta = ROPE_BASE
        return {**rope, "rope_type": kind, "rope_theta": float(theta)}

    def norm_flags(self) -> dict[str, bool]:
        """Return `norm_before_residual` and `feedback_post_norm`. A flag that config.json lacks is false, except
        `norm_before_residual` of speculators' EAGLE-3 heads.

        In files of speculators `norm_output` means `feedback_post_norm`. SpecForge's is another norm, and is ignored.
        """
        is_speculators, is_parallel = self.publisher is Publisher.SPECULATORS, "mask_hidden" in self.tensors
        before = self.stated.get("norm_before_residual")
        if before is None and is_speculators and not is_parallel:
            logger.warning("%s: true is used for the missing `norm_before_residual`. %s", self.source, _TRY_DOCTOR)
            before = True
        after = self.stated.get("feedback_post_norm")
        if after is None:
            after = is_speculators and self.stated.get("norm_output") is True
        return {"norm_before_residual": bool(before), "feedback_post_norm": bool(after)}
