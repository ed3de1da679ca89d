"""The keyword arguments of `DraftHead.from_pretrained`, sorted by who they are for."""

from typing import Any

from .configuration import DraftHeadConfig
from .formats import PUBLISHED_ONLY


_HUB = {"cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token"}
_LOADING = {
    "adapter_kwargs",
    "attn_implementation",
    "config",
    "device_map",
    "dtype",
    "low_cpu_mem_usage",
    "max_memory",
    "offload_folder",
    "quantization_config",
    "state_dict",
    "torch_dtype",
    "trust_remote_code",
    "use_safetensors",
}


def split_keywords(keywords: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Keywords -> (where the files are, how Transformers loads them, corrections to the head's config).

    Raises:
        ValueError: a name is none of these, or asks for a sliding window.
    """
    fields = set(DraftHeadConfig.__annotations__) | PUBLISHED_ONLY
    hub = {key: value for key, value in keywords.items() if key in _HUB}
    loading = {key: value for key, value in keywords.items() if key in _LOADING or key.startswith("_")}
    overrides = {key: value for key, value in keywords.items() if key in fields}
    unknown = sorted(set(keywords) - set(hub) - set(loading) - set(overrides))
    if unknown:
        raise ValueError(
            f"DraftHead.from_pretrained got {unknown}, which it does not know. Check the spelling: it takes the "
            f"loading arguments {sorted(_HUB | _LOADING)} and, to correct a head's config, {sorted(fields)}."
        )
    if overrides.get("sliding_window") is not None:
        raise ValueError(
            f"DraftHead.from_pretrained got `sliding_window={overrides['sliding_window']!r}`, but draft trees support "
            "no window. Pass `sliding_window=None` to ignore the head's own."
        )
    if "torch_dtype" in loading:
        loading["dtype"] = loading.pop("torch_dtype")
    return hub, loading, overrides
