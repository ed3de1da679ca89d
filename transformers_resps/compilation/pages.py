"""Move tensors into huge pages of Linux, and free the memory of weights that were copied elsewhere.

With pages of 4 KiB, reading weights is slow, since each page is looked up. `MADV_COLLAPSE` (Linux 6.1, madvise(2))
copies small pages into a huge one at the same address; `MADV_HUGEPAGE` makes memory that was never written use huge
pages from the start. `MADV_PAGEOUT` (Linux 5.4) frees pages that the kernel can read again from a file. If the kernel
refuses, memory stays unchanged.
"""

import ctypes
import errno
import logging
import mmap
import time
from bisect import bisect
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor


logger = logging.getLogger(f"transformers.{__name__}")

HUGE = 2 << 20  # Bytes of a huge page, whose address is a multiple of this number.
_HUGEPAGE, _PAGEOUT, _COLLAPSE = 14, 21, 25  # Advice codes of madvise(2).
_ALONE = 32 << 20  # From this many bytes on, glibc's malloc maps a block separately, and unmaps it when it is freed.
_MEMORY_IS_SHORT = (errno.ENOMEM, errno.EBUSY)  # Errors if the machine, or the control group, has no free memory.


class Kernel:
    """Linux's kernel: reads memory state in `root`'s `proc` and `sys`, and calls madvise. No files: no huge pages."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._process, self._settings = root / "proc", root / "sys/kernel/mm/transparent_hugepage"

    def has_huge_pages(self) -> bool:
        """Whether huge pages are turned on, and their size is 2 MiB."""
        is_off = "[never]" in _text_of(self._settings / "enabled")
        return not is_off and _text_of(self._settings / "hpage_pmd_size").strip() == str(HUGE)

    def available_bytes(self) -> int:
        """Return the number of bytes that programs can allocate without swapping; 0 if unknown."""
        lines = map(str.split, _text_of(self._process / "meminfo").splitlines())
        return next((int(line[1]) << 10 for line in lines if line[:1] == ["MemAvailable:"]), 0)

    def own_ranges(self, *, of_files: bool = False) -> list[tuple[int, int]]:
        """Return ascending address ranges (start, stop) of memory that other processes neither read nor write.

        With `of_files` it is memory mapped from a file, whose changes stay private; otherwise memory without a file.
        """
        ranges = list[tuple[int, int]]()
        for line in _text_of(self._process / "self/maps").splitlines():
            addresses, permissions, _, _, inode = line.split()[:5]
            if permissions.startswith("rw") and permissions.endswith("p") and (inode != "0") == of_files:
                start, stop = (int(address, 16) for address in addresses.split("-"))
                ranges.append((start, stop))
        return ranges

    def advise(self, start: int, size: int, advice: int) -> int:
        """Call madvise(2); return 0 or an error number."""
        libc = ctypes.CDLL(None, use_errno=True)
        failed = libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), ctypes.c_int(advice))
        return ctypes.get_errno() if failed else 0


_LINUX = Kernel()


def collapse(tensors: Iterable[Tensor], kernel: Kernel = _LINUX) -> int:
    """Move tensors into huge pages that they fill at least by half; return the total size of these pages, in bytes.

    Values and addresses stay the same. Other memory within such a page is also moved, and unused parts become zeros.
    Tensors on other devices, in files or in shared memory are not moved.
    """
    pages = _filled_pages(tensors, kernel) if kernel.has_huge_pages() else []
    if not pages:
        return 0
    if kernel.available_bytes() < len(pages) * HUGE:
        logger.info(f"Left {len(pages) * HUGE >> 20} MiB of weights in small pages: memory is short.")
        return 0
    started, errors = time.perf_counter(), Counter[int]()
    for page in pages:
        error = kernel.advise(page, HUGE, _COLLAPSE)
        errors[error] += 1
        if error in _MEMORY_IS_SHORT:
            break
    moved = errors.pop(0, 0) * HUGE
    refusals = "".join(f" The kernel refused others: {errno.errorcode.get(error, error)}." for error in errors)
    seconds = time.perf_counter() - started
    logger.info(f"{moved >> 20} MiB of weights lie in huge pages, after {seconds:.1f} s.{refusals}")
    return moved


def zeros(*size: int, dtype: torch.dtype, device: torch.device, kernel: Kernel = _LINUX) -> Tensor:
    """Make a tensor of zeros. A large tensor in CPU memory is put into huge pages if `kernel` has them."""
    if device.type != "cpu":
        return torch.zeros(*size, dtype=dtype, device=device)
    made = torch.empty(*size, dtype=dtype, device=device)
    if made.nbytes >= _ALONE and kernel.has_huge_pages():
        first, stop = -(-made.data_ptr() // HUGE) * HUGE, (made.data_ptr() + made.nbytes) // HUGE * HUGE
        if _lies_in(kernel.own_ranges(), first, stop):
            kernel.advise(first, stop - first, _HUGEPAGE)
    return made.zero_()


def release(tensors: Iterable[Tensor], kernel: Kernel = _LINUX) -> int:
    """Free the memory of tensors that are mapped from a file, as by safetensors; return the number of freed bytes.

    Later reads load the same values from the file again. Values that were changed after loading stay in memory, and so
    do tensors without a file. Frees whole pages only, in which no other tensor lies.
    """
    freed, ranges = 0, kernel.own_ranges(of_files=True)
    for tensor in tensors if ranges else ():
        if tensor.device.type == "cpu" and tensor.layout is torch.strided and tensor.is_contiguous():
            first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
            size = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - first
            if size > 0 and _lies_in(ranges, first, first + size) and not kernel.advise(first, size, _PAGEOUT):
                freed += size
    return freed


def _filled_pages(tensors: Iterable[Tensor], kernel: Kernel) -> list[int]:
    """Return the ascending addresses of huge pages that these tensors would fill at least by half."""
    filled = Counter[int]()
    in_memory = (one for one in tensors if one.device.type == "cpu" and (one.is_mkldnn or one.layout is torch.strided))
    for start, stop in set(map(_span, in_memory)):
        for page in range(start // HUGE * HUGE, stop, HUGE):
            filled[page] += min(stop, page + HUGE) - max(start, page)
    pages = sorted(page for page, size in filled.items() if 2 * size >= HUGE)
    ranges = kernel.own_ranges() if pages else []
    return [page for page in pages if _lies_in(ranges, page, page + HUGE)]


def _span(tensor: Tensor) -> tuple[int, int]:
    """Return a tensor's first address, and the address after its last byte."""
    if tensor.is_mkldnn:  # PyTorch has no storage for oneDNN's layouts.
        start, size = torch.ops.mkldnn.data_ptr(tensor), torch.ops.mkldnn._nbytes(tensor)
    else:
        start, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
    return start, start + size


def _lies_in(ranges: list[tuple[int, int]], start: int, stop: int) -> bool:
    index = bisect(ranges, (start + 1,)) - 1
    return index >= 0 and stop <= ranges[index][1]


def _text_of(file: Path) -> str:
    """Return a file's text, or an empty string if the file cannot be read, as in some containers."""
    try:
        return file.read_text("utf-8", errors="replace")
    except OSError:
        return ""
