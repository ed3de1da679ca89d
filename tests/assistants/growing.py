"""A cache that forgets nothing, for passes over a text."""

from typing import Any

import torch
from torch import Tensor

from transformers_resps.drafting import Entries


class Growing(Entries):
    """Keeps all that was ever written, each pass after the last."""

    def __init__(self) -> None:
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if layer_idx in self.kept:
            keys, values = (torch.cat(pair, dim=2) for pair in zip(self.kept[layer_idx], (keys, values), strict=True))
        self.kept[layer_idx] = keys, values
        return keys, values
