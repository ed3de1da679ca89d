"""Choose the kernels (code for matrix products and attention) of packaged code, by timing all that can run here.

Our kernels are in `native.cpp`; "onednn" means PyTorch's own. The instruction set decides which kernels can run, but
not which are fast. On two cores with AMX our kernels were faster than oneDNN's for 1 to 512 rows, and 16 rows took as
long as one; with AVX512-BF16 alone they were equally fast. So a model's matrix products are timed when it is compiled.
"""

import ctypes
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from math import log
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..compat import cpu_flags


logger = logging.getLogger(f"transformers.{__name__}")

VARIABLE = "RESPS_KERNELS"
ONEDNN, VECTORS, TILES = "onednn", "avx512_bf16", "amx_bf16"
NEVER = 2**62  # More rows than any matrix product has, so that a kernel used "from" this number is never used.

SOURCE = Path(__file__).with_name("native.cpp")
_PYTORCH = Path(torch.__file__).parent
_FLAGS = ("-fPIC", "-fopenmp", "-std=c++20", "-O3", "-Wno-psabi", "-I", str(_PYTORCH / "include"))
_LINKS = ("-shared", "-fopenmp", "-L", str(_PYTORCH / "lib"), "-ltorch_cpu")

_ROWS = (1, 4, 16, 64, 256)  # Numbers of rows at which each product is timed.
_NODES = (1, 8, 128)  # Numbers of nodes at which attention is timed.
_LENGTH = 512  # Number of keys for which attention is timed.
_WORK = 2**31  # Upper limit of a trial, in multiply-adds.
_BYTES = 2**26  # Upper limit of a trial, in bytes of weights: more than any cache holds.
_REPEATS = 3  # Repeats of a trial; fewer after `_SECONDS`.
_SECONDS = 2.0
# A second kernel must save a sixth at some number of rows, since oneDNN needs a copy of the weights.
_WORTH = log(1.2)


class Choice(NamedTuple):
    """Numbers of rows at which products change from our vector kernel to our AMX tile kernel, and then to oneDNN's."""

    tiles_from: int  # minimum number of rows for our kernel with AMX tiles
    library_from: int  # minimum number of rows for oneDNN; for attention 1 or `NEVER`

    def of(self, rows: int) -> str:
        """Return the name of the kernel for this number of rows of a matrix product."""
        return ONEDNN if rows >= self.library_from else TILES if rows >= self.tiles_from else VECTORS


class Kernels(NamedTuple):
    """The choices of kernels for the linear layers and the attention of one package."""

    linear: Choice
    attention: Choice

    @classmethod
    def only(cls, name: str) -> "Kernels":
        """Choose the kernel `name` for linear layers and attention with any number of rows."""
        choice = Choice(1 if name == TILES else NEVER, 1 if name == ONEDNN else NEVER)
        return cls(choice, choice)


@dataclass(frozen=True)
class Products:
    """The sizes of all linear layers and attentions of a program."""

    linear: tuple[tuple[int, int], ...]  # inputs and outputs of each linear layer
    attention: tuple[tuple[int, int, int], ...]  # heads, key heads and head width of each attention


@cache
def our_kernels() -> tuple[str, ...]:
    """Return the names of the kernels in `native.cpp` that this process can run, the fastest last."""
    flags = cpu_flags() if sys.platform == "linux" else set()
    if VECTORS not in flags:
        return ()
    if TILES not in flags:
        return (VECTORS,)
    if not torch.cpu._init_amx():
        logger.warning("This process may not use AMX: the system refuses it. Kernels of AVX512-BF16 run in its place.")
        return (VECTORS,)
    return VECTORS, TILES


def reads_few_bits() -> bool:
    """Whether our kernels can multiply by weights of few bits: with AVX512-VBMI, if `RESPS_KERNELS` allows them."""
    return bool(our_kernels()) and "avx512_vbmi" in cpu_flags() and demanded_kernel() != ONEDNN


def few_bits_kernel() -> Choice:
    """Return the kernel for weights of few bits, for any number of rows: `demanded_kernel`, else our fastest."""
    return Kernels.only(demanded_kernel() or our_kernels()[-1]).linear


@cache
def demanded_kernel() -> str | None:
    """Return the kernel that the variable `RESPS_KERNELS` names; `None` if it is unset or the kernel cannot run."""
    asked, known = os.environ.get(VARIABLE, ""), (ONEDNN, VECTORS, TILES)
    if not asked:
        return None
    if asked not in known:
        logger.warning(f"{VARIABLE}={asked!r} names no kernel, and is ignored. Use {', '.join(known)}, or unset it.")
        return None
    if asked not in (ONEDNN, *our_kernels()):
        logger.warning(f"{VARIABLE}={asked!r} cannot run on this machine, and is ignored. Unset it.")
        return None
    return asked


@cache
def chosen_kernels(products: Products, *, alike: bool) -> Kernels:
    """Choose the kernels of a program: `demanded_kernel` if possible, else by timing its matrix products.

    With `alike`, one of our kernels computes all products, so that a row's bits do not depend on the other rows.
    """
    ours, demanded = our_kernels(), demanded_kernel()
    if not ours or (demanded is not None and not (alike and demanded == ONEDNN)):
        return Kernels.only(demanded or ONEDNN)
    if alike or products == Products((), ()):  # nothing in bfloat16 to time
        return Kernels.only(ours[-1])
    try:
        return timed_kernels(products, Trial(ours))
    except (OSError, RuntimeError) as fault:
        logger.info(f"Kernels could not be timed, and {ours[-1]} is used: {fault}")
        return Kernels.only(ours[-1])


class Trial:
    """Makes functions to time: each runs one kernel, on more weights than caches hold. `ours` names our kernels."""

    def __init__(self, ours: Sequence[str]) -> None:
        self.names = (*ours, ONEDNN)
        self._library = kernels_alone()
        self._weights = torch.ones(_BYTES // 2, dtype=torch.bfloat16)

    def linear(self, layers: Sequence[tuple[int, int]], rows: int) -> dict[str, Callable[[], object]]:
        """Return for each kernel a function that multiplies rows by weights of these `layers` (inputs, outputs)."""
        calls, known = list[tuple[Tensor, Tensor, Tensor]](), -1
        place, left = 0, min(_BYTES // 2, _WORK // rows)
        while left > 0 and len(calls) > known:
            known = len(calls)
            for inputs, outputs in layers:
                width = min(outputs, max(left, 2**20) // inputs, len(self._weights) // inputs) // 32 * 32
                if inputs % 2 or not width or left <= 0:
                    continue
                place = 0 if place + inputs * width > len(self._weights) else place
                weight = self._weights[place : place + inputs * width].view(width, inputs)
                calls.append((torch.ones(rows, inputs, dtype=torch.bfloat16), weight, weight.new_empty(rows, width)))
                place, left = place + inputs * width, left - inputs * width

        def run(name: str) -> None:
            for inputs, weight, outputs in calls:
                if name == ONEDNN:
                    torch.ops.mkldnn._linear_pointwise(inputs, weight, None, "none", [], "")
                else:
                    run_linear(self._library, inputs, weight, outputs, tiles_from=1 if name == TILES else NEVER)

        return {name: partial(run, name) for name in self.names}

    def attention(self, heads: int, key_heads: int, width: int, nodes: int) -> dict[str, Callable[[], object]]:
        """Return for each kernel a function that computes attention of `nodes` nodes of one text to `_LENGTH` keys."""
        query = torch.ones(1, heads, nodes, width, dtype=torch.bfloat16)
        size = key_heads * _LENGTH * width
        count = max(min(len(self._weights) // (8 * size), _WORK // (query.numel() * _LENGTH * 8)), 1)
        states = self._weights[: 2 * count * size].view(count, 2, 1, key_heads, _LENGTH, width)
        outputs = query.new_empty(1, nodes, heads, width)

        def run(name: str) -> None:
            for key, value in states:
                if name == ONEDNN:
                    functional.scaled_dot_product_attention(query, key, value, enable_gqa=heads != key_heads)
                else:
                    run_attention(self._library, query, key, value, outputs, tiles_from=1 if name == TILES else NEVER)

        return {name: partial(run, name) for name in self.names}


@torch.no_grad()
def timed_kernels(products: Products, trial: Trial, clock: Callable[[], float] = time.perf_counter) -> Kernels:
    """Time each kernel on these products, by the functions of `trial`, and return which kernels to use."""
    timed = partial(_timed, clock=clock, end=clock() + _SECONDS)
    linear = fastest({rows: timed(trial.linear(products.linear, rows)) for rows in _ROWS})
    attention = Choice(linear.tiles_from, NEVER)
    for (heads, key_heads, width), _ in Counter(products.attention).most_common(1):
        attention = fastest(
            {heads // key_heads * nodes: timed(trial.attention(heads, key_heads, width, nodes)) for nodes in _NODES}
        )
    return Kernels(linear, attention._replace(library_from=1 if attention.library_from == 1 else NEVER))


def fastest(tried: Mapping[int, Mapping[str, float]]) -> Choice:
    """Choose the kernel for each number of rows; `tried` has each kernel's seconds at ascending numbers of rows.

    A second kernel, ours or oneDNN's, is used only if it saves enough time (`_WORTH`) over the first one alone.
    """

    def of_ours(tiles_from: int) -> dict[int, float]:
        return {rows: times[Choice(tiles_from, NEVER).of(rows)] for rows, times in tried.items()}

    def price(tiles_from: int) -> float:
        longer = [log(taken / min(tried[rows].values())) for rows, taken in of_ours(tiles_from).items()]
        return sum(longer) + _WORTH * (min(tried) < tiles_from <= max(tried))

    has_tiles = any(TILES in times for times in tried.values())
    starts = (NEVER, *tried) if has_tiles else (NEVER,)
    tiles_from = min(starts, key=price)
    taken, library_from = of_ours(tiles_from), NEVER
    if all(times[ONEDNN] < taken[rows] for rows, times in tried.items()):
        return Choice(tiles_from, 1)
    for rows in sorted(tried, reverse=True):
        if log(taken[rows] / tried[rows][ONEDNN]) < _WORTH:
            break
        library_from = rows
    return Choice(tiles_from, library_from)


def _timed(calls: Mapping[str, Callable[[], object]], clock: Callable[[], float], end: float) -> dict[str, float]:
    """Return each call's shortest time. Calls take turns, so that other programs slow all of them down equally."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(_REPEATS):
        for name, call in calls.items() if not repeat or clock() < end else ():
            started = clock()
            call()
            seconds[name].append(clock() - started)
    return {name: max(min(taken), 1e-9) for name, taken in seconds.items()}


def native_source() -> str:
    """Return the C++ source code of our kernels and operators."""
    return SOURCE.read_text(encoding="utf-8")


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """Make a temporary folder for compiled files, which is removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="resps-")


def _compile(*arguments: str | Path) -> None:
    found = compiler()
    if found is None:
        raise OSError(NO_COMPILER)
    try:
        subprocess.run([found, *arguments], check=True, capture_output=True, text=True)
    except subprocess.SubprocessError as fault:
        raise RuntimeError(f"native.cpp does not compile: {getattr(fault, 'stderr', None) or fault}") from fault


@cache
def native_object(defined: str = "") -> Path:
    """Compile `native.cpp` into an object file, once in a process; this takes some seconds.

    `defined` is a macro to define in tests. Raises an `OSError` without a compiler, a `RuntimeError` if it fails.
    """
    written = Path(_folder().name) / f"kernels{defined}.cpp"
    written.write_text(f"#define {defined}\n{native_source()}" if defined else native_source(), encoding="utf-8")
    made = written.with_suffix(".o")
    _compile(*_FLAGS, "-c", "-o", made, written)
    return made


@cache
def kernels_alone(defined: str = "") -> ctypes.CDLL:
    """Compile and link our kernels as a library, and load it; for `defined` see `native_object`."""
    linked = native_object(defined)
    made = linked.with_suffix(".so")
    _compile(linked, "-o", made, *_LINKS)
    return ctypes.CDLL(str(made))


def run_linear(
    library: ctypes.CDLL,
    rows: Tensor,
    packed: Tensor,
    result: Tensor,
    bias: Tensor | None = None,
    *,
    is_gated: bool = False,
    tiles_from: int = NEVER,
) -> None:
    """Multiply bf16 `rows` `[r, inputs]` by weights with the kernel of packaged code; write `result` `[r, outputs]`.

    `packed` is made by `pack_linear`, or with `is_gated` by `pack_gated`. All tensors must be contiguous. For
    `tiles_from` see `Choice`.
    """
    places = [None if part is None else ctypes.c_void_p(part.data_ptr()) for part in (rows, packed, bias, result)]
    sizes = map(ctypes.c_int64, (*rows.shape, result.shape[-1]))
    library.resps_run_alone(*places, *sizes, ctypes.c_int(is_gated), ctypes.c_int64(tiles_from))


def run_attention(
    library: ctypes.CDLL, query: Tensor, key: Tensor, value: Tensor, result: Tensor, *, tiles_from: int = NEVER
) -> None:
    """Compute attention to all keys with the kernel of packaged code; write `result` `[1, q, heads, hd]`.

    `query` is `[1, heads, q, hd]`, `key` and `value` are `[1, kv heads, t, hd]`; all tensors are bf16 and contiguous.
    For `tiles_from` see `Choice`.
    """
    places = [ctypes.c_void_p(part.data_ptr()) for part in (query, key, value, result)]
    heads, count, width = query.shape[1:]
    sizes = map(ctypes.c_int64, (heads, key.shape[1], count, key.shape[2], width))
    library.resps_attend_alone(*places, *sizes, ctypes.c_float(width**-0.5), ctypes.c_int64(tiles_from))


NO_COMPILER = (
    "no C++ compiler is installed. Install one to compile (on Debian and Ubuntu: `apt install g++`), or set CXX"
)


def compiler() -> str | None:
    """Return the C++ compiler that PyTorch will call, or `None` if there is none."""
    usual = {"darwin": "clang++", "win32": "cl"}
    return shutil.which(os.environ.get("CXX") or usual.get(sys.platform, "g++"))


_PROCESSORS = {  # Instruction sets and their names in words, the strongest first.
    TILES: "x86 with AMX",
    VECTORS: "x86 with AVX512-BF16",
    "avx512f": "x86 with AVX-512",
    "avx2": "x86 with AVX2",
    "sse4_1": "x86 without AVX2",
}


def machine_line() -> str:
    """Describe in one line this machine's processor, the kernels that it can run, and its compiler."""
    flags, demanded, found = cpu_flags(), demanded_kernel(), compiler()
    processor = next((words for flag, words in _PROCESSORS.items() if flag in flags), "another processor")
    kernels = [demanded] if demanded else [*reversed(our_kernels()), ONEDNN]
    version = "no C++ compiler"
    if found is not None:
        told = subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout
        version = told.partition("\n")[0] or found
    return f"{processor}; kernels: {', '.join(kernels)}; {version}"
