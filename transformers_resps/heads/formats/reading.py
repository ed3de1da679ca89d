"""Sizes of a published head: read from its tensors, compared with its config and its target.

The draft vocabulary: which target ids a head can propose.

The errors for draft models that are not EAGLE-3 heads, and for kinds of heads that are not supported.

The files of a head: its config and its tensors, from a folder or the Hub.

Nothing in a checkpoint is executed: JSON, safetensors, and legacy `.bin` files with `weights_only=True`.

One published checkpoint -> the config and tensors of our canonical head.
"""

import json
import os
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ...hub import RepositoryFiles
from ..config import DraftHeadConfig
from ..identity import target_identity
from .publishers import (
    MODELOPT_LAYER,
    Publisher,
    feature_layers,
    flat_config,
    norm_flags,
    published_layer_ids,
    publisher_of,
    rope_parameters,
    target_name,
)
from .tensor_names import canonical_names, check_complete, layer_count


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


def draft_offsets(tensors: dict[str, Tensor], rows: int, vocab_size: int, source: str) -> Tensor | None:
    """Offsets `d2t` `[d]` (the target id of draft id i is i + d2t[i]), or `None` when all tokens can be proposed.

    Published as the offsets `d2t`, as absolute ids `hot_token_id` (SGLang), or as the mask `t2d` `[v]`. A `d2t` that
    holds absolute ids is recognised by its `t2d`.

    Args:
        tensors: under our names.
        rows: rows of the output head, d.
        vocab_size: the target's, v.
        source: where from, for messages.

    Raises:
        ValueError: ids leave the vocabulary, are not ascending, contradict `t2d`, or are missing although d < v.
    """
    allowed = tensors["t2d"].nonzero().squeeze(-1) if "t2d" in tensors else None
    if "hot_token_id" in tensors:
        ids = tensors["hot_token_id"].long()
    elif "d2t" in tensors:
        d2t = tensors["d2t"].long()
        is_absolute = allowed is not None and torch.equal(d2t, allowed)
        ids = d2t if is_absolute else torch.arange(len(d2t)) + d2t
    elif allowed is not None:
        ids = allowed
    elif rows == vocab_size:
        return None
    else:
        raise ValueError(
            f"{source} can propose {rows} of {vocab_size} tokens, but holds neither `d2t` nor `t2d` to say which. "
            "Download the head again."
        )
    if ids.min() < 0 or ids.max() >= vocab_size or bool((ids.diff() <= 0).any()):
        raise ValueError(
            f"The `d2t` of {source} gives target ids from {int(ids.min())} to {int(ids.max())}, but they must ascend "
            f"from 0 to {vocab_size - 1} at most. Download the head again, or load it with the target it was made for."
        )
    if len(ids) != rows or (allowed is not None and not torch.equal(ids, allowed)):
        raise ValueError(
            f"The output head, `d2t` and `t2d` of {source} name different draft vocabularies. Download the head again."
        )
    return None if rows == vocab_size else ids - torch.arange(rows)


_WAY_OUT = "Use an EAGLE-3 head of the same target, or train one with `DraftHeadTrainer`."


def check_is_eagle3(config: dict[str, Any], tensors: dict[str, Tensor], source: str) -> None:
    """Refuse a drafter that would load but draft nonsense, or not load at all.

    Args:
        config: the published config, flat.
        tensors: under our names.
        source: where from, for messages.

    Raises:
        ValueError: says which kind of drafter this is and why it cannot be used.
    """
    reason = _another_kind(config, tensors) or _another_layer(config) or _not_two_inputs(tensors)
    if reason:
        raise ValueError(f"{source} {reason} {_WAY_OUT}")


def _another_kind(config: dict[str, Any], tensors: dict[str, Tensor]) -> str | None:
    if (
        any("mask_hidden" in name or "parallel_draft_heads" in name for name in tensors)
        or config.get("parallel_drafting")
        or config.get("speculators_model_type") == "peagle"
        or any(name.startswith("PEagle") for name in config.get("architectures", []))
        or config.get("parallel_draft_step", 1) > 1
    ):
        return (
            "is a P-EAGLE (parallel) head: it drafts several tokens in one pass, but draft trees grow level by level."
        )
    kind = config.get("speculators_model_type", "eagle3")
    if kind != "eagle3":
        return f"is a speculators model of the kind {kind!r}, but only `eagle3` is an EAGLE-3 head."
    if any(part in name for name in tensors for part in ("kv_a_proj", "kv_b_proj", "q_a_proj", "q_b_proj")):
        return "has MLA attention (low-rank keys and values), but only multi-head and grouped-query are supported."
    if any(".mlp.experts." in name or name.endswith(".mlp.gate.weight") for name in tensors):
        return "has a mixture of experts in its layer, but only a dense MLP is supported."
    return None


def _another_layer(config: dict[str, Any]) -> str | None:
    if config.get("use_aux_hidden_state") is False:
        return (
            "has `use_aux_hidden_state: false`: it reads the target's last hidden state, but EAGLE-3 reads those of "
            "several layers."
        )
    for flag, needed in MODELOPT_LAYER.items():
        if config.get(flag, needed) != needed:
            return f"has `{flag}: {str(not needed).lower()}`, but EAGLE-3's layer needs {str(needed).lower()}."
    return None


def _not_two_inputs(tensors: dict[str, Tensor]) -> str | None:
    fc, query = tensors.get("fc.weight"), tensors.get("layers.0.self_attn.q_proj.weight")
    if fc is None or query is None or query.shape[1] == 2 * fc.shape[0]:
        return None  # what is missing is reported with everything else that is
    width = fc.shape[0]
    if query.shape[1] == width and fc.shape[1] == 2 * width:
        return (
            f"is an EAGLE-1 or EAGLE-2 head: its fc joins embedding and feature ({fc.shape[1]} -> {width}) and its "
            f"q_proj reads {width} columns, but EAGLE-3's reads {2 * width}."
        )
    return (
        f"is no EAGLE-3 head: its q_proj reads {query.shape[1]} columns, but EAGLE-3's reads {2 * width}, embedding "
        "and feature side by side."
    )


# A file name inside the checkpoint -> its path on this machine, or None when there is no such file.
Fetch = Callable[[str], Path | None]

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # in order of preference


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A head as published.

    Attributes:
        name: Hub id or folder, for messages.
        config: `config.json`.
        tensors: by their published names, on the CPU, as stored.
    """

    name: str
    config: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def is_canonical(self) -> bool:
        """Saved by `DraftHead.save_pretrained` in our own format."""
        return self.config.get("model_type") == DraftHeadConfig.model_type


def read_checkpoint(
    name: str | os.PathLike[str] | None, config: PreTrainedConfig | None, tensors: Any, **hub: Any
) -> Checkpoint:
    """Read `config.json` and the weights of a Hub id or folder, or take both as the caller gives them.

    Args:
        name: Hub id, or a folder; `None` where the caller gives a config and a state dict.
        config: instead of the one in the files.
        tensors: the state dict, or `None`.
        hub: `revision`, `cache_dir`, `token`, `local_files_only`, `force_download`, `subfolder`, as in
            `huggingface_hub.hf_hub_download`.

    Raises:
        ValueError: a file is missing or damaged, or holds more than tensors; or there is not either a name or a
            config with a state dict.
        OSError: the Hub refuses.
    """
    if name is not None and tensors is None:
        found, weights = _read_files(os.fspath(name), hub)
        return Checkpoint(str(name), found if config is None else config.to_dict(), weights)
    if name is not None or not isinstance(config, PreTrainedConfig) or not isinstance(tensors, Mapping):
        raise ValueError(
            f"Got the name {name!r}, a config of type {type(config).__name__} and a state dict of type "
            f"{type(tensors).__name__}. Pass a name alone, or None with `config=DraftHeadConfig(...)` and "
            "`state_dict=...`."
        )
    return Checkpoint("the given state dict", config.to_dict(), dict(tensors))


def _read_files(name: str, hub: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    folder = Path(name)
    if folder.is_file():
        raise ValueError(
            f"{name} is a file, but `from_pretrained` needs the folder with config.json and the weights. "
            f"Pass {folder.parent} instead."
        )
    fetch = _in_folder(folder, hub) if folder.is_dir() else RepositoryFiles(name, **hub).fetch
    path = fetch("config.json")
    if path is None:
        raise ValueError(
            f"There is no config.json in {name}, which must be a folder or Hub repository with config.json and "
            "model.safetensors (or pytorch_model.bin). Check the name, `revision`, and whether you are offline."
        )
    for single in _WEIGHTS:
        if (whole := fetch(single)) is not None:
            return _read_json(path), _read_tensors(whole)
        if (index := fetch(f"{single}.index.json")) is not None:
            return _read_json(path), _read_shards(index, fetch)
    raise ValueError(
        f"There are no weights in {name}: it needs one of {', '.join(_WEIGHTS)}, or shards with their .index.json. "
        "Check that the download is complete, and whether you are offline."
    )


def _in_folder(folder: Path, hub: dict[str, Any]) -> Fetch:
    def local(file: str) -> Path | None:
        path = folder / (hub.get("subfolder") or "") / file
        return path if path.is_file() else None

    return local


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}. Download it again, or fix it.") from error
    return value


def _read_shards(index: Path, fetch: Fetch) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(_read_json(index)["weight_map"].values())):
        path = fetch(shard)
        if path is None:
            raise ValueError(f"{index} names the shard {shard}, which is not there. Download the checkpoint again.")
        tensors |= _read_tensors(path)
    return tensors


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a whole safetensors file but truncated or corrupt: {error}. Download it again."
        ) from error
    except (pickle.UnpicklingError, EOFError, OSError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{path} is damaged or holds more than tensors, which could run code ({reason}). Use "
            "the safetensors file of this head, or ask its publisher for one."
        ) from error
    return tensors


_COPIED = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "initializer_range": 0.02}
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Corrections of what publishers write and our own config says otherwise, or not at all.
PUBLISHED_ONLY = {"rope_theta", "sliding_window"}


def canonical_head(
    checkpoint: Checkpoint, target: PreTrainedModel | None, overrides: dict[str, Any]
) -> tuple[DraftHeadConfig, dict[str, Tensor]]:
    """Config and tensors of the canonical head in `checkpoint`, from any publisher.

    Args:
        checkpoint: what was read.
        target: the model the head is for; gives what the config leaves out.
        overrides: corrections, by field of `DraftHeadConfig`, `rope_theta`, and `sliding_window` as `None`.

    Raises:
        ValueError: it is no EAGLE-3 head, contradicts itself, or does not fit the target.
    """
    ours = {key: value for key, value in overrides.items() if key not in PUBLISHED_ONLY}
    if checkpoint.is_canonical:
        fields = checkpoint.config | ours
        if overrides.get("rope_theta") is not None:
            rope = fields.get("rope_parameters") or {"rope_type": "default"}
            fields["rope_parameters"] = {**rope, "rope_theta": float(overrides["rope_theta"])}
        return DraftHeadConfig.from_dict(fields), checkpoint.tensors
    tensors = canonical_names(checkpoint.tensors, checkpoint.name)
    publisher = publisher_of(checkpoint.config, tensors)
    stated = flat_config(checkpoint.config) | overrides
    config = {key: value for key, value in stated.items() if value is not None}
    check_is_eagle3(config, tensors, checkpoint.name)
    check_complete(tensors, checkpoint.name)
    _check_window(config, target, checkpoint.name)
    fields = _fields(config, publisher, tensors, target, overrides, checkpoint.name)
    tensors = _shared_with_target(fields, tensors, config, target, checkpoint.name)
    return DraftHeadConfig(**fields | ours), tensors


def _fields(
    config: dict[str, Any],
    publisher: Publisher,
    tensors: dict[str, Tensor],
    target: PreTrainedModel | None,
    overrides: dict[str, Any],
    source: str,
) -> dict[str, Any]:
    sizes = read_sizes(config, tensors, target, source)
    identity = _identity(config, target)
    _, ids = published_layer_ids(config)
    width = tensors["fc.weight"].shape[1]
    if target is None and "target_hidden_size" not in config and ids is not None and width % len(ids) == 0:
        sizes["target_hidden_size"] = width // len(ids)
    count = feature_count(tensors, sizes["target_hidden_size"], source)
    return {
        **{key: config.get(key, default) for key, default in _COPIED.items()},
        **{key: config.get(key) for key in _TOKEN_IDS},
        **sizes,
        **norm_flags(config, publisher, source),
        "rope_parameters": rope_parameters(config, publisher, overrides),
        "feature_layers": feature_layers(config, publisher, count, identity.get("num_hidden_layers"), source),
        "target": identity,
        "source": {"format": str(publisher), "layer_ids": ids},
    }


def _check_window(config: dict[str, Any], target: PreTrainedModel | None, source: str) -> None:
    """Draft trees see the whole prefix: a window must be as long as the target's longest sequence, or be ignored."""
    window = config.get("sliding_window")
    layers = config.get("layer_types", ["sliding_attention"])
    if not window or not config.get("use_sliding_window", True) or "sliding_attention" not in layers:
        return
    longest = getattr(target.config.get_text_config(), "max_position_embeddings", None) if target else None
    if longest is None or longest > window:
        raise ValueError(
            f"The layers of {source} see the last {window} tokens only (`sliding_window`), but the target reads "
            f"{longest or 'more'} and draft trees support no window. Use a head without one, or pass "
            "`sliding_window=None` to ignore it: the output stays the same, but acceptance may drop after "
            f"{window} tokens."
        )


def _identity(config: dict[str, Any], target: PreTrainedModel | None) -> dict[str, Any]:
    """The given target's identity, or what the config says about it."""
    layer_count = config.get("num_target_layers")
    if target is None:
        told = {"name_or_path": target_name(config), "num_hidden_layers": layer_count}
        return {key: value for key, value in told.items() if value is not None}
    identity = target_identity(target)
    if layer_count is not None and layer_count != identity["num_hidden_layers"]:
        raise ValueError(
            f"The head was made for a target of {layer_count} layers, but this target has "
            f"{identity['num_hidden_layers']}. Load the head that was made for this target."
        )
    return identity


def _shared_with_target(
    fields: dict[str, Any],
    tensors: dict[str, Tensor],
    config: dict[str, Any],
    target: PreTrainedModel | None,
    source: str,
) -> dict[str, Tensor]:
    """Leave out the tensors that the head borrows from its target, and set in `fields` what it keeps."""
    offsets = draft_offsets(tensors, fields["draft_vocab_size"], fields["vocab_size"], source)
    tensors = {name: tensor for name, tensor in tensors.items() if name not in ("t2d", "d2t", "hot_token_id")}
    if offsets is None:
        fields["draft_vocab_size"] = None
    else:
        tensors["d2t"] = offsets
    same_width = fields["hidden_size"] == fields["target_hidden_size"]
    is_trained = config.get("owns_embedding") or config.get("embed_requires_grad")
    fields["owns_embedding"] = not same_width or bool(is_trained)
    if not fields["owns_embedding"]:
        tensors.pop("embed_tokens.weight", None)  # the target's own, or a stale copy of it
    if "lm_head.weight" not in tensors:
        borrowed = offsets is None and same_width
    else:
        borrowed = config.get("owns_output_head") is False or _is_targets_output(tensors["lm_head.weight"], target)
    if borrowed:
        tensors.pop("lm_head.weight", None)
    fields["owns_output_head"] = not borrowed
    return tensors


def _is_targets_output(weight: Tensor, target: PreTrainedModel | None) -> bool:
    output = None if target is None else target.get_output_embeddings()
    if output is None or weight.shape != output.weight.shape:
        return False
    return torch.equal(weight, output.weight.detach().to(device="cpu", dtype=weight.dtype))
