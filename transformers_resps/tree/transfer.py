"""Tensors that belong together, moved together: each copy between host and device makes the host wait."""

from collections.abc import Sequence

import torch
from torch import Tensor


def moved(parts: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """The same values on another device, in one copy.

    Args:
        parts: of one device, in any shapes, those of wider elements first.
        device: where to.
    """
    joined = torch.cat([part.flatten().view(torch.uint8) for part in parts])
    joined = joined.to(device, non_blocking=device.type != "cpu")  # whoever reads on the host has to wait
    blocks = joined.split([part.numel() * part.element_size() for part in parts])
    return [block.view(part.dtype).view(part.shape) for block, part in zip(blocks, parts, strict=True)]
