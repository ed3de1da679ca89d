"""Settings of this process by which PyTorch chooses kernels, each changed inside a `with` block."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch


@contextmanager
def one_more_thread() -> Iterator[None]:
    """As it is told: more threads than free cores take seconds."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: threads + 1)
        yield


@contextmanager
def without_onednn() -> Iterator[None]:
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(True)


@contextmanager
def products_in_bfloat16() -> Iterator[None]:
    """As `torch.set_float32_matmul_precision("medium")` sets it, whose getter now raises."""
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = "none"


@contextmanager
def deterministic_algorithms() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
