"""Which kernels packaged code calls: what this machine can run, and of that what was faster where it was tried.

Ours are in `native.cpp`; "onednn" stands for PyTorch's own. The name of an instruction set says what can run, not what
is fast. With AMX 16 rows took the time of one, and ours were faster than oneDNN's for 1 to 512 rows; with AVX512-BF16
alone they were no slower (two cores). Other sizes and other numbers of cores may tell otherwise, so a model's products
are timed as it is compiled.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
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
NEVER = 2**62  # rows

SOURCE = Path(__file__).with_name("native.cpp")
_ALONE = """#include <stdint.h>
typedef int32_t AOTITorchError;
typedef void* AtenTensorHandle;
#define RESPS_ALONE
extern "C" {{
{source}
}}
"""
_FLAGS = ("-shared", "-fPIC", "-fopenmp", "-std=c++20", "-O3", "-Wno-psabi")

_ROWS = (1, 4, 16, 64, 256)  # tried of each product
_NODES = (1, 8, 128)  # tried of attention
_LENGTH = 512  # of the texts that they attend to
_WORK = 2**31  # multiplications of one try at most, and
_BYTES = 2**26  # of weights that are read once, which no cache holds
_REPEATS = 3  # of which the last are left out after
_SECONDS = 2.0
_WORTH = log(1.2)  # a further kernel must save a sixth at some number of rows: the library's weights take memory


class Choice(NamedTuple):
    """Which kernel computes a product of so many rows: vectors, then tiles, then the library.

    Attributes:
        tiles_from: rows from which AMX's tiles do.
        library_from: rows from which oneDNN does; of attention 1, or `NEVER`.
    """

    tiles_from: int
    library_from: int

    def of(self, rows: int) -> str:
        """The name of the kernel."""
        return ONEDNN if rows >= self.library_from else TILES if rows >= self.tiles_from else VECTORS


class Kernels(NamedTuple):
    """The kernels of one package."""

    linear: Choice
    attention: Choice

    @classmethod
    def only(cls, name: str) -> "Kernels":
        """One kernel for everything."""
        choice = Choice(1 if name == TILES else NEVER, 1 if name == ONEDNN else NEVER)
        return cls(choice, choice)


@dataclass(frozen=True)
class Products:
    """What code multiplies, by sizes.

    Attributes:
        linear: inputs and outputs of each layer.
        attention: heads, heads of keys and width of each; empty where there is none.
    """

    linear: tuple[tuple[int, int], ...]
    attention: tuple[tuple[int, int, int], ...]


@cache
def our_kernels() -> tuple[str, ...]:
    """Those of `native.cpp` that this process can run, the best one last."""
    flags = cpu_flags() if sys.platform == "linux" else set()
    if VECTORS not in flags:
        return ()
    if TILES not in flags:
        return (VECTORS,)
    if not torch.cpu._init_amx():
        logger.warning("This process may not use AMX: the system refuses it. Kernels of AVX512-BF16 run in its place.")
        return (VECTORS,)
    return VECTORS, TILES


@cache
def demanded_kernel() -> str | None:
    """What `RESPS_KERNELS` asks for and can run; `None` leaves the choice to us."""
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
    """The kernels of code.

    Args:
        products: what it multiplies, which is timed.
        alike: whether a row must get the same bits whatever others there are, which one kernel of ours gives.
    """
    ours, demanded = our_kernels(), demanded_kernel()
    if not ours or (demanded is not None and not (alike and demanded == ONEDNN)):
        return Kernels.only(demanded or ONEDNN)
    if alike:
        return Kernels.only(ours[-1])
    try:
        return timed_kernels(products, Trial(ours))
    except (OSError, subprocess.SubprocessError, RuntimeError) as fault:
        logger.info(f"Kernels could not be timed, and {ours[-1]} is used: {fault}")
        return Kernels.only(ours[-1])


class Trial:
    """Runs the products of a model by each kernel, over weights that no cache holds.

    Args:
        ours: names of our kernels.
    """

    def __init__(self, ours: Sequence[str]) -> None:
        self.names = (*ours, ONEDNN)
        self._library = kernels_alone()
        self._weights = torch.ones(_BYTES // 2, dtype=torch.bfloat16)

    def linear(self, layers: Sequence[tuple[int, int]], rows: int) -> dict[str, Callable[[], object]]:
        """Kernel -> multiplies so many rows by as many of the layers' weights as a try takes."""
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
            for given, weight, made in calls:
                if name == ONEDNN:
                    torch.ops.mkldnn._linear_pointwise(given, weight, None, "none", [], "")
                else:
                    run_linear(self._library, given, weight, made, tiles_from=1 if name == TILES else NEVER)

        return {name: partial(run, name) for name in self.names}

    def attention(self, heads: int, key_heads: int, width: int, nodes: int) -> dict[str, Callable[[], object]]:
        """Likewise of nodes of one row, over `_LENGTH` keys."""
        query = torch.ones(1, heads, nodes, width, dtype=torch.bfloat16)
        size = key_heads * _LENGTH * width
        count = max(min(len(self._weights) // (8 * size), _WORK // (query.numel() * _LENGTH * 8)), 1)
        states = self._weights[: 2 * count * size].view(count, 2, 1, key_heads, _LENGTH, width)
        made = query.new_empty(1, nodes, heads, width)

        def run(name: str) -> None:
            for key, value in states:
                if name == ONEDNN:
                    functional.scaled_dot_product_attention(query, key, value, enable_gqa=heads != key_heads)
                else:
                    run_attention(self._library, query, key, value, made, tiles_from=1 if name == TILES else NEVER)

        return {name: partial(run, name) for name in self.names}


@torch.no_grad()
def timed_kernels(products: Products, trial: Trial, clock: Callable[[], float] = time.perf_counter) -> Kernels:
    """Try each kernel with these products, and choose."""
    timed = partial(_timed, clock=clock, end=clock() + _SECONDS)
    linear = fastest({rows: timed(trial.linear(products.linear, rows)) for rows in _ROWS})
    attention = Choice(linear.tiles_from, NEVER)
    for (heads, key_heads, width), _ in Counter(products.attention).most_common(1):
        attention = fastest(
            {heads // key_heads * nodes: timed(trial.attention(heads, key_heads, width, nodes)) for nodes in _NODES}
        )
    return Kernels(linear, attention._replace(library_from=1 if attention.library_from == 1 else NEVER))


def fastest(tried: Mapping[int, Mapping[str, float]]) -> Choice:
    """The fastest kernels. Two of ours, or the library beside ours, must be worth it.

    Args:
        tried: rows -> kernel -> seconds, rows ascending.
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
    """The least seconds of each, in turn: others may compute meanwhile."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(_REPEATS):
        for name, call in calls.items() if not repeat or clock() < end else ():
            started = clock()
            call()
            seconds[name].append(clock() - started)
    return {name: max(min(taken), 1e-9) for name, taken in seconds.items()}


@cache
def kernels_alone(defined: str = "") -> ctypes.CDLL:
    """The kernels of `native.cpp` in a library of their own. Compiling takes some seconds, once in a process.

    Args:
        defined: a macro to define, for tests.

    Raises:
        OSError: there is no compiler.
        subprocess.SubprocessError: it fails.
    """
    found = compiler()
    if found is None:
        raise OSError(NO_COMPILER)
    source = _ALONE.format(source=SOURCE.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory(prefix="resps-") as folder:
        written, made = Path(folder) / "kernels.cpp", Path(folder) / "kernels.so"
        written.write_text(f"#define {defined}\n{source}" if defined else source, encoding="utf-8")
        subprocess.run([found, *_FLAGS, "-o", made, written], check=True, capture_output=True)
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
    """Multiply as packaged code does.

    Args:
        library: `kernels_alone()`.
        rows: bf16 `[r, i]`, contiguous as all others.
        packed: see `pack_linear`, or `pack_gated`.
        result: is written, bf16 `[r, o]`.
        bias: bf16 `[o]`.
        is_gated: whether `packed` holds a gate and what it gates.
        tiles_from: see `Choice`.
    """
    places = [None if part is None else ctypes.c_void_p(part.data_ptr()) for part in (rows, packed, bias, result)]
    sizes = map(ctypes.c_int64, (*rows.shape, result.shape[-1]))
    library.resps_run_alone(*places, *sizes, ctypes.c_int(is_gated), ctypes.c_int64(tiles_from))


def run_attention(
    library: ctypes.CDLL, query: Tensor, key: Tensor, value: Tensor, result: Tensor, *, tiles_from: int = NEVER
) -> None:
    """Attend as packaged code does, to all keys.

    Args:
        library: `kernels_alone()`.
        query: bf16 `[1, heads, q, hd]`, contiguous as all others.
        key: bf16 `[1, kv heads, t, hd]`.
        value: likewise.
        result: is written, bf16 `[1, q, heads, hd]`.
        tiles_from: see `Choice`.
    """
    places = [ctypes.c_void_p(part.data_ptr()) for part in (query, key, value, result)]
    heads, count, width = query.shape[1:]
    sizes = map(ctypes.c_int64, (heads, key.shape[1], count, key.shape[2], width))
    library.resps_attend_alone(*places, *sizes, ctypes.c_float(width**-0.5), ctypes.c_int64(tiles_from))


NO_COMPILER = (
    "no C++ compiler is installed. Install one to compile (on Debian and Ubuntu: `apt install g++`), or set CXX"
)


def compiler() -> str | None:
    """The C++ compiler that PyTorch will call; `None` where there is none."""
    usual = {"darwin": "clang++", "win32": "cl"}
    return shutil.which(os.environ.get("CXX") or usual.get(sys.platform, "g++"))


def machine_line() -> str:
    """The class of this machine's processor, our kernels, and the compiler, in one line."""
    return f"{_processor_class()}; kernels: {', '.join(_kernels_in_words())}; {_compiler_in_words()}"


_CLASSES = (  # the strongest first
    (TILES, "x86 with AMX"),
    (VECTORS, "x86 with AVX512-BF16"),
    ("avx512f", "x86 with AVX-512"),
    ("avx2", "x86 with AVX2"),
    ("sse4_1", "x86 without AVX2"),
)


def _processor_class() -> str:
    flags = cpu_flags()
    return next((words for flag, words in _CLASSES if flag in flags), "another processor")


def _kernels_in_words() -> Iterator[str]:
    demanded = demanded_kernel()
    yield from [demanded] if demanded else reversed(our_kernels())
    if not demanded:
        yield ONEDNN


def _compiler_in_words() -> str:
    found = compiler()
    if found is None:
        return "no C++ compiler"
    told = subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout
    return told.partition("\n")[0] or found
