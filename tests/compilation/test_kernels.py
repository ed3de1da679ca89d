"""Kernels by measurement: what our C++ computes by vectors and by tiles, and which kernels are chosen where."""

import ctypes
import subprocess
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.kernels import needs_compiler, needs_instructions
from transformers_resps.compilation import kernels
from transformers_resps.compilation.kernels import (
    NEVER,
    ONEDNN,
    TILES,
    VECTORS,
    Choice,
    Kernels,
    Products,
    Trial,
    chosen_kernels,
    fastest,
    kernels_alone,
    machine_line,
    our_kernels,
    run_attention,
    run_linear,
    timed_kernels,
)
from transformers_resps.compilation.native import pack_gated, pack_linear


PRODUCTS = Products(((576, 1536), (1536, 576)), ((9, 3, 64),))


def library_of(kernel: str) -> ctypes.CDLL:
    """Without AMX, tiles are emulated."""
    return kernels_alone("RESPS_EMULATES_TILES" if kernel == TILES and TILES not in our_kernels() else "")


def random(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed)).bfloat16()


@needs_compiler
@pytest.mark.parametrize("defined", ["", "RESPS_EMULATES_TILES"])
def test_the_kernels_compile_on_any_machine(defined: str) -> None:
    library = kernels_alone(defined)
    assert library.resps_run_alone and library.resps_attend_alone


def test_a_block_of_packed_weights_holds_the_tiles_that_a_product_takes() -> None:
    """One product of tiles in plain loops: sums [16, 16] of rows [16, 32] and 16 lines of 16 pairs of weights."""
    weight, rows = random(64, 96), random(16, 96)
    packed, sums = pack_linear([weight]), torch.zeros(16, 64)
    for block in range(2):
        for half in range(2):
            for first in range(0, 96, 32):
                tile = packed[block, first // 2 : first // 2 + 16, 16 * half : 16 * half + 16]  # 16 lines of 64 bytes
                assert tile.stride() == (64, 2, 1)  # a line begins 128 bytes after the one before
                start = 32 * block + 16 * half
                for line in range(16):
                    pair = rows[:, first + 2 * line : first + 2 * line + 2].float()
                    sums[:, start : start + 16] += pair @ tile[line].float().t()
    torch.testing.assert_close(sums, rows.float() @ weight.float().t())


@needs_instructions
@needs_compiler
@pytest.mark.parametrize("kernel", [VECTORS, TILES])
@pytest.mark.parametrize(("inputs", "width"), [(64, 96), (576, 200), (96, 7), (48, 64)])
def test_a_row_gets_the_same_bits_beside_any_other_rows(kernel: str, inputs: int, width: int) -> None:
    weight, bias, rows = random(width, inputs), random(width), random(99, inputs, seed=1)
    packed, from_row = pack_linear([weight]), 1 if kernel == TILES else NEVER
    whole = rows.new_empty(99, width)
    run_linear(library_of(kernel), rows, packed, whole, bias, tiles_from=from_row)
    exactly = functional.linear(rows.double(), weight.double(), bias.double())
    torch.testing.assert_close(whole.double(), exactly, rtol=0.01, atol=0.05)
    for count in range(1, 99):
        some = rows.new_zeros(count, width)
        run_linear(library_of(kernel), rows[-count:].contiguous(), packed, some, bias, tiles_from=from_row)
        assert torch.equal(some, whole[-count:])


@needs_instructions
@needs_compiler
@pytest.mark.parametrize("kernel", [VECTORS, TILES])
def test_gates_and_attention_are_pytorchs(kernel: str) -> None:
    library, from_row = library_of(kernel), 1 if kernel == TILES else NEVER
    gate, up, rows = random(96, 64, seed=1), random(96, 64, seed=2), random(37, 64)
    gated = rows.new_empty(37, 96)
    run_linear(library, rows, pack_gated(gate, up), gated, is_gated=True, tiles_from=from_row)
    expected = functional.silu(functional.linear(rows, gate)) * functional.linear(rows, up)
    assert (gated == expected).float().mean() > 0.98  # sums are taken in another order
    for heads, key_heads, count, length, width in ((9, 3, 8, 100, 64), (4, 4, 1, 64, 32), (6, 2, 50, 333, 96)):
        query, key, value = (
            random(1, one, many, width, seed=many) for one, many in ((heads, count), *[(key_heads, length)] * 2)
        )
        attended = query.new_empty(1, count, heads, width)
        run_attention(library, query, key, value, attended, tiles_from=from_row)
        exactly = functional.scaled_dot_product_attention(
            query.double(), key.double(), value.double(), enable_gqa=heads != key_heads
        )
        torch.testing.assert_close(attended.double(), exactly.transpose(1, 2), rtol=0.02, atol=0.01)


@pytest.mark.skipif(TILES not in our_kernels(), reason="asks for AMX")
@needs_compiler
def test_tiles_and_onednn_take_turns_in_the_same_threads() -> None:
    """Each configures the tiles of its own."""
    weight, rows = random(256, 576), random(40, 576, seed=1)
    packed, library, expected = pack_linear([weight]), kernels_alone(), functional.linear(rows, weight)
    for count in (1, 40, 3, 17, 33):
        made = rows.new_empty(count, 256)
        run_linear(library, rows[:count].contiguous(), packed, made, tiles_from=1)
        torch.testing.assert_close(made, expected[:count])
        torch.testing.assert_close(functional.linear(rows[:count], weight), expected[:count])


@pytest.mark.parametrize(
    ("seconds", "choice"),
    [
        ({1: (9, 10, 20), 16: (40, 10, 20), 256: (400, 100, 180)}, Choice(1, NEVER)),  # AMX: tiles everywhere
        ({1: (9, 10), 16: (10, 20), 256: (90, 100)}, Choice(NEVER, NEVER)),  # vectors, then the library
        ({1: (9, 10), 16: (30, 20), 256: (300, 100)}, Choice(NEVER, 16)),
        ({1: (20, 10), 16: (20, 10)}, Choice(NEVER, 1)),
        ({1: (5, 20, 9), 16: (20, 19, 9), 256: (40, 30, 9)}, Choice(16, 16)),
        ({1: (100, 100), 256: (100, 95)}, Choice(NEVER, NEVER)),  # too little for weights in memory once more
    ],
)
def test_the_faster_kernel_is_taken_by_the_number_of_rows(seconds: dict[int, Sequence[float]], choice: Choice) -> None:
    names = (VECTORS, TILES, ONEDNN) if len(seconds[1]) == 3 else (VECTORS, ONEDNN)
    tried = {rows: dict(zip(names, times, strict=True)) for rows, times in seconds.items()}
    assert fastest(tried) == choice


class PlantedTrial(Trial):
    """Each call moves the clock by what it is said to cost."""

    def __init__(self, linear: Callable[[str, int], float], attention: Callable[[str, int], float]) -> None:
        self.names, self.now = (VECTORS, ONEDNN), 0.0
        self._costs = linear, attention
        self.calls = 0

    def _costing(self, cost: Callable[[str, int], float], count: int) -> dict[str, Callable[[], object]]:
        def spend(name: str) -> None:
            self.now, self.calls = self.now + cost(name, count), self.calls + 1

        return {name: lambda name=name: spend(name) for name in self.names}  # type: ignore[misc]

    def linear(self, layers: Sequence[tuple[int, int]], rows: int) -> dict[str, Callable[[], object]]:
        return self._costing(self._costs[0], rows)

    def attention(self, heads: int, key_heads: int, width: int, nodes: int) -> dict[str, Callable[[], object]]:
        return self._costing(self._costs[1], nodes)


def test_products_of_a_model_are_timed_and_the_library_is_taken_where_it_is_faster() -> None:
    trial = PlantedTrial(
        lambda name, rows: 1e-3 if name == ONEDNN else 2e-5 * rows, lambda name, nodes: 1e-3 * (2 - (name == ONEDNN))
    )
    chosen = timed_kernels(PRODUCTS, trial, clock=lambda: trial.now)
    assert chosen.linear.of(16) == VECTORS and chosen.linear.of(256) == ONEDNN
    assert chosen.attention.library_from == 1
    assert timed_kernels(Products(PRODUCTS.linear, ()), trial, clock=lambda: trial.now).attention.library_from == NEVER


def test_beside_a_busy_neighbour_each_kernel_is_tried_once() -> None:
    trial = PlantedTrial(lambda name, rows: 3.0, lambda name, nodes: 3.0)
    timed_kernels(PRODUCTS, trial, clock=lambda: trial.now)
    assert trial.calls == 2 * (5 + 3)


@needs_instructions
@needs_compiler
def test_a_real_trial_runs_every_kernel_of_this_machine() -> None:
    trial = Trial(our_kernels())
    for layers in ([(576, 49152), (64, 96)], [(53_248, 16)], []):  # of which some fit into no try
        for rows in (1, 256):
            for call in trial.linear(layers, rows).values():
                call()
    for call in trial.attention(9, 3, 64, 8).values():
        call()
    assert {*trial.names} == {*our_kernels(), ONEDNN}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Plants what a machine can do, and what a user demands."""

    def plant(*flags: str, demanded: str = "", permits: bool = True, has_compiler: bool = True) -> None:
        monkeypatch.setattr(kernels, "cpu_flags", lambda: {*flags})
        monkeypatch.setattr(kernels.sys, "platform", "linux")
        monkeypatch.setattr(torch.cpu, "_init_amx", lambda: permits)
        monkeypatch.setenv(kernels.VARIABLE, demanded)
        for name in ("our_kernels", "demanded_kernel", "chosen_kernels"):
            monkeypatch.setattr(kernels, name, getattr(kernels, name).__wrapped__)
        if not has_compiler:
            monkeypatch.setattr(kernels, "compiler", lambda: None)

    return plant


@pytest.mark.parametrize(
    ("flags", "ours"),
    [
        ((), ()),
        (("avx2",), ()),
        (("avx2", "avx512f"), ()),
        (("avx512f", VECTORS), (VECTORS,)),
        (("avx512f", VECTORS, TILES), (VECTORS, TILES)),
    ],
)
def test_what_can_run_is_what_the_processor_has(
    flags: tuple[str, ...], ours: tuple[str, ...], machine: Callable[..., None]
) -> None:
    machine(*flags)
    assert kernels.our_kernels() == ours
    alike = kernels.chosen_kernels(PRODUCTS, alike=True)
    assert alike == Kernels.only(ours[-1] if ours else ONEDNN)  # one for every number of rows
    assert kernels.chosen_kernels(Products((), ()), alike=False) == alike  # nothing is timed


def test_a_process_that_may_not_use_tiles_is_told_and_goes_on(
    machine: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    machine(VECTORS, TILES, permits=False)
    assert kernels.our_kernels() == (VECTORS,)
    assert "may not use AMX" in caplog.text


@pytest.mark.parametrize(
    ("demanded", "warning"),
    [(ONEDNN, ""), (VECTORS, ""), ("avx1024", "names no kernel"), (TILES, "cannot run on this machine")],
)
def test_a_variable_overrides_the_choice_where_it_can(
    demanded: str,
    warning: str,
    machine: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine(VECTORS, demanded=demanded)
    monkeypatch.setattr(kernels, "Trial", lambda ours: None)
    monkeypatch.setattr(kernels, "timed_kernels", lambda products, trial: "timed")
    found = kernels.chosen_kernels(PRODUCTS, alike=False)
    assert found == ("timed" if warning else Kernels.only(demanded))
    assert warning in caplog.text and bool(caplog.text) == bool(warning)
    assert kernels.chosen_kernels(PRODUCTS, alike=True) == Kernels.only(VECTORS)  # the library's rows know each other


def test_what_cannot_be_timed_runs_by_the_best_kernel_of_ours(
    machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(VECTORS, TILES, has_compiler=False)
    monkeypatch.setattr(kernels, "kernels_alone", kernels.kernels_alone.__wrapped__)
    assert kernels.chosen_kernels(PRODUCTS, alike=False) == Kernels.only(TILES)

    def fail(defined: str = "") -> ctypes.CDLL:
        raise RuntimeError("native.cpp does not compile")

    monkeypatch.setattr(kernels, "kernels_alone", fail)
    assert kernels.chosen_kernels(PRODUCTS, alike=False) == Kernels.only(TILES)


@pytest.mark.parametrize(
    ("flags", "begins"),
    [
        (("avx2", "avx512f", VECTORS, TILES), "x86 with AMX; kernels: amx_bf16, avx512_bf16, onednn; "),
        (("avx2", "avx512f"), "x86 with AVX-512; kernels: onednn; "),
        ((), "another processor; kernels: onednn; "),
    ],
)
def test_one_line_tells_the_processor_the_kernels_and_the_compiler(
    flags: tuple[str, ...], begins: str, machine: Callable[..., None]
) -> None:
    machine(*flags, has_compiler=False)
    assert machine_line() == begins + "no C++ compiler"


def test_the_line_names_the_compiler_that_pytorch_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert kernels.compiler() is None
    monkeypatch.setenv("CXX", "python3")
    assert machine_line().endswith(subprocess.check_output(["python3", "--version"], text=True).strip())
    assert chosen_kernels.cache_info().misses >= 0  # decided once in a process
