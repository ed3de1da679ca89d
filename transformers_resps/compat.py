"""Handles differences between installations (release of Transformers, PEFT wrapper, CPU, optional dependencies), and
defines types that Transformers lacks for its models, configs and caches.

Comments say when code for a release can be deleted.
"""

import os
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import transformers
from packaging.requirements import Requirement
from packaging.version import Version


if TYPE_CHECKING:  # `resps --help` loads this module: torch takes seconds
    import torch
    from torch import Tensor, nn
    from transformers import Cache, PreTrainedConfig, PreTrainedModel

    class TextConfig(PreTrainedConfig):
        """The type of a decoder's config: fields that every decoder has."""

        vocab_size: int
        hidden_size: int
        num_hidden_layers: int


try:
    import httpx2 as httpx
except ImportError:
    import httpx  # type: ignore[no-redef,import-not-found]


_DISTRIBUTION = "transformers-resps"
_INSTALLED = Version(transformers.__version__)

# The argument `past_key_values` was renamed `cache` in 5.24. Delete when 5.24 is the lowest supported release.
CACHE_KEYWORD = "cache" if Version("5.24") <= _INSTALLED else "past_key_values"

# Since 5.24 recurrent layers read their states from the cache of the call. Delete with `CACHE_KEYWORD`.
HAS_RECURRENT_STATES = Version("5.24") <= _INSTALLED

# Since 5.23 `output_hidden_states` takes a list of layers in which 0 means the embeddings; in older releases 0 means
# the first layer. Delete when 5.23 is the lowest supported release.
SELECTS_HIDDEN_STATES = Version("5.23") <= _INSTALLED

_CONFIG_OPTIONS = {"revision", "token", "cache_dir", "local_files_only", "trust_remote_code", "subfolder"}

# The error that huggingface_hub raises when a connection breaks. Delete when the lowest supported release uses httpx2.
TransportError = httpx.HTTPError


class CacheLayer(Protocol):
    """The type of a filled `Cache` layer, with all fields that this package uses; each kind of layer has only some."""

    keys: "Tensor"  # [b, kv heads, s, hd]
    values: "Tensor"
    sliding_window: int
    cumulative_length: int
    cumulative_length_linear: "Tensor"
    device: "torch.device | None"
    has_previous_state: dict[int, bool]

    def get_seq_length(self) -> int: ...
    def crop(self, tokens_to_remove: int) -> None: ...
    def reorder_cache(self, beam_idx: "Tensor") -> None: ...
    def batch_select_indices(self, indices: "Tensor") -> None: ...


def cache_layers(cache: "Cache") -> list[CacheLayer]:
    """Return the layers of a decoder's cache, typed as `CacheLayer`."""
    return cast(list[CacheLayer], cache.layers)


def text_config(model: "PreTrainedModel") -> "TextConfig":
    """Return the model's decoder config: a part of a multimodal model's config, or else the whole config."""
    return cast("TextConfig", model.config.get_text_config())


def input_embedding(model: "PreTrainedModel") -> "nn.Embedding":
    """Return the token embedding layer; its `weight` is `[vocabulary, hidden]`."""
    return cast("nn.Embedding", model.get_input_embeddings())


def output_layer(model: "PreTrainedModel") -> "nn.Linear | None":
    """Return the layer that computes logits, with `weight` `[vocabulary, hidden]`; `None` if the model has none."""
    return cast("nn.Linear | None", model.get_output_embeddings())


def load_model(name: str, **options: Any) -> Any:
    """Load a model that generates text, from a folder or Hub id `name`; `options` are passed to `from_pretrained`.

    If `AutoModelForCausalLM` does not know the model's class, the model is loaded with its vision and audio towers.
    """
    config_options = {key: options[key] for key in _CONFIG_OPTIONS & options.keys()}
    config_class = type(transformers.AutoConfig.from_pretrained(name, **config_options))
    is_causal = config_class in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    sees = config_class in transformers.MODEL_FOR_MULTIMODAL_LM_MAPPING and not is_causal
    model_class = transformers.AutoModelForMultimodalLM if sees else transformers.AutoModelForCausalLM
    return model_class.from_pretrained(name, **options)


FLAGS_VARIABLE = "RESPS_CPU_FLAGS"  # If set, CPU flags that it does not list are ignored, to test as on a weaker CPU.
_CPU_INFO = Path("/proc/cpuinfo")


def cpu_flags() -> set[str]:
    """Return Linux's names of the CPU's instruction sets; empty if the system does not list any."""
    allowed = os.environ.get(FLAGS_VARIABLE)
    return _all_cpu_flags() if allowed is None else _all_cpu_flags() & set(allowed.split())


def _all_cpu_flags() -> set[str]:
    import torch  # imported here, because it takes seconds

    if hasattr(torch.cpu, "get_capabilities"):  # torch 2.10 and newer
        return {name for name, value in torch.cpu.get_capabilities().items() if value is True}
    try:
        return set(_CPU_INFO.read_text(encoding="ascii", errors="replace").split())
    except OSError:
        return set()


def unwrapped(model: Any) -> Any:
    """Return the model inside a PEFT wrapper, or `model` itself if it is not wrapped."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def plain_tensors(tensor: "Tensor") -> "Iterator[Tensor]":
    """Yield the plain tensors inside a tensor of a library's class, or the tensor itself if it is plain."""
    names, _ = tensor.__tensor_flatten__() if hasattr(tensor, "__tensor_flatten__") else ((), None)
    for name in names:
        yield from plain_tensors(getattr(tensor, name))
    if not names:
        yield tensor


def check_extra(extra: str) -> None:
    """Raise `ValueError` if packages of `extra`, an optional dependency, are missing or too old."""
    wrong = sorted(str(needed) for needed in _packages_of(extra) if not _is_met(needed))
    if wrong:
        raise ValueError(
            f"This command needs {', '.join(wrong)}. Run `pip install '{_DISTRIBUTION}[{extra}]'`, or "
            f"`pip install -e '.[{extra}]'` in a clone."
        )


def _packages_of(extra: str) -> Iterator[Requirement]:
    """Yield the requirements of `extra` and of the extras that it includes."""
    try:
        listed = requires(_DISTRIBUTION) or []
    except PackageNotFoundError:  # a clone, not installed: importing a missing package fails
        return
    for needed in map(Requirement, listed):
        marker, needed.marker = needed.marker, None
        if marker is None or marker.evaluate({"extra": ""}) or not marker.evaluate({"extra": extra}):
            continue  # a base dependency, or another extra's
        if needed.name == _DISTRIBUTION:
            for other in needed.extras:
                yield from _packages_of(other)
        else:
            yield needed


def _is_met(needed: Requirement) -> bool:
    try:
        return needed.specifier.contains(version(needed.name), prereleases=True)
    except PackageNotFoundError:
        return False
