"""Sizes of a published head: read from its tensors, compared with its config and its target."""

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from .tensor_names import layer_count


# What `LlamaConfig` and `Qwen3Config` leave out of a config.json that they write.
_USUAL_HEADS = 32


def read_sizes(
    config: dict[str, Any], tensors: dict[str, Tensor], target: PreTrainedModel | None, source: str
) -> dict[str, Any]:
    """The sizes and structural flags of `DraftHeadConfig`, as the tensors have them.

    Args:
        config: flat, with the user's corrections.
        tensors: under our names, with all that `check_complete` needs.
        target: checked against when given.
        source: where from, for messages.

    Raises:
        ValueError: the tensors contradict each other, the config, or the target.
    """
    sizes: dict[str, Any] = {
        "hidden_size": len(tensors["norm.weight"]),
        "intermediate_size": len(tensors["layers.0.mlp.gate_proj.weight"]),
        "num_hidden_layers": layer_count(tensors),
        **_attention_sizes(config, tensors, source),
        **_vocabulary_sizes(config, tensors, target, source),
    }
    _check_stated(config, sizes, source)
    width = sizes["hidden_size"] if target is None else target.config.get_text_config().hidden_size
    stated = config.get("target_hidden_size", width)
    if target is not None and stated != width:
        raise ValueError(
            f"{source} reads a target of hidden size {stated}, but the target has {width}. "
            "Load the head that was made for this target."
        )
    return {**sizes, "target_hidden_size": stated, **_structure_flags(config, tensors)}


def feature_count(tensors: dict[str, Tensor], target_hidden_size: int, source: str) -> int:
    """How many of the target's layers the head reads.

    Raises:
        ValueError: the width of `fc` is no multiple of the target's.
    """
    width = tensors["fc.weight"].shape[1]
    if width % target_hidden_size:
        raise ValueError(
            f"The fc of {source} reads {width} values, which is no multiple of the target's hidden size "
            f"{target_hidden_size}. Load the head that was made for this target."
        )
    return width // target_hidden_size


def _structure_flags(config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, bool]:
    """Which optional tensors the head has. One that the config states counts too, to be missed later."""
    first = "layers.0.self_attn."
    flags = {
        "fc_bias": "fc.bias" in tensors or config.get("bias") is True,
        "attention_bias": f"{first}q_proj.bias" in tensors,
        "attention_output_bias": f"{first}o_proj.bias" in tensors,
        "mlp_bias": "layers.0.mlp.gate_proj.bias" in tensors,
        "qk_norm": f"{first}q_norm.weight" in tensors,
        "norm_before_fc": "input_norm.weight" in tensors,
        "fc_norm": any(name.startswith("fc_norm.") for name in tensors),
    }
    return {flag: is_there or config.get(flag) is True for flag, is_there in flags.items()}


def _attention_sizes(config: dict[str, Any], tensors: dict[str, Tensor], source: str) -> dict[str, int]:
    query, key = (len(tensors[f"layers.0.self_attn.{name}_proj.weight"]) for name in "qk")
    norm = tensors.get("layers.0.self_attn.q_norm.weight")
    head_dim = config.get("head_dim") if norm is None else len(norm)
    heads = config.get("num_attention_heads") or (query // head_dim if head_dim else _USUAL_HEADS)
    if query % heads or query // heads % 2 or key % (query // heads):
        raise ValueError(
            f"{source} has {query} query and {key} key rows, which do not divide into {heads} attention heads of one "
            "even size. Pass the right `num_attention_heads=`."
        )
    head_dim = query // heads
    return {"num_attention_heads": heads, "head_dim": head_dim, "num_key_value_heads": key // head_dim}


def _vocabulary_sizes(
    config: dict[str, Any], tensors: dict[str, Tensor], target: PreTrainedModel | None, source: str
) -> dict[str, int]:
    """The target's vocabulary v from the tensors that have it, and the rows d of the output head."""
    theirs = None if target is None else target.config.get_text_config().vocab_size
    stored = next((len(tensors[name]) for name in ("t2d", "embed_tokens.weight") if name in tensors), None)
    vocab_size = stored or theirs or config.get("vocab_size")
    if vocab_size is None:
        raise ValueError(
            f"{source} states no `vocab_size`, and none of its tensors shows it. Pass `target=`, or `vocab_size=`."
        )
    if theirs is not None and theirs != vocab_size:
        raise ValueError(
            f"{source} was made for a vocabulary of {vocab_size} tokens, but the target has {theirs}. "
            "Load the head that was made for this target."
        )
    counted = ("lm_head.weight", "d2t", "hot_token_id")
    rows = next((len(tensors[name]) for name in counted if name in tensors), vocab_size)
    return {"vocab_size": vocab_size, "draft_vocab_size": rows}


def _check_stated(config: dict[str, Any], sizes: dict[str, Any], source: str) -> None:
    """Refuse a config whose sizes are not those of the tensors."""
    wrong = {key: size for key, size in sizes.items() if config.get(key, size) != size}
    if wrong:
        stated = ", ".join(f"{key} {config[key]} (the tensors: {size})" for key, size in wrong.items())
        corrections = ", ".join(f"{key}={size}" for key, size in wrong.items())
        raise ValueError(
            f"The config of {source} states {stated}. "
            f"Download the head again or, if the tensors are right, pass `{corrections}`."
        )
