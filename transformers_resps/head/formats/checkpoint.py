"""The files of a head: its config and its tensors, from a folder or the Hub.

Nothing in a checkpoint is executed: JSON, safetensors, and legacy `.bin` files with `weights_only=True`.
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
from transformers import PreTrainedConfig

from ...hub import RepositoryFiles
from ..configuration import DraftHeadConfig


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
