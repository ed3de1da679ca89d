"""Write heads in the layouts of SpecForge, speculators and z-lab, which other engines read."""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ...drafting.kinds import BLOCK, EAGLE
from ..config import ROPE_BASE, BlockHeadConfig, DraftHeadConfig, HeadConfig


logger = logging.getLogger(f"transformers.{__name__}")
_PROJECTIONS = tuple(f"self_attn.{name}_proj.weight" for name in "qkvo")
_NESTED = 'Use `format="speculators"`'
_LAYER_FIELDS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "hidden_act", "rms_norm_eps", "max_position_embeddings", "initializer_range", "mlp_bias"),
    *("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id"),
)


def export_head(config: DraftHeadConfig, tensors: dict[str, Tensor], folder: Path, layout: str) -> None:
    """Write `config.json` and `model.safetensors` of a head in the layout "specforge" or "speculators".

    SpecForge's config is flat, its tensors' prefix is `midlayer.`, and its feature ids count layers. In speculators
    the config is nested, the prefix is `layers.0.`, and feature ids count the boundaries before layers. Raises
    `ValueError` if the layout is unknown, or cannot express this head.
    """
    if layout not in EAGLE.exports:
        known = ["resps", *EAGLE.exports]
        raise ValueError(
            f"`format` is {layout!r}, but must be one of {known}, which are layouts of files. "
            'Write "specforge" for SGLang and llama.cpp, "speculators" for vLLM.'
        )
    _check_expressible(config, layout)
    published = _on_disk(tensors, config.vocab_size)
    if _has_attention_biases(config):
        weights = {name: weight for name, weight in published.items() if name.endswith(_PROJECTIONS)}
        for name, weight in weights.items():
            published.setdefault(name.replace("weight", "bias"), weight.new_zeros(len(weight)))
    if layout == "specforge":
        renamed = {name.replace("layers.0.", "midlayer.", 1): tensor for name, tensor in published.items()}
        _write(_specforge_config(config), renamed, folder)
    else:
        _write(_speculators_config(config), published, folder)


def _on_disk(state: dict[str, Tensor], vocab_size: int) -> dict[str, Tensor]:
    """Copy tensors to the CPU; if the head has a draft vocabulary (`d2t`), also add its mask `t2d` `[v]`."""
    tensors = {name: part.detach().cpu().contiguous() for name, part in state.items()}
    if "d2t" in tensors:
        allowed = tensors["t2d"] = torch.zeros(vocab_size, dtype=torch.bool)
        allowed[torch.arange(len(tensors["d2t"])) + tensors["d2t"]] = True
    return tensors


def _write(config: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> None:
    config["dtype"] = config["torch_dtype"] = str(tensors["fc.weight"].dtype).removeprefix("torch.")
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def export_block_head(config: BlockHeadConfig, state: dict[str, Tensor], folder: Path, layout: str) -> None:
    """Write a block head in the layout "z-lab" or "speculators"; raise `ValueError` if it cannot express the head."""
    _check_block(config, layout)
    tensors = _on_disk(state, config.vocab_size)
    if layout == "z-lab":
        _write(_zlab_config(config), tensors, folder)
        return
    bare = {name.replace("_codebook.weight", "_codebook"): part for name, part in tensors.items()}
    _write(_speculators_block_config(config), bare, folder)


def _is_sliding(config: BlockHeadConfig) -> list[bool]:
    """Return for each layer whether its attention has a window; such layers are causal by default in both layouts."""
    return [window is not None for window in config.windows or ()]


def _check_block(config: BlockHeadConfig, layout: str) -> None:
    """Raise a `ValueError` if the layout cannot express this block head: engines would load the head wrongly."""
    assert config.windows is not None and config.feature_layers is not None and config.causal is not None
    is_zlab, is_known = layout == "z-lab", layout in BLOCK.exports
    has_markov = config.correction not in ("none", "selector")
    is_scaled = (config.embedding_scale, config.output_multiplier, config.final_logit_softcapping) != (1.0, 1.0, None)
    is_alike, by_layer = len(set(config.causal)) == 1, config.causal == _is_sliding(config)
    for cannot, reason in (
        (not is_known, f"got format={layout!r}; known are {', '.join(BLOCK.exports)}"),
        (len({*config.windows} - {None}) > 1, "has several windows, but the layout has one for all sliding layers"),
        (is_zlab and (config.shifted or has_markov), "is shifted or has a Markov correction: use speculators"),
        (is_zlab and config.owns_output_head, "has an output head of its own: use speculators"),
        (is_zlab and 0 in config.feature_layers, "reads the embedding output: use speculators"),
        (is_zlab and not (is_alike or by_layer), "is causal in layers that the layout cannot name"),
        (not is_zlab and any(config.causal) and not by_layer, "is causal in full layers: use z-lab"),
        (not is_zlab and is_scaled, "has scales or a cap, which speculators drops: use z-lab"),
        (
            not is_zlab and config.owns_output_head and config.draft_vocab_size is None,
            "has an output head for all tokens, which speculators takes from the target",
        ),
    ):
        if cannot:
            raise ValueError(f"This block head {reason}. Save it in our own format, or export another head.")


def _block_layer(config: BlockHeadConfig) -> dict[str, Any]:
    """Convert the fields that describe the layers to fields of a Qwen3 config."""
    is_sliding, rope = _is_sliding(config), config.rope_parameters or {}
    return {
        **{field: getattr(config, field) for field in _LAYER_FIELDS if field in BlockHeadConfig.field_types()},
        "model_type": "qwen3",
        "attention_bias": config.attention_bias,
        "layer_types": ["sliding_attention" if sliding else "full_attention" for sliding in is_sliding],
        "sliding_window": max(filter(None, config.windows or ()), default=None),
        "use_sliding_window": any(is_sliding),
        "rope_parameters": rope,
        "rope_theta": rope.get("rope_theta", ROPE_BASE),
    }


def _block_fields(config: BlockHeadConfig) -> dict[str, Any]:
    fields = {"block_size": config.block_size, "mask_token_id": config.mask_token_id}
    if config.correction != "selector":
        return fields
    sizes = {name: getattr(config, name) for name in ("conv_kernel_size", "conv_group_size", "selector_top_k")}
    return fields | sizes | {"selector_rank": config.correction_rank}


def _zlab_config(config: BlockHeadConfig) -> dict[str, Any]:
    assert config.feature_layers is not None and config.causal is not None
    depth = (config.target or {}).get("num_hidden_layers")
    return {
        **_block_layer(config),
        **({} if config.causal == _is_sliding(config) else {"is_causal": config.causal[0]}),
        **({} if depth is None else {"num_target_layers": depth}),
        "architectures": ["DFlash2DraftModel" if config.correction == "selector" else "DFlashDraftModel"],
        "dflash_config": {
            **_block_fields(config),
            "target_layer_ids": [index - 1 for index in config.feature_layers],
            "input_embedding_scale": config.embedding_scale,
            "output_multiplier": config.output_multiplier,
            "final_logit_softcapping": config.final_logit_softcapping,
        },
    }


def _speculators_block_config(config: BlockHeadConfig) -> dict[str, Any]:
    kinds = {"none": ("dflash", "DFlash"), "selector": ("dflash2", "DFlash2")}
    kind, name = kinds.get(config.correction, ("dspark", "DSpark"))
    spark = {
        "markov_rank": config.correction_rank,
        "markov_head_type": config.correction,
        "enable_confidence_head": config.confidence,
        "confidence_head_with_markov": config.confidence_with_markov,
    }
    return {
        **_block_fields(config),
        **(spark if kind == "dspark" else {}),
        "aux_hidden_state_layer_ids": config.feature_layers,
        "draft_vocab_size": config.proposable_tokens,
        "sample_from_anchor": config.shifted,
        "sliding_window_non_causal": not any(config.causal or ()),
        **_speculators_fields(config, kind, f"{name}DraftModel", "0.9.0", config.levels, _block_layer(config)),
    }


def _check_expressible(config: DraftHeadConfig, layout: str) -> None:
    """Raise a `ValueError` if vLLM 0.32.0 or SGLang 0.5.23 would silently load the head wrongly (by their code)."""
    is_flat, outer_biases = layout == "specforge", config.attention_output_bias or config.mlp_bias
    reads_embedding = 0 in (config.feature_layers or ())
    for cannot, reason, way_out in (
        (
            config.mask_token_id is not None,
            "is a P-EAGLE head, which is read but not written in other layouts",
            "Copy the files that it was read from",
        ),
        (
            config.before_deepstack,
            "reads features before DeepStack adds to them, but other engines read them after it",
            "Train one with `before_deepstack=False`",
        ),
        (config.fc_bias, "has a bias in `fc`, which other engines drop", "Train one with `fc_bias=False`"),
        (
            config.qk_norm and outer_biases,
            "norms queries and keys and has biases after them, which vLLM drops",
            "Train one with `attention_output_bias=False` and `mlp_bias=False`",
        ),
        (is_flat and config.qk_norm, "norms queries and keys, which SpecForge cannot express", _NESTED),
        (is_flat and reads_embedding, "reads the embedding output, which SpecForge cannot express", _NESTED),
    ):
        if cannot:
            raise ValueError(f"This head {reason}. {way_out}.")


def _has_attention_biases(config: DraftHeadConfig) -> bool:
    """Return whether to write biases for all attention projections, even zeros: engines have one flag for all."""
    return config.attention_bias or config.attention_output_bias


def _layer_config(config: DraftHeadConfig) -> dict[str, Any]:
    """Describe the head's layer as a Llama or Qwen3 config, with RoPE in the forms of Transformers 4 and 5."""
    rope = dict(config.rope_parameters or {})
    theta = rope.get("rope_theta", ROPE_BASE)
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    window = {"sliding_window": config.sliding_window, "layer_types": ["sliding_attention"] * config.num_hidden_layers}
    return {
        **(window if config.sliding_window else {}),
        "model_type": "qwen3" if config.qk_norm else "llama",
        **{field: getattr(config, field) for field in _LAYER_FIELDS},
        "attention_bias": _has_attention_biases(config),
        "num_aux_hidden_states": len(config.feature_layers or ()),  # by default vLLM expects three
        "tie_word_embeddings": False,
        "rope_theta": theta,
        "rope_scaling": None if rope.get("rope_type", "default") == "default" else scaling,
        "rope_parameters": {"rope_type": "default", **rope, "rope_theta": theta},
    }


def _shared_fields(config: DraftHeadConfig) -> dict[str, Any]:
    """Return the config fields that both layouts have. `feature_layers` and `feedback_post_norm` are this package's
    names, written too, because the publishers' names do not mean the same everywhere.
    """
    own = ("feature_layers", "feedback_post_norm", "owns_embedding", "target_hidden_size")
    norms = ("norm_before_residual", "norm_before_fc", "fc_norm")
    computed = {"norm_output": config.feedback_post_norm, "draft_vocab_size": config.proposable_tokens}
    return {field: getattr(config, field) for field in own + norms} | computed


def _specforge_config(config: DraftHeadConfig) -> dict[str, Any]:
    assert config.feature_layers is not None
    flags = ("norm_before_residual", "attention_bias", "mlp_bias", "sliding_window")
    ignored = [flag for flag in flags if getattr(config, flag)]
    if ignored:
        logger.warning("SGLang 0.5.23 ignores %s, which this head has, and would draft badly. vLLM reads it.", ignored)
    return {
        **_layer_config(config),
        **_shared_fields(config),
        # If this is null, SGLang uses the target's output head. A number would make it use uninitialized weights.
        "draft_vocab_size": config.proposable_tokens if config.owns_output_head else None,
        "architectures": ["LlamaForCausalLMEagle3"],
        # vLLM reads this field: ids of boundaries. SGLang reads the one in `eagle_config`: ids of layers.
        "eagle_aux_hidden_state_layer_ids": config.feature_layers,
        "eagle_config": {
            "eagle_aux_hidden_state_layer_ids": [layer - 1 for layer in config.feature_layers],
            "use_aux_hidden_state": True,
        },
    }


def _speculators_config(config: DraftHeadConfig) -> dict[str, Any]:
    levels = max((config.default_tree or [0, 3])[1], 1)
    return {
        **_shared_fields(config),
        "eagle_aux_hidden_state_layer_ids": config.feature_layers,
        "embed_requires_grad": config.owns_embedding,
        **_speculators_fields(config, "eagle3", "Eagle3Speculator", "0.3.0", levels, _layer_config(config)),
    }


def _speculators_fields(
    config: HeadConfig, algorithm: str, architecture: str, version: str, tokens: int, layer: dict[str, Any]
) -> dict[str, Any]:
    """Make the fields that every config of speculators has, such as the target's name and the drafting method."""
    method = {"proposal_type": "greedy", "speculative_tokens": tokens, "verifier_accept_k": 1, "accept_tolerance": 0.0}
    target = config.target or {}
    return {
        "architectures": [architecture],
        "speculators_model_type": algorithm,
        "speculators_version": version,
        "tie_word_embeddings": False,
        "transformer_layer_config": layer,
        "speculators_config": {
            "algorithm": algorithm,
            "default_proposal_method": "greedy",
            "proposal_methods": [method],
            "verifier": {"name_or_path": target.get("name_or_path"), "architectures": target.get("architectures", [])},
        },
    }
