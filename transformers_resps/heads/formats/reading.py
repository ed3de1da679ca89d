"""Convert a published checkpoint to this package's config and tensors. The tensors decide the sizes. If the config or
the target contradicts them, an error is raised. Missing tensors are never filled in.
"""

import os
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ...drafting.kinds import BLOCK, KINDS, SHAPING, DrafterKind, kind_of_files
from ...hub.checkpoint import HUB, CheckpointFiles, tensor_of
from ..config import HeadConfig
from ..identity import target_identity
from .publishers import MODELOPT_LAYER, PublishedConfig, publisher_of
from .tensor_names import canonical_names, check_complete, layer_count


_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # In order of preference.
_PICKLE = "mask_embedding.pt"  # Some block heads store a trained embedding of the mask token here.
_FILES = tuple(file for single in _WEIGHTS for file in (single, f"{single}.index.json"))


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The content of a published head's files."""

    name: str  # Hub id or folder, for messages
    config: dict[str, Any]  # config.json
    tensors: dict[str, Tensor]  # by published name, on the CPU, in the stored dtype


def read_checkpoint(
    name: str | os.PathLike[str] | None, config: PreTrainedConfig | None, tensors: Any, **hub: Any
) -> Checkpoint:
    """Read `config.json` and the weights of a Hub id or folder; without a `name`, use `config` and `tensors`.

    With a name, `config` replaces the one in the files. `hub` has keywords of `huggingface_hub.hf_hub_download`.
    Raises `ValueError` if a file is missing, damaged, or holds more than tensors, `OSError` if the Hub refuses.
    """
    if name is None and isinstance(config, PreTrainedConfig) and isinstance(tensors, Mapping):
        return Checkpoint("the given state dict", config.to_dict(), dict(tensors))
    if name is None or tensors is not None:
        raise ValueError(
            f"Got the name {name!r}, a config of type {type(config).__name__} and a state dict of type "
            f"{type(tensors).__name__}. Pass a name alone, or None with `config=DraftHeadConfig(...)` and "
            "`state_dict=...`."
        )
    name = os.fspath(name)
    files = CheckpointFiles(name, hub)
    found = files.config()
    if found is None:
        raise ValueError(
            f"There is no config.json in {name}, which must be a folder or Hub repository with config.json and "
            "model.safetensors (or pytorch_model.bin). Check the name, `revision`, and whether you are offline."
        )
    places = files.places(*_FILES)
    if places is None:
        raise ValueError(
            f"There are no weights in {name}: it needs one of {', '.join(_WEIGHTS)}, or shards with their "
            ".index.json. Check that the download is complete, and whether you are offline."
        )
    check_is_head(found, canonical_names(places, name), name)  # before reading the weights of a whole model
    if kind_of_files(found, dict.fromkeys(places)) is BLOCK and files.has(_PICKLE):
        raise ValueError(
            f"{name} has a part in {_PICKLE}, a pickle, which could run code. Use a head whose tensors are all in "
            "safetensors."
        )
    return Checkpoint(name, found if config is None else config.to_dict(), files.read(places, tensor_of))


def kind_in(name: str | os.PathLike[str], **hub: Any) -> DrafterKind:
    """Return which kind of head a Hub id or folder contains. For `hub` and errors see `read_checkpoint`."""
    files = CheckpointFiles(name, hub)
    config, places = files.config() or {}, files.places(*_FILES) or {}
    shaping = {name: place for name, place in places.items() if name.endswith(SHAPING)}
    return kind_of_files(config, dict.fromkeys(places) | files.read(shaping, tensor_of))


# (checkpoint, target if known, user's corrections of the config) -> fields of our config, and tensors by our names
Reader = Callable[[Checkpoint, PreTrainedModel | None, dict[str, Any]], tuple[dict[str, Any], dict[str, Tensor]]]


def canonical_head(
    checkpoint: Checkpoint,
    target: PreTrainedModel | None,
    overrides: dict[str, Any],
    config_class: type[HeadConfig],
    read: Reader,
) -> tuple[Any, dict[str, Tensor]]:
    """Convert a head in any layout to this package's config and tensors; `read` converts published layouts.

    `target` supplies sizes that the config leaves out. `overrides` are the user's corrections of the config: fields of
    `config_class`, and `rope_theta`, which our configs have inside `rope_parameters`. Raises a `ValueError` if the
    head is of another kind, contradicts itself, or does not fit the target.
    """
    found = kind_of_files(checkpoint.config, checkpoint.tensors)
    if found.saved_as != config_class.model_type:
        raise ValueError(
            f"{checkpoint.name} is no `{config_class.__name__.removesuffix('Config')}`, but one for `{found.name}`. "
            f"Load it with `{found.name}.from_pretrained`, or any kind with `AutoDraftHead.from_pretrained`."
        )
    corrections = {field: value for field, value in overrides.items() if field != "rope_theta"}
    if checkpoint.config.get("model_type") != config_class.model_type:
        fields, tensors = read(checkpoint, target, overrides)
        return config_class(**fields | corrections), tensors
    fields = checkpoint.config | corrections
    if overrides.get("rope_theta") is not None:
        rope = fields.get("rope_parameters") or {"rope_type": "default"}
        fields["rope_parameters"] = {**rope, "rope_theta": float(overrides["rope_theta"])}
    try:
        return config_class.from_dict(fields), checkpoint.tensors
    except AttributeError as error:  # a dtype that PyTorch does not have
        raise ValueError(f"The config of {checkpoint.name} cannot be read ({error}). Download it again.") from error


_COPIED = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "initializer_range": 0.02}
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_USUAL_HEADS = 32  # `LlamaConfig` and `Qwen3Config` leave this default number out of config.json.
_ATTENTION = "layers.0.self_attn."
_MASK_TOKENS = ("mask_token_id", "ptd_token_id", "pard_token")
_PARALLEL_LEVELS = 8  # Speculators' default for P-EAGLE heads.


def read_eagle(
    checkpoint: Checkpoint, target: PreTrainedModel | None, overrides: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return an EAGLE-3 head's fields for our config, and its tensors by our names; for the arguments see `Reader`."""
    tensors, config = canonical_names(checkpoint.tensors, checkpoint.name), checkpoint.config
    parts = (config.get("transformer_layer_config") or {}, config.get("eagle_config") or {}, config)
    flat = {key: value for part in parts for key, value in part.items() if value is not None} | overrides
    stated = {key: value for key, value in flat.items() if value is not None}
    head = PublishedHead(checkpoint.name, stated, overrides, publisher_of(config, tensors), tensors, target)
    check_is_head(stated, tensors, head.source)
    for reason in other_kinds(stated, tensors):
        raise ValueError(
            f"{head.source} {reason} Use an EAGLE-3 head of the same target, or train one with `DraftHeadTrainer`."
        )
    check_complete(tensors, head.source)
    sizes, identity = head.sizes(), head.identity()
    count = head.feature_count(sizes["target_hidden_size"])
    fields = {
        **head.copied_fields(),
        **sizes,
        **_structure(tensors, stated),
        **head.norm_flags(),
        "rope_parameters": head.rope_parameters(),
        "feature_layers": head.feature_layers(count, identity.get("num_hidden_layers")),
        "sliding_window": _window(head, sizes["num_hidden_layers"]),
        **_parallel(head),
        "target": identity,
        "source": {"format": str(head.publisher), "layer_ids": head.layer_ids},
    }
    return head.without_borrowed(fields)


def _window(head: "PublishedHead", layer_count: int) -> int | None:
    """Return the sliding window of the head: how many newest tokens it saw in training; `None` for all."""
    window: int | None = head.stated.get("sliding_window")
    kinds = set(head.stated.get("layer_types", ["sliding_attention"])[:layer_count])
    if not window or not head.stated.get("use_sliding_window", True) or "sliding_attention" not in kinds:
        return None
    if len(kinds) > 1:
        raise ValueError(
            f"Some layers of {head.source} see the last {window} tokens only (`sliding_window`), but draft trees "
            "need layers that all see the same. Pass `sliding_window=None` to show all to every layer: the output "
            f"stays the same, but acceptance may drop after {window} tokens."
        )
    return window


def _structure(tensors: dict[str, Tensor], stated: dict[str, Any]) -> dict[str, bool]:
    """Return for each optional part (bias or norm) whether the tensors or the config say that the head has it."""
    flags = {
        "fc_bias": "fc.bias" in tensors or stated.get("bias") is True,
        "attention_bias": f"{_ATTENTION}q_proj.bias" in tensors,
        "attention_output_bias": f"{_ATTENTION}o_proj.bias" in tensors,
        "mlp_bias": "layers.0.mlp.gate_proj.bias" in tensors,
        "qk_norm": f"{_ATTENTION}q_norm.weight" in tensors,
        "norm_before_fc": "input_norm.weight" in tensors,
        "fc_norm": any(name.startswith("fc_norm.") for name in tensors),
    }
    return {flag: is_there or stated.get(flag) is True for flag, is_there in flags.items()}


def _parallel(head: "PublishedHead") -> dict[str, Any]:
    """Return the config fields that only P-EAGLE heads have."""
    stated = head.stated
    if "mask_hidden" not in head.tensors:
        return {}
    head.tensors["mask_hidden"] = head.tensors["mask_hidden"].flatten()
    token = next((stated[name] for name in _MASK_TOKENS if name in stated), None)
    if token is None:
        raise ValueError(
            f"{head.source} is a P-EAGLE head, but states no `mask_token_id`. Pass `mask_token_id=`, the token of "
            "its placeholders."
        )
    methods = stated.get("speculators_config", {}).get("proposal_methods") or [{}]
    levels = stated.get("parallel_levels") or methods[0].get("speculative_tokens") or _PARALLEL_LEVELS
    return {"mask_token_id": int(token), "parallel_levels": levels, "default_tree": [33, levels, 8]}


class PublishedHead(PublishedConfig):
    """Infers from a published head its sizes, its vocabulary, and which parts it borrows from the target."""

    def copied_fields(self) -> dict[str, Any]:
        """Return the config fields that mean the same in every format, so that they are copied."""
        copied = {key: self.stated.get(key, default) for key, default in _COPIED.items()}
        return copied | {key: self.stated.get(key) for key in _TOKEN_IDS}

    def sizes(self) -> dict[str, int]:
        """Infer the size fields from the tensors. Raises a `ValueError` if the config or target contradicts them."""
        sizes = {
            "hidden_size": len(self.tensors["norm.weight"]),
            "intermediate_size": len(self.tensors["layers.0.mlp.gate_proj.weight"]),
            "num_hidden_layers": layer_count(self.tensors),
            **self._attention_sizes(),
            **self._vocabulary_sizes(),
        }
        wrong = {key: size for key, size in sizes.items() if self.stated.get(key, size) != size}
        if wrong:
            stated = ", ".join(f"{key} {self.stated[key]} (the tensors: {size})" for key, size in wrong.items())
            corrections = ", ".join(f"{key}={size}" for key, size in wrong.items())
            raise ValueError(
                f"The config of {self.source} states {stated}. "
                f"Download the head again or, if the tensors are right, pass `{corrections}`."
            )
        return {**sizes, "target_hidden_size": self._target_hidden_size(sizes["hidden_size"])}

    def _attention_sizes(self) -> dict[str, int]:
        query, key = (len(self.tensors[f"{_ATTENTION}{name}_proj.weight"]) for name in "qk")
        norm = self.tensors.get(f"{_ATTENTION}q_norm.weight")
        head_dim = self.stated.get("head_dim") if norm is None else len(norm)
        heads = self.stated.get("num_attention_heads") or (query // head_dim if head_dim else _USUAL_HEADS)
        if query % heads or query // heads % 2 or key % (query // heads):
            raise ValueError(
                f"{self.source} has {query} query and {key} key rows, which do not divide into {heads} attention "
                "heads of one even size. Pass the right `num_attention_heads=`."
            )
        head_dim = query // heads
        return {"num_attention_heads": heads, "head_dim": head_dim, "num_key_value_heads": key // head_dim}

    def _vocabulary_sizes(self) -> dict[str, int]:
        """Infer the sizes v of the target's vocabulary and d of the draft vocabulary."""
        theirs = None if self.target is None else self.target.config.get_text_config().vocab_size
        vocab_size = self._rows_of("t2d", "embed_tokens.weight") or theirs or self.stated.get("vocab_size")
        if vocab_size is None:
            raise ValueError(
                f"{self.source} states no `vocab_size`, and none of its tensors shows it. Pass `target=`, or "
                "`vocab_size=`."
            )
        if theirs is not None and theirs != vocab_size:
            raise ValueError(
                f"{self.source} was made for a vocabulary of {vocab_size} tokens, but the target has {theirs}. "
                "Load the head that was made for this target."
            )
        rows = self._rows_of("lm_head.weight", "d2t", "hot_token_id")
        return {"vocab_size": vocab_size, "draft_vocab_size": rows or vocab_size}

    def _rows_of(self, *names: str) -> int | None:
        return next((len(self.tensors[name]) for name in names if name in self.tensors), None)

    def _target_hidden_size(self, hidden_size: int) -> int:
        stated: int | None = self.stated.get("target_hidden_size")
        if self.target is not None:
            width: int = self.target.config.get_text_config().hidden_size
            if stated not in (None, width):
                raise ValueError(
                    f"{self.source} reads a target of hidden size {stated}, but the target has {width}. "
                    "Load the head that was made for this target."
                )
            return width
        ids, width = self.layer_ids, self.tensors["fc.weight"].shape[1]
        if stated is None and ids is not None and width % len(ids) == 0:
            return width // len(ids)
        return stated or hidden_size

    def feature_count(self, target_hidden_size: int) -> int:
        """Compute from the width of `fc` how many of the target's layers the head reads."""
        width = self.tensors["fc.weight"].shape[1]
        if width % target_hidden_size:
            raise ValueError(
                f"The fc of {self.source} reads {width} values, which is no multiple of the target's hidden size "
                f"{target_hidden_size}. Load the head that was made for this target."
            )
        return width // target_hidden_size

    def identity(self) -> dict[str, Any]:
        """Return the target's `target_identity`; if no target was passed, its name and depth from the config."""
        layer_count = self.stated.get("num_target_layers")
        if self.target is None:
            verifier = self.stated.get("speculators_config", {}).get("verifier", {})
            told = {"name_or_path": verifier.get("name_or_path"), "num_hidden_layers": layer_count}
            return {key: value for key, value in told.items() if value is not None}
        identity = target_identity(self.target)
        if layer_count not in (None, identity["num_hidden_layers"]):
            raise ValueError(
                f"The head was made for a target of {layer_count} layers, but this target has "
                f"{identity['num_hidden_layers']}. Load the head that was made for this target."
            )
        return identity

    def without_borrowed(self, fields: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Complete config `fields` by `owns_embedding` and `owns_output_head`; also return the head's own tensors."""
        offsets = draft_offsets(self.tensors, fields["draft_vocab_size"], fields["vocab_size"], self.source)
        tensors = {name: part for name, part in self.tensors.items() if name not in ("t2d", "d2t", "hot_token_id")}
        if offsets is not None:
            tensors["d2t"] = offsets
        same_width = fields["hidden_size"] == fields["target_hidden_size"]
        is_trained = self.stated.get("owns_embedding") or self.stated.get("embed_requires_grad")
        is_trained = is_trained or {"mask_hidden", "embed_tokens.weight"} <= tensors.keys()
        owns_embedding = not same_width or bool(is_trained)
        if not owns_embedding:
            tensors.pop("embed_tokens.weight", None)  # a copy of the target's, perhaps outdated
        owns_output_head = offsets is not None or not same_width
        if (output := tensors.get("lm_head.weight")) is not None:
            theirs: Any = None if self.target is None else self.target.get_output_embeddings()
            is_theirs = theirs is not None and output.shape == theirs.weight.shape
            is_theirs = is_theirs and torch.equal(output, theirs.weight.detach().to(device="cpu", dtype=output.dtype))
            owns_output_head = self.stated.get("owns_output_head") is not False and not is_theirs
        if not owns_output_head:
            tensors.pop("lm_head.weight", None)
        owned = {"owns_embedding": owns_embedding, "owns_output_head": owns_output_head}
        return fields | owned | ({"draft_vocab_size": None} if offsets is None else {}), tensors


_WHOLE = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")  # Ends of class names of whole models.


class WholeModelError(ValueError):
    """Raised when a whole model is loaded as if it were a head."""

    model_type: str | None = None  # of the whole model


def check_is_head(config: dict[str, Any], names: Container[str], source: str) -> None:
    """Raise a `WholeModelError` if `config` and `names`, our names of the tensors, belong to a whole model."""
    kinds = [kind for kind in config.get("architectures") or () if kind.endswith(_WHOLE)]
    if kinds and "fc.weight" not in names and "layers.0.hidden_norm.weight" not in names:
        error = WholeModelError(
            f"{source} is a whole model ({kinds[0]}), but a draft head is needed. Pass a head that was trained for "
            "your model; to draft with this one load it with `AutoModelForCausalLM`, and pass the model as "
            "`assistant_model`, with `policy='auto'` for trees."
        )
        error.model_type = config.get("model_type")
        raise error


def check_is_target(name: str, **hub: Any) -> None:
    """Raise a `ValueError` if the config in the folder or Hub repository `name` belongs to a draft head.

    `hub` may have `revision`, `subfolder`, `token` and `cache_dir`. Raises `OSError` if there is no config.
    """
    config, _ = PreTrainedConfig.get_config_dict(name, **hub)
    names = [config.get("model_type"), *(config.get("architectures") or ())]
    marks = [mark for kind in KINDS for mark in (kind.saved_as, *kind.marks) if mark]
    is_named = any(mark in str(one).lower() for one in names for mark in marks)
    if is_named or "draft_vocab_size" in config or "speculators_model_type" in config:
        raise ValueError(
            f"The target is {name!r}, which is a draft head. Pass the model that the head drafts for as the target, "
            "and the head by its own argument."
        )


# Substrings of tensor names that no EAGLE-3 head has -> end of the error message.
_OTHER_PARTS = {
    ("imadpt.", "img_fc."): (
        "is a ViSpec head: its adaptor (`imadpt`, `img_fc`) compresses the images of a prompt for an EAGLE-2 layer, "
        "but EAGLE-3 reads their tokens as it reads text."
    ),
    ("kv_a_proj", "kv_b_proj", "q_a_proj", "q_b_proj"): (
        "has MLA attention (low-rank keys and values), but only multi-head and grouped-query are supported."
    ),
    (".mlp.experts.", ".mlp.gate.weight"): (
        "has a mixture of experts in its layer, but only a dense MLP is supported."
    ),
}


def other_kinds(config: dict[str, Any], tensors: dict[str, Tensor]) -> Iterator[str]:
    """Yield each reason why a checkpoint is no EAGLE-3 head, and so would fail to load or draft nonsense."""
    is_parallel = "mask_hidden" in tensors
    if not is_parallel and (
        any("parallel_draft_heads" in name for name in tensors)
        or config.get("parallel_drafting")
        or config.get("speculators_model_type") == "peagle"
        or any(name.startswith("PEagle") for name in config.get("architectures", []))
        or config.get("parallel_draft_step", 1) > 1
    ):
        yield "is a parallel head without the learnt feature of P-EAGLE's placeholders (`mask_hidden`)."
    kind = config.get("speculators_model_type", "eagle3")
    if kind not in ("eagle3", "peagle" if is_parallel else "eagle3"):
        yield f"is a speculators model of the kind {kind!r}, but only `eagle3` is an EAGLE-3 head."
    for parts, reason in _OTHER_PARTS.items():
        if any(part in name for name in tensors for part in parts):
            yield reason
    if config.get("use_aux_hidden_state") is False:
        yield (
            "has `use_aux_hidden_state: false`: it reads the target's last hidden state, but EAGLE-3 reads those of "
            "several layers."
        )
    for flag, needed in MODELOPT_LAYER.items():
        if config.get(flag, needed) != needed:
            yield f"has `{flag}: {str(not needed).lower()}`, but EAGLE-3's layer needs {str(needed).lower()}."
    fc, query = tensors.get("fc.weight"), tensors.get(f"{_ATTENTION}q_proj.weight")
    if fc is None or query is None or query.shape[1] == 2 * fc.shape[0]:
        return  # `check_complete` reports all missing tensors together
    width = fc.shape[0]
    if query.shape[1] == width and fc.shape[1] == 2 * width:
        yield (
            f"is an EAGLE-1 or EAGLE-2 head: its fc joins embedding and feature ({fc.shape[1]} -> {width}) and its "
            f"q_proj reads {width} columns, but EAGLE-3's reads {2 * width}."
        )
    yield (
        f"is no EAGLE-3 head: its q_proj reads {query.shape[1]} columns, but EAGLE-3's reads {2 * width}, embedding "
        "and feature side by side."
    )


def draft_offsets(tensors: dict[str, Tensor], rows: int, vocab_size: int, source: str) -> Tensor | None:
    """Return offsets `d2t` `[d]` (the target id of draft id i is i + d2t[i]), or `None` if d = v.

    A file holds the offsets as `d2t`, the target ids themselves as `hot_token_id` (SGLang), or a mask of them as `t2d`
    `[v]`. Some files store target ids as `d2t`; comparison with `t2d` reveals this. `rows` is d, the rows of the
    output head. Raises `ValueError` if ids are missing, not ascending, beyond the vocabulary, or contradict `t2d`.
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


_LOADING = {
    *("adapter_kwargs", "attn_implementation", "config", "device_map", "dtype", "low_cpu_mem_usage", "max_memory"),
    *("offload_folder", "proxies", "quantization_config", "state_dict", "torch_dtype", "trust_remote_code"),
    *("use_safetensors",),
}


def split_keywords(
    keywords: dict[str, Any], config_class: type[HeadConfig]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Split keywords into three dicts: for the Hub, for loading by Transformers, and to correct the head's config."""
    fields = {*config_class.field_types(), "rope_theta"}
    hub = {key: value for key, value in keywords.items() if key in HUB}
    loading = {key: value for key, value in keywords.items() if key in _LOADING or key.startswith("_")}
    overrides = {key: value for key, value in keywords.items() if key in fields}
    unknown = sorted(set(keywords) - set(hub) - set(loading) - set(overrides))
    if unknown:
        raise ValueError(
            f"{config_class.__name__.removesuffix('Config')}.from_pretrained got {unknown}, which it does not know. "
            f"Check the spelling: it takes the loading arguments {sorted(HUB | _LOADING)} and, to correct a head's "
            f"config, {sorted(fields)}."
        )
    if "torch_dtype" in loading:
        loading["dtype"] = loading.pop("torch_dtype")
    return hub, loading, overrides
