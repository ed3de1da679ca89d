"""Write a trained head as it is served."""

import copy
from pathlib import Path
from typing import Any

import torch


def save_head(model: Any, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write a head to `folder` in `dtype`, with adapters merged; the model in memory stays unchanged."""
    head = copy.deepcopy(model)
    if hasattr(head, "merge_and_unload"):
        head = head.merge_and_unload()
    head.to(dtype).save_pretrained(folder)
