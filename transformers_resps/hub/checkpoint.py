"""Read the config and the tensors of a checkpoint: a folder, or one commit of a Hub repository. Nothing in a
checkpoint is executed: only JSON, safetensors, and legacy `.bin` files with `weights_only=True` are read.
"""

import json
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .download import RepositoryFiles


HUB = {"cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token"}
Found = TypeVar("Found")


def tensor_of(file: Any, name: str) -> Tensor:
    """Load tensor `name` to the CPU, in the stored dtype; `file` is an open safetensors file or a dict of a `.bin`."""
    return file[name] if isinstance(file, dict) else file.get_tensor(name)


class CheckpointFiles:
    """Reads the files of a Hub id or a local folder; a file on the Hub is downloaded when it is first needed.

    `hub` has keywords of `huggingface_hub.hf_hub_download`, such as `revision`. All methods raise a `ValueError` if a
    file is damaged, holds more than tensors, or is named by an index but missing, and an `OSError` if the Hub refuses.
    """

    def __init__(self, name: str | os.PathLike[str], hub: dict[str, Any]) -> None:
        self.name, folder = os.fspath(name), Path(name)
        if folder.is_file():
            raise ValueError(
                f"{name} is a file, but `from_pretrained` needs the folder with config.json and the weights. "
                f"Pass {folder.parent} instead."
            )

        def local(file: str) -> Path | None:
            path = folder / (hub.get("subfolder") or "") / file
            return path if path.is_file() else None

        fetch = local if folder.is_dir() else RepositoryFiles(self.name, **hub).fetch
        self._path = cache(fetch)  # cached, because each fetch hashes the file
        self._pickled = cache(_tensors_of_a_pickle)

    def config(self) -> dict[str, Any] | None:
        path = self._path("config.json")
        return None if path is None else _read_json(path)

    def places(self, *candidates: str) -> dict[str, str] | None:
        """Map tensor names to file names, by the first existing file of `candidates`; return `None` if none exists."""
        name = next((name for name in candidates if self._path(name) is not None), None)
        if name is None:
            return None
        if name.endswith(".index.json"):
            return dict(_read_json(cast(Path, self._path(name)))["weight_map"])
        with self._open(name) as file:
            return dict.fromkeys(file.keys(), name)

    def has(self, file: str) -> bool:
        return self._path(file) is not None

    def read(self, places: Mapping[str, str], take: Callable[[Any, str], Found]) -> dict[str, Found]:
        """Map each tensor name in `places` (name -> file) to `take(open file, name)`; open each file only once."""
        values: dict[str, Found] = {}
        for file_name in dict.fromkeys(places.values()):
            with self._open(file_name) as file:
                values |= {name: take(file, name) for name, place in places.items() if place == file_name}
        return values

    @contextmanager
    def _open(self, file_name: str) -> Iterator[Any]:
        path = self._path(file_name)
        if path is None:
            raise ValueError(
                f"{self.name} lacks the file {file_name}, which its index names. Download the checkpoint again."
            )
        is_safe = path.suffix == ".safetensors"
        try:
            with safe_open(path, framework="pt") if is_safe else nullcontext(self._pickled(path)) as file:
                yield file
        except (SafetensorError, KeyError) as error:
            raise ValueError(
                f"{path} is not a whole safetensors file but truncated or corrupt, or lacks a tensor of the index: "
                f"{error}. Download it again."
            ) from error


def _tensors_of_a_pickle(path: Path) -> dict[str, Tensor]:
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except (pickle.UnpicklingError, EOFError, OSError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{path} is damaged or holds more than tensors, which could run code ({reason}). Use the safetensors file "
            "of this head, or ask its publisher for one."
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}. Download it again, or fix it.") from error
    return value
