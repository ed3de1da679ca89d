"""Which layers of hybrid targets keep a recurrent state, and which of them can read the paths of a tree.

By class and module: a mixer that is not listed may ignore the state that it is given, as some of stock's do when
several tokens come at once.
"""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..compat import HAS_RECURRENT_STATES


# Class -> its folder in `transformers.models`. They read several tokens from a given state as one after the other.
_MIXERS = {
    "Qwen3NextGatedDeltaNet": "qwen3_next",
    "Qwen3_5GatedDeltaNet": "qwen3_5",
    "Qwen3_5MoeGatedDeltaNet": "qwen3_5_moe",
    "OlmoHybridGatedDeltaNet": "olmo_hybrid",
    "LaraMiniGatedDeltaNet": "lara_mini",
    "KimiLinearDeltaAttention": "kimi_linear",
    "BailingHybridDeltaAttention": "bailing_hybrid",
    "BambaMixer": "bamba",
    "GraniteMoeHybridMambaLayer": "granitemoehybrid",
    "FalconH1Mixer": "falcon_h1",
    "NemotronHMamba2Mixer": "nemotron_h",
    "Zamba2MambaMixer": "zamba2",
    "Lfm2ShortConv": "lfm2",
    "Lfm2MoeShortConv": "lfm2_moe",
    "Lfm3ShortConv": "lfm3",
}

_MAMBA_1 = "has Mamba-1 layers, whose scan of several tokens starts without the state before them"
# model_type -> what it cannot do.
_REFUSED = {
    "mamba": _MAMBA_1,
    "falcon_mamba": _MAMBA_1,
    "jamba": _MAMBA_1,
    "zamba": _MAMBA_1,
    "mamba2": "consists of recurrent layers only, which would run twice for every tree",
    "recurrent_gemma": "keeps its states in the layers, not in a cache, and starts them anew with several tokens",
    "minimax": "takes the length of its cache from a layer that has none, so several tokens get a wrong mask",
    "rwkv": "keeps its states outside a cache of Transformers",
    "xlstm": "keeps its states in a cache of its own",
}

# Kinds of layers, as `config.layer_types` names them, whose state is no list of keys and values.
RECURRENT_KINDS = frozenset(("linear_attention", "conv", "mamba"))
_MIXED_KINDS = frozenset(("hybrid", "hybrid_sliding"))


def layer_kinds(model: PreTrainedModel) -> set[str]:
    """The kinds of the target's layers; empty where its config does not tell them."""
    return set(getattr(model.config.get_text_config(), "layer_types", None) or ())


def is_recurrent(model: PreTrainedModel) -> bool:
    """Whether the target has layers with a state that cannot be taken back."""
    return bool(getattr(model, "_is_stateful", False) or layer_kinds(model) & (RECURRENT_KINDS | _MIXED_KINDS))


def known_mixers(model: nn.Module) -> dict[int, Any]:
    """The mixers that can read paths, by the index of their cache layer."""
    found: list[Any] = [module for module in model.modules() if _is_known(module)]
    return {mixer.layer_idx: mixer for mixer in found}


def recurrence_obstacle(model: PreTrainedModel) -> str | None:
    """Say why a recurrent target cannot verify trees; `None` if it can, or is not recurrent."""
    config = model.config.get_text_config()
    if config.model_type in _REFUSED:
        return _REFUSED[config.model_type]
    if not is_recurrent(model):
        return None
    if not HAS_RECURRENT_STATES:
        return "has recurrent layers, which need Transformers 5.24 or newer"
    if "hybrid_sliding" in layer_kinds(model):
        return "has layers with a recurrent state and a sliding window in one"
    kinds = getattr(config, "layer_types", None) or ()
    known = known_mixers(model)
    recurrent = [index for index, kind in enumerate(kinds) if kind in RECURRENT_KINDS | _MIXED_KINDS]
    if not recurrent or any(index not in known for index in recurrent):
        return "has recurrent layers of a class that is not known to read several tokens as one after the other"
    if len(recurrent) == len(kinds) and not set(kinds) & _MIXED_KINDS:
        return _REFUSED["mamba2"]
    return None


def _is_known(module: nn.Module) -> bool:
    kind = type(module)
    folder = _MIXERS.get(kind.__name__)
    return folder is not None and kind.__module__ == f"transformers.models.{folder}.modeling_{folder}"
