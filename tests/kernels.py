"""Settings of this process by which PyTorch chooses kernels, each changed inside a `with` block, and its compiler."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from transformers_resps.compilation.kernels import compiler, our_kernels
from transformers_resps.compilation.pages import HUGE, Kernel


HAS_COMPILER = compiler() is not None
NO_COMPILER = "no C++ compiler is on the PATH, nor named by CXX"
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason=NO_COMPILER)
needs_instructions = pytest.mark.skipif(not our_kernels(), reason="asks for AVX512-BF16")


class RestRoundsOtherwise(TorchDispatchMode):
    """Inside, PyTorch's attention on a CPU gives each row its query, and one more where, of 32 rows at a time, a rest
    of fewer than so many is left, as MKL does.
    """

    def __init__(self, fewest: int) -> None:
        super().__init__()
        self.fewest = fewest

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation is not torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
            return operation(*args, **kwargs or {})
        found, rest = args[0].clone(), args[0].shape[2] % 32
        if 0 < rest < self.fewest:
            found[:, :, -rest:] += 1
        return found, found.new_zeros(found.shape[:3], dtype=torch.float32)


def bytes_in_memory(tensor: torch.Tensor, kind: str = "Rss") -> int:
    """Of the mappings that hold a tensor, as Linux counts this kind of memory."""
    found, is_inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *values = line.split()
        if not name.endswith(":"):
            start, stop = (int(address, 16) for address in name.split("-"))
            is_inside = start < tensor.data_ptr() + tensor.nbytes and tensor.data_ptr() < stop
        elif is_inside and name == f"{kind}:":
            found += int(values[0]) << 10
    return found


def mapped(folder: Path, values: torch.Tensor) -> torch.Tensor:
    """The values as a view of a file, as safetensors gives them, all in memory."""
    file = folder / "weights"
    with file.open("wb") as written:
        written.write(values.numpy().tobytes())
        os.fsync(written.fileno())  # pages that are not yet on the disk stay in memory
    view = torch.from_file(str(file), shared=False, size=values.numel(), dtype=values.dtype).view(values.shape)
    assert torch.equal(view, values)
    read = bytes_in_memory(view) if Path("/proc/self/smaps").exists() else 0
    start = -(-view.data_ptr() // HUGE) * HUGE
    if not read or Kernel().advise(start, HUGE, 21) or bytes_in_memory(view) > read - HUGE // 2:
        pytest.skip("this system does not take back memory that shows a file")
    assert torch.equal(view, values)
    return view


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
    with _kept_precision():
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        yield


@contextmanager
def products_in_full_precision() -> Iterator[None]:
    with _kept_precision():
        torch.set_float32_matmul_precision("highest")
        yield


@contextmanager
def _kept_precision() -> Iterator[None]:
    backends: list[Any] = [torch.backends.cuda, torch.backends.mkldnn]
    before = [backend.matmul.fp32_precision for backend in backends]
    try:
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.matmul.fp32_precision = precision


@contextmanager
def deterministic_algorithms() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
