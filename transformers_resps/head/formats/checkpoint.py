"""The files of a head: its config and its tensors, from a folder or the Hub. Knows nothing of layouts.

Nothing in a checkpoint is executed: JSON, safetensors, and legacy `.bin` files with `weights_only=True`.
"""

import json
import os
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
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
# What a damaged or hostile pickle makes `torch.load` raise.
_UNREADABLE = (
    pickle.UnpicklingError,
    EOFError,
    OSError,
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A head as published.

    Attributes:
        name: Hub id or folder, for messages.
        config: `config.json`.
        tensors: by their published names, on the CPU, as stored.
        commit: the repository's commit hash that was read; `None` for a folder.
    """

    name: str
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    commit: str | None = None

    @property
    def is_canonical(self) -> bool:
        """Saved by `DraftHead.save_pretrained` in our own format."""
        return self.config.get("model_type") == DraftHeadConfig.model_type


def read_checkpoint(name: str | os.PathLike[str], **hub: Any) -> Checkpoint:
    """Read `config.json` and the weights of a Hub id or folder.

    Args:
        name: Hub id, or a folder.
        hub: `revision`, `cache_dir`, `token`, `local_files_only`, `force_download`, `subfolder`, as in
            `huggingface_hub.hf_hub_download`.

    Raises:
        ValueError: a file is missing, damaged, holds more than tensors, or points outside the checkpoint.
        OSError: the Hub refuses.
    """
    if Path(name).is_file():
        raise ValueError(
            f"{name} is a file, but `from_pretrained` needs the folder with config.json and the weights. "
            f"Pass {Path(name).parent} instead."
        )
    repository = None if Path(name).is_dir() else RepositoryFiles(str(name), **hub)
    fetch = _in_folder(Path(name), hub) if repository is None else repository.fetch
    checkpoint = _read(name, fetch)
    return checkpoint if repository is None else replace(checkpoint, commit=repository.commit)


def given_checkpoint(name: Any, config: Any, tensors: Any) -> Checkpoint:
    """A checkpoint from a config and a state dict that the caller passes instead of a name.

    Raises:
        ValueError: one of the two is missing, or there is a name as well.
    """
    if name is not None or not isinstance(config, PreTrainedConfig) or not isinstance(tensors, Mapping):
        raise ValueError(
            f"Got the name {name!r}, a config of type {type(config).__name__} and a state dict of type "
            f"{type(tensors).__name__}. Pass a name alone, or None with `config=DraftHeadConfig(...)` and "
            "`state_dict=...`."
        )
    return Checkpoint("the given state dict", config.to_dict(), dict(tensors))


def _read(name: str | os.PathLike[str], fetch: Fetch) -> Checkpoint:
    path = fetch("config.json")
    if path is None:
        raise ValueError(
            f"There is no config.json in {name}, which must be a folder or Hub repository with config.json and "
            "model.safetensors (or pytorch_model.bin). Check the name, `revision`, and whether you are offline."
        )
    config = _read_json(path)
    for single in _WEIGHTS:
        if (whole := fetch(single)) is not None:
            return Checkpoint(str(name), config, _read_tensors(whole))
        if (index := fetch(f"{single}.index.json")) is not None:
            return Checkpoint(str(name), config, _read_shards(index, fetch))
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
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # JSON and UTF-8 errors, and JSON nested too deep
        raise ValueError(f"{path} is not JSON: {error}. Download it again, or fix it.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, but must be a JSON object. Download it again.")
    return value


def _read_shards(index: Path, fetch: Fetch) -> dict[str, Tensor]:
    """The tensors of all shards that the index names, each shard a plain file of the checkpoint."""
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ValueError(f"{index} has no `weight_map` from tensor to file name. Download it again.")
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(weight_map.values())):
        if PurePosixPath(shard).name != shard or "\\" in shard or not shard.endswith((".safetensors", ".bin")):
            raise ValueError(
                f"{index} names the shard {shard!r}, but a shard must be a plain .safetensors or .bin file name: a "
                "path could read files outside the checkpoint. Do not use this checkpoint."
            )
        path = fetch(shard)
        if path is None:
            raise ValueError(f"{index} names the shard {shard}, which is not there. Download the checkpoint again.")
        tensors |= _read_tensors(path)
    missing = sorted(set(weight_map) - set(tensors))
    if missing:
        raise ValueError(f"{index} lists the tensors {missing}, which no shard holds. Download the checkpoint again.")
    return tensors


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if path.name.endswith(".safetensors"):
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(
                f"{path} is not a whole safetensors file but truncated or corrupt: {error}. Download it again."
            ) from error
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        raise ValueError(
            f"{path} is damaged or holds more than tensors, which could run code "
            f"({str(error).splitlines()[0] if str(error) else error!r}). "
            "Use the safetensors file of this head, or ask its publisher for one."
        ) from error
    if not isinstance(value, dict) or not all(isinstance(tensor, Tensor) for tensor in value.values()):
        raise ValueError(
            f"{path} is not a state dict: it does not map names to tensors. "
            "Save `model.state_dict()` as model.safetensors instead."
        )
    return {str(key): tensor for key, tensor in value.items()}
