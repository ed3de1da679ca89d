"""The target's features on disk, computed once and read in every epoch.

One safetensors file per block of texts, named by a hash of its content, written under another name and then renamed: a
killed or failed run leaves complete files only, and the next run continues from them. Adding texts at the end of a
dataset computes the new ones only.
"""

import hashlib
import json
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.logging import tqdm

from ..data.batches import IGNORED, TokenBudgetBatches, collate
from ..data.examples import Example
from ..data.texts import PreparedTexts
from ..head.fingerprint import parameter_fingerprint
from .target_features import FrozenTarget


_BLOCK = 64  # texts per file
_MAX_OPEN_FILES = 256
_TOKENS_PER_FORWARD = 4096  # in a batch of the target, padding included


class CachedFeatures(PreparedTexts):
    """Texts with the target's features on disk, so that training does not run the target.

    Missing features are computed when the object is made. A row has also `features` `[t, F]`, `hidden`
    `[t, target hidden]` and `picks` `[t]`, see `TargetFeatures`.

    Args:
        rows: a dataset from `prepare_dataset`.
        folder: where the files are kept; those of other texts or another target are left alone.
        target: computes missing features.
        dtype: of the stored features; bf16 needs half the disk of fp32 and is what heads are served in.

    Raises:
        OSError: the disk is full; files already written stay usable.
    """

    def __init__(
        self,
        rows: Any,
        folder: str | Path,
        target: FrozenTarget,
        *,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__(rows)
        self._folder, self._target, self._dtype = Path(folder), target, dtype
        self._folder.mkdir(parents=True, exist_ok=True)
        identity = {"layers": target.feature_layers, "dtype": str(dtype), "target": _fingerprint(target.model)}
        self._identity = json.dumps(identity, sort_keys=True)
        starts = range(0, len(self), _BLOCK)
        self._paths = [self._folder / f"{self._key(self._block(start))}.safetensors" for start in starts]
        self._open: OrderedDict[Path, Any] = OrderedDict()
        self._fill()

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        block, row = divmod(index, _BLOCK)
        path = self._paths[block]
        if path not in self._open:
            if len(self._open) >= _MAX_OPEN_FILES:
                self._open.popitem(last=False)
            self._open[path] = _opened(path)
        file = self._open[path]
        return super().__getitem__(index) | {
            name: file.get_tensor(f"{row}.{name}") for name in ("features", "hidden", "picks")
        }

    def _block(self, start: int) -> list[Example]:
        return [self.example(index) for index in range(start, min(start + _BLOCK, len(self)))]

    def _key(self, block: list[Example]) -> str:
        digest = hashlib.sha256(self._identity.encode())
        for example in block:
            digest.update(example.input_ids.numpy().tobytes() + b"|")
            digest.update(example.predicted.numpy().tobytes() + b"|")  # picks are there for predicted tokens alone
        return digest.hexdigest()[:24]

    def _fill(self) -> None:
        missing = [index for index, path in enumerate(self._paths) if not path.exists()]
        blocks = {index: self.lengths[index * _BLOCK : (index + 1) * _BLOCK] for index in missing}
        total = sum(map(sum, blocks.values()))
        with tqdm(total=total, desc="Caching features", unit=" tokens", disable=not missing) as progress:
            for index, lengths in blocks.items():
                self._write(self._paths[index], self._block(index * _BLOCK))
                progress.update(sum(lengths))

    def _write(self, path: Path, block: list[Example]) -> None:
        tensors: dict[str, Tensor] = {}
        lengths = [len(example.input_ids) for example in block]
        for rows in TokenBudgetBatches(lengths, _TOKENS_PER_FORWARD, shuffle=False):
            part = [block[row] for row in rows]
            batch = collate([{"input_ids": e.input_ids, "loss_mask": e.predicted} for e in part])
            device = self._target.model.device
            read = self._target.read(batch["input_ids"].to(device), (batch["labels"] != IGNORED).to(device))
            for place, row in enumerate(rows):
                for name, found, dtype in (
                    ("features", read.features, self._dtype),
                    ("hidden", read.hidden, self._dtype),
                    ("picks", read.picks, torch.int32),
                ):
                    tensors[f"{row}.{name}"] = found[place, : lengths[row]].to("cpu", dtype).contiguous()
        partial = path.with_suffix(f".{os.getpid()}.partial")  # processes that train together fill the same folder
        try:
            save_file(tensors, partial)
            partial.replace(path)
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"Writing the target's features to {path} failed: {error} (they need about "
                f"{_bytes_per_token(tensors)} bytes per token). Free disk space and run again to continue, set "
                "another `feature_cache_dir`, or leave it out to run the target on each batch."
            ) from error
        finally:
            partial.unlink(missing_ok=True)


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")  # type: ignore[no-untyped-call]  # untyped upstream
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"The feature file {path} is gone or damaged ({error}). Delete it and start again: it is computed anew."
        ) from error


def _bytes_per_token(tensors: dict[str, Tensor]) -> int:
    tokens = sum(len(tensor) for name, tensor in tensors.items() if name.endswith(".picks"))
    return sum(tensor.nbytes for tensor in tensors.values()) // max(tokens, 1)


def _fingerprint(model: PreTrainedModel) -> str:
    """Kind, dtype and weights: files of another target, or of another dtype, must not be read."""
    return f"{type(model).__name__} {model.dtype} {parameter_fingerprint(model)}"
