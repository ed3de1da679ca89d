"""Compares caches: what a call leaves must be what plain decoding leaves."""

from typing import Any

import torch
from torch import Tensor


def check_equal_caches(found: Any, wanted: Any, most: float | None = None) -> None:
    """Lengths, keys, values, and the states of recurrent layers.

    Args:
        found: the cache to check.
        wanted: plain decoding's.
        most: the largest difference, as a share of the largest number; by default what two layers of rounding make.
    """
    assert found.get_seq_length() == wanted.get_seq_length()
    for ours, theirs in zip(found.layers, wanted.layers, strict=True):
        if getattr(theirs, "keys", None) is not None:
            assert ours.get_seq_length() == theirs.get_seq_length()
            _check_close(ours.keys, theirs.keys, most)
            _check_close(ours.values, theirs.values, most)
        if hasattr(theirs, "conv_states"):
            assert ours.has_previous_state == theirs.has_previous_state
            assert ours.record_past == theirs.record_past
            for name in ("conv_states", "recurrent_states"):
                for own, other in zip(getattr(ours, name).values(), getattr(theirs, name).values(), strict=True):
                    assert (own is None) == (other is None)
                    if other is not None:
                        _check_close(own, other, most)


def _check_close(found: Tensor, wanted: Tensor, most: float | None) -> None:
    usual = 1e-9 if wanted.dtype is torch.float64 else 1e-3
    largest = float(wanted.abs().max()) if wanted.numel() else 0.0
    rtol, atol = (usual, usual) if most is None else (0.0, largest * most)
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=atol)
