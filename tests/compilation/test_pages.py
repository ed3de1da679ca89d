"""Huge pages: what is asked of a planted kernel, what the real one does, and that values stay."""

import errno
import logging
import mmap
import platform
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.kernels import bytes_in_memory, mapped
from transformers_resps.compilation.pages import HUGE, Kernel, collapse, release, zeros


HUGE_PAGES = "AnonHugePages"


class Planted(Kernel):
    """Notes what it is asked to collapse, or to begin in huge pages, and answers `errors` in turn, the last for good.

    All addresses are the process's own, unless `ranges` are.
    """

    def __init__(self, *errors: int, available: int = 1 << 40, ranges: list[tuple[int, int]] | None = None) -> None:
        super().__init__()
        self.errors, self.available = list(errors or (0,)), available
        self.ranges = [(0, 1 << 63)] if ranges is None else ranges
        self.asked = list[int]()
        self.begun = list[tuple[int, int]]()

    def has_huge_pages(self) -> bool:
        return True

    def available_bytes(self) -> int:
        return self.available

    def own_ranges(self, *, of_files: bool = False) -> list[tuple[int, int]]:
        return [] if of_files else self.ranges

    def advise(self, start: int, size: int, advice: int) -> int:
        assert start % HUGE == size % HUGE == 0
        if advice == 14:
            self.begun.append((start, size))
        else:
            assert (size, advice) == (HUGE, 25)
            self.asked.append(start)
        return self.errors.pop(0) if len(self.errors) > 1 else self.errors[0]


def large(pages: int = 4) -> Tensor:
    """Fills so many huge pages and half a page on either side, or less."""
    return torch.arange((pages + 1) * HUGE // 4, dtype=torch.int32)


def filled_half(*parts: Tensor) -> list[int]:
    """The huge pages of which these fill at least half, counted in steps of 64 bytes."""
    counts: dict[int, int] = {}
    for part in parts:
        for address in range(part.data_ptr(), part.data_ptr() + part.nbytes, 64):
            counts[address // HUGE * HUGE] = counts.get(address // HUGE * HUGE, 0) + 64
    return sorted(page for page, size in counts.items() if 2 * size >= HUGE)


def collapses() -> bool:
    release = tuple(map(int, platform.release().split("-")[0].split(".")[:2])) if Kernel().has_huge_pages() else (0, 0)
    return release >= (6, 1)


@pytest.mark.skipif(not collapses(), reason="no Linux 6.1 with huge pages of 2 MiB")
def test_a_tensor_lies_in_huge_pages_afterwards_at_its_place_and_with_its_values() -> None:
    memory = mmap.mmap(-1, 5 * HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # new, so that no page is huge
    tensor = torch.frombuffer(memory, dtype=torch.int32).copy_(large())
    before, place, values = bytes_in_memory(tensor, HUGE_PAGES), tensor.data_ptr(), tensor.tolist()
    moved = collapse([tensor])
    assert moved >= 4 * HUGE
    assert bytes_in_memory(tensor, HUGE_PAGES) - before >= 4 * HUGE
    assert tensor.data_ptr() == place and tensor.tolist() == values
    assert collapse([tensor]) == moved  # they are there already


def test_small_tensors_move_together_where_they_fill_half_of_a_page() -> None:
    memory = torch.zeros(4 * HUGE, dtype=torch.uint8).numpy()
    sizes = [400_000, 100_032, 1_500_032, 64, 900_032, 300_032]  # multiples of 64
    places = [sum(sizes[:index]) + 300_032 * index for index in range(len(sizes))]
    parts = [
        torch.frombuffer(memory, dtype=torch.uint8, offset=place, count=size)
        for place, size in zip(places, sizes, strict=True)
    ]
    kernel = Planted()
    assert collapse(parts, kernel) == len(kernel.asked) * HUGE
    assert kernel.asked == filled_half(*parts) != []
    for part in parts:
        alone = Planted()
        collapse([part], alone)
        assert alone.asked == filled_half(part)


def test_views_of_one_tensor_move_it_once() -> None:
    tensor, kernel = large(), Planted()
    assert collapse([tensor, tensor[1:], tensor.view(-1, 2)], kernel) == len(filled_half(tensor)) * HUGE
    assert kernel.asked == filled_half(tensor)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_weights_in_the_layout_of_onednn_move() -> None:
    kernel, weight = Planted(), torch.randn(1024, 2048)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, 8)
    place = torch.ops.mkldnn.data_ptr(packed)
    collapse([packed], kernel)
    assert len(kernel.asked) >= weight.nbytes // HUGE - 1
    assert all(place - HUGE < page < place + weight.nbytes for page in kernel.asked)


@pytest.mark.parametrize("error", [errno.EINVAL, errno.EAGAIN])
def test_a_page_that_the_kernel_refuses_stays_and_one_line_tells_it(
    error: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "transformers.transformers_resps")
    tensor, kernel = large(), Planted(error, 0, error)
    assert collapse([tensor], kernel) == HUGE
    assert kernel.asked == filled_half(tensor)
    (line,) = caplog.messages
    assert line.startswith("2 MiB of weights lie in huge pages, after ")
    assert line.endswith(f" The kernel refused others: {errno.errorcode[error]}.")


@pytest.mark.parametrize("error", [errno.ENOMEM, errno.EBUSY])
def test_the_first_page_that_finds_no_memory_is_the_last_one(error: int) -> None:
    tensor, kernel = large(), Planted(0, error)
    assert collapse([tensor], kernel) == HUGE
    assert kernel.asked == filled_half(tensor)[:2]


def test_nothing_is_asked_while_the_machine_has_too_little_memory(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "transformers.transformers_resps")
    tensor = large()
    needed = len(filled_half(tensor)) * HUGE
    short, enough = Planted(available=needed - 1), Planted(available=needed)
    assert collapse([tensor], short) == 0 and not short.asked
    assert caplog.messages == [f"Left {needed >> 20} MiB of weights in small pages: memory is short."]
    assert collapse([tensor], enough) == needed


def test_what_is_small_or_elsewhere_is_left_alone() -> None:
    kernel = Planted()
    sparse = torch.sparse_coo_tensor(
        torch.zeros(1, 1, dtype=torch.long), torch.ones(1), (1 << 24,), check_invariants=True
    )
    elsewhere = [torch.empty(1 << 24, device="meta"), sparse]
    assert collapse([torch.ones(1000), torch.empty(0), *elsewhere], kernel) == 0
    assert collapse([], kernel) == 0
    assert not kernel.asked


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no Linux")
@pytest.mark.parametrize("kind", ["a file", "a private copy of a file", "shared memory"])
def test_files_and_shared_memory_are_left_alone(kind: str, tmp_path: Path) -> None:
    count = 4 * HUGE // 4
    (tmp_path / "weights").write_bytes(bytes(4 * HUGE))
    tensor, own = large(), large()
    if kind == "shared memory":
        tensor.share_memory_()
    else:
        tensor = torch.from_file(str(tmp_path / "weights"), shared=kind == "a file", size=count)
    ranges = Kernel().own_ranges()
    kernel = Planted(ranges=ranges)
    assert collapse([tensor], kernel) == 0 and not kernel.asked
    whole = [page for page in filled_half(own) if any(start <= page <= stop - HUGE for start, stop in ranges)]
    assert collapse([own], kernel) == len(whole) * HUGE > 0


def test_weights_of_a_file_leave_memory_and_are_read_again_but_not_if_they_were_changed(tmp_path: Path) -> None:
    own = torch.arange(8 * HUGE // 4, dtype=torch.int32)
    weights = mapped(tmp_path, own)
    weights[5] = -1  # in memory only
    part, place = weights[1000:-1000], weights.data_ptr()
    before = bytes_in_memory(weights)
    freed = release([part, own, torch.empty(8, device="meta"), part.view(-1, 2).T])
    assert part.nbytes - 2 * mmap.PAGESIZE <= freed <= part.nbytes
    assert bytes_in_memory(weights) <= before - freed * 0.9
    assert release([own, part[:2]]) == 0  # no file; less than a page
    own[5] = -1
    assert weights.data_ptr() == place and torch.equal(weights, own)
    assert release([weights]) > freed  # the page that was changed is asked for, too, and stays as it is
    assert torch.equal(weights, own)


CPU = torch.device("cpu")


@pytest.mark.skipif(not Kernel().has_huge_pages(), reason="no Linux with huge pages of 2 MiB")
def test_large_zeros_begin_in_huge_pages() -> None:
    made = zeros(3, 20, HUGE // 4, dtype=torch.int32, device=CPU)
    assert bytes_in_memory(made, HUGE_PAGES) >= 30 * HUGE  # of 60: memory may be in pieces
    assert made.shape == (3, 20, HUGE // 4) and made.dtype is torch.int32 and not made.any()


def test_only_the_pages_that_zeros_fill_begin_as_huge_ones() -> None:
    kernel = Planted()
    made = zeros(20, HUGE, dtype=torch.uint8, device=CPU, kernel=kernel)
    ((start, size),) = kernel.begun
    assert 0 <= start - made.data_ptr() < HUGE and 19 * HUGE <= size <= made.data_ptr() + 20 * HUGE - start


@pytest.mark.parametrize(
    ("pages", "device", "kernel"),
    [
        (1, "cpu", Planted()),
        (20, "cpu", Planted(ranges=[])),
        (20, "cpu", Planted(errno.EINVAL)),
        (20, "meta", Planted()),
    ],
    ids=["small", "not of its own", "refused", "another device"],
)
def test_other_zeros_are_those_of_torch(pages: int, device: str, kernel: Planted) -> None:
    made = zeros(pages, HUGE, dtype=torch.uint8, device=torch.device(device), kernel=kernel)
    assert made.shape == (pages, HUGE) and made.device.type == device
    assert device == "meta" or not made.any()
    assert len(kernel.begun) == (kernel.errors == [errno.EINVAL])


MAPS = """\
55d000000000-55d000400000 r--p 00000000 fe:00 1234                       /usr/bin/python3.11
55d000400000-55d000c00000 rw-p 00000000 00:00 0                          [heap]
7f0000000000-7f0000600000 rw-p 00000000 00:00 0
7f0000600000-7f0000a00000 rw-s 00000000 00:01 77                         /dev/shm/a name with blanks (deleted)
7f0000a00000-7f0000e00000 r--p 00000000 00:00 0
7f0000e00000-7f0001200000 rw-p 00000000 fe:00 1235                       /models/model.safetensors
"""


def planted_machine(root: Path, enabled: str = "always [madvise] never", size: int = HUGE) -> Kernel:
    settings = root / "sys/kernel/mm/transparent_hugepage"
    settings.mkdir(parents=True)
    (settings / "enabled").write_text(enabled + "\n")
    (settings / "hpage_pmd_size").write_text(f"{size}\n")
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/maps").write_text(MAPS)
    (root / "proc/meminfo").write_text("MemTotal:       24000000 kB\nMemAvailable:    1000 kB\nHugePages_Total: 0\n")
    return Kernel(root)


def test_it_reads_what_linux_tells(tmp_path: Path) -> None:
    kernel = planted_machine(tmp_path)
    assert kernel.has_huge_pages() and kernel.available_bytes() == 1_024_000
    assert kernel.own_ranges() == [(0x55D000400000, 0x55D000C00000), (0x7F0000000000, 0x7F0000600000)]
    assert kernel.own_ranges(of_files=True) == [(0x7F0000E00000, 0x7F0001200000)]


@pytest.mark.parametrize(
    ("enabled", "size"), [("always madvise [never]", HUGE), ("always [madvise] never", 512 << 20)]
)
def test_pages_that_are_turned_off_or_larger_are_not_used(tmp_path: Path, enabled: str, size: int) -> None:
    kernel = planted_machine(tmp_path, enabled, size)
    assert not kernel.has_huge_pages() and collapse([large()], kernel) == 0


def test_without_linux_nothing_moves_and_nothing_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "transformers.transformers_resps")
    kernel = Kernel(tmp_path)
    assert not kernel.has_huge_pages() and not kernel.available_bytes() and not kernel.own_ranges()
    assert collapse([large()], kernel) == 0 and not caplog.messages


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no Linux")
def test_the_real_kernel_names_its_error() -> None:
    assert Kernel().advise(0, HUGE, 25) in (errno.ENOMEM, errno.EINVAL)
