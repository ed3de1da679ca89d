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
        tensors: under our names, with all of `names.required_names`.
        target: checked against when given.
        source: where from, for messages.

    Raises:
        ValueError: the tensors contradict each other, the config, or the target.
    """
    hidden_size = _shape(tensors, "norm.weight", 1, source)[0]
    sizes: dict[str, Any] = {
        "hidden_size": hidden_size,
        "intermediate_size": _shape(tensors, "layers.0.mlp.gate_proj.weight", 2, source)[0],
        "num_hidden_layers": layer_count(tensors),
        **_attention_sizes(config, tensors, source),
        **_vocabulary_sizes(config, tensors, target, source),
    }
    _check_consistent(config, sizes, source)
    sizes["target_hidden_size"] = _target_width(config, tensors, target, source)
    _check_table(tensors, [sizes["vocab_size"], hidden_size], source)
    flags = structure_flags(config, tensors)
    _check_biases(config, flags, source)
    return sizes | flags


def structure_flags(config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, bool]:
    """Which optional tensors the head has. One that the config asks for counts too, to be missed later."""

    def asked(key: str) -> bool:
        eagle = config.get("eagle_config")
        return config.get(key) is True or (isinstance(eagle, dict) and eagle.get(key) is True)

    first = "layers.0.self_attn."
    return {
        "fc_bias": "fc.bias" in tensors,
        "attention_bias": f"{first}q_proj.bias" in tensors,
        "attention_output_bias": f"{first}o_proj.bias" in tensors,
        "mlp_bias": "layers.0.mlp.gate_proj.bias" in tensors,
        "qk_norm": f"{first}q_norm.weight" in tensors,
        "norm_before_fc": "input_norm.weight" in tensors or asked("norm_before_fc"),
        "fc_norm": any(name.startswith("fc_norm.") for name in tensors) or asked("fc_norm"),
    }


def feature_count(tensors: dict[str, Tensor], target_hidden_size: int, source: str) -> int:
    """How many of the target's layers the head reads.

    Raises:
        ValueError: the width of `fc` is no multiple of the target's.
    """
    width = _shape(tensors, "fc.weight", 2, source)[1]
    if width % target_hidden_size:
        raise ValueError(
            f"The fc of {source} reads {width} values, which is no multiple of the target's hidden size "
            f"{target_hidden_size}. Load the head that was made for this target."
        )
    return width // target_hidden_size


def _attention_sizes(config: dict[str, Any], tensors: dict[str, Tensor], source: str) -> dict[str, int]:
    query = _shape(tensors, "layers.0.self_attn.q_proj.weight", 2, source)[0]
    key = _shape(tensors, "layers.0.self_attn.k_proj.weight", 2, source)[0]
    norm = tensors.get("layers.0.self_attn.q_norm.weight")
    head_dim = len(norm) if norm is not None and norm.dim() == 1 else config.get("head_dim")
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
    theirs = target.config.get_text_config().vocab_size if target is not None else None
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
    output = tensors.get("lm_head.weight")
    draft = next((len(tensors[name]) for name in ("d2t", "hot_token_id") if name in tensors), None)
    rows: int = len(output) if output is not None else vocab_size if draft is None else draft
    if draft is not None and draft != rows:
        raise ValueError(
            f"{source} has {rows} output rows but {draft} draft vocabulary ids, which must be the same number. "
            "Download the head again."
        )
    return {"vocab_size": vocab_size, "draft_vocab_size": rows}


def _target_width(
    config: dict[str, Any], tensors: dict[str, Tensor], target: PreTrainedModel | None, source: str
) -> int:
    stated = config.get("target_hidden_size")
    hidden_size = _shape(tensors, "norm.weight", 1, source)[0]
    if target is None:
        return stated or hidden_size
    width: int = target.config.get_text_config().hidden_size
    if stated is not None and stated != width:
        raise ValueError(
            f"{source} reads a target of hidden size {stated}, but the target has {width}. "
            "Load the head that was made for this target."
        )
    return width


def _check_consistent(config: dict[str, Any], sizes: dict[str, Any], source: str) -> None:
    stated = {key: config[key] for key in sizes if config.get(key) is not None}
    lies = [f"{key} {stated[key]} (the tensors: {sizes[key]})" for key in stated if stated[key] != sizes[key]]
    if lies:
        corrections = ", ".join(f"{key}={sizes[key]}" for key in stated if stated[key] != sizes[key])
        raise ValueError(
            f"The config of {source} states {', '.join(lies)}. "
            f"Download the head again or, if the tensors are right, pass `{corrections}`."
        )


def _check_table(tensors: dict[str, Tensor], needed: list[int], source: str) -> None:
    """Refuse an embedding table that is no copy of the target's, even where the target's will be borrowed."""
    table = tensors.get("embed_tokens.weight")
    if table is not None and list(table.shape) != needed:
        raise ValueError(
            f"{source} stores embed_tokens.weight with shape {list(table.shape)}, but its other tensors and its "
            f"target need {needed}. Download it again, or use another head."
        )


def _check_biases(config: dict[str, Any], flags: dict[str, bool], source: str) -> None:
    """Refuse biases that the config states and the file does not hold."""
    for stated, ours in (("attention_bias", "attention_bias"), ("mlp_bias", "mlp_bias"), ("bias", "fc_bias")):
        if config.get(ours, config.get(stated)) is True and not flags[ours]:
            raise ValueError(
                f"The config of {source} states `{stated}: true`, but the file holds no such bias. "
                f"Download the head again or, if the tensors are right, pass `{ours}=False`."
            )


def _shape(tensors: dict[str, Tensor], name: str, dimensions: int, source: str) -> tuple[int, ...]:
    shape = tuple(tensors[name].shape)
    if len(shape) != dimensions or 0 in shape:
        raise ValueError(
            f"{source} stores {name} with shape {list(shape)}, but it must have {dimensions} non-empty dimension(s). "
            "Use an unquantized head in one of the known layouts."
        )
    return shape
