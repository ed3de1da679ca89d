"""What differs between installations: releases and Auto classes of Hugging Face, the CPU, a PEFT wrapper, the extras.

Each line about a release says when it can go.
"""

import os
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import transformers
from packaging.requirements import Requirement
from packaging.version import Version


try:
    import httpx2 as httpx
except ImportError:
    import httpx  # type: ignore[no-redef,import-not-found]


_DISTRIBUTION = "transformers-resps"
_INSTALLED = Version(transformers.__version__)

# `past_key_values` became `cache` in 5.24. Goes when 5.24 is the lowest release we support.
CACHE_KEYWORD = "cache" if Version("5.24") <= _INSTALLED else "past_key_values"

# Recurrent layers find their states through the cache that they are given since 5.24. Goes with `CACHE_KEYWORD`.
HAS_RECURRENT_STATES = Version("5.24") <= _INSTALLED

# Of some layers as `output_hidden_states` older releases leave out what enters the first, and count from there. Goes
# when 5.23 is the lowest release we support.
SELECTS_HIDDEN_STATES = Version("5.23") <= _INSTALLED

_CONFIG_OPTIONS = {"revision", "token", "cache_dir", "local_files_only", "trust_remote_code", "subfolder"}

# A broken connection, as huggingface_hub reports it. Goes when the lowest release we support has moved to httpx2.
TransportError = httpx.HTTPError


def load_model(name: str, **options: Any) -> Any:
    """A model from a folder or the Hub that writes text, with its towers where `AutoModelForCausalLM` has no class.

    `options` are of `from_pretrained`.
    """
    from transformers import (  # only here: half a second
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_MULTIMODAL_LM_MAPPING,
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForMultimodalLM,
    )

    kept = {key: options[key] for key in _CONFIG_OPTIONS & options.keys()}
    kind = type(AutoConfig.from_pretrained(name, **kept))
    sees = kind in MODEL_FOR_MULTIMODAL_LM_MAPPING and kind not in MODEL_FOR_CAUSAL_LM_MAPPING
    return (AutoModelForMultimodalLM if sees else AutoModelForCausalLM).from_pretrained(name, **options)


FLAGS_VARIABLE = "RESPS_CPU_FLAGS"
_CPU_INFO = Path("/proc/cpuinfo")


def cpu_flags() -> set[str]:
    """Instruction sets of this machine, by Linux's names; empty where the system does not list them.

    If `RESPS_CPU_FLAGS` is set, those that it names, with blanks between, and no others: this machine then stands in
    for a weaker one.
    """
    bound = os.environ.get(FLAGS_VARIABLE)
    return _all_cpu_flags() if bound is None else _all_cpu_flags() & set(bound.split())


def _all_cpu_flags() -> set[str]:
    import torch  # only here: seconds

    if hasattr(torch.cpu, "get_capabilities"):  # torch 2.10 and newer
        return {name for name, value in torch.cpu.get_capabilities().items() if value is True}
    try:
        return set(_CPU_INFO.read_text(encoding="ascii", errors="replace").split())
    except OSError:
        return set()


def unwrapped(model: Any) -> Any:
    """The model itself, from inside an adapter's wrapper or as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def check_extra(extra: str) -> None:
    """Refuse to start what would fail in the middle.

    Args:
        extra: its name in `pyproject.toml`.

    Raises:
        ValueError: names the packages that are missing or too old, and the extra that installs them.
    """
    wrong = sorted(str(needed) for needed in _packages_of(extra) if not _is_met(needed))
    if wrong:
        raise ValueError(
            f"This command needs {', '.join(wrong)}. Run `pip install '{_DISTRIBUTION}[{extra}]'`, or "
            f"`pip install -e '.[{extra}]'` in a clone."
        )


def _packages_of(extra: str) -> Iterator[Requirement]:
    """The requirements that `extra` adds, and those of the extras that it names; none where nothing is installed."""
    try:
        listed = requires(_DISTRIBUTION) or []
    except PackageNotFoundError:  # run from a checkout's folder: what is missing shows when it is imported
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
