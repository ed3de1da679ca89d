"""Runs tests under each processor that this machine can stand in for: `make test-processors`.

python -m tests.processors [NAME ...] [-- PYTEST_OPTIONS]
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from transformers_resps.compat import FLAGS_VARIABLE, cpu_flags


COMPILERS = ("g++", "c++", "clang++")
PYTHON_ALONE = str(Path(sys.executable).parent)
NO_TESTS = 5  # pytest's status where all were deselected
# oneDNN's names of instruction sets, weakest first, and how the flags begin that come with each.
ISAS = {
    "SSE41": (),
    "AVX": ("avx",),
    "AVX2": ("avx2", "f16c", "fma"),
    "AVX512_CORE": ("avx512",),
    "AVX512_CORE_VNNI": ("avx512_vnni",),
    "AVX512_CORE_BF16": ("avx512_bf16",),
    "AVX512_CORE_AMX": ("amx", "avx10", "avx512_fp16", "avx_"),
}


def flags_within(isa: str, flags: set[str]) -> set[str]:
    """Those of the flags that a processor has which knows no more than `isa`."""
    return {flag for flag in flags if _place(flag) <= [*ISAS].index(isa)}


def _place(flag: str) -> int:
    """Of the instruction set that a flag comes with."""
    return max(place for place, starts in enumerate(ISAS.values()) if not place or flag.startswith(starts))


@dataclass(frozen=True)
class StandIn:
    """What a process must find. An empty value takes a variable away."""

    isa: str = ""
    starts: str = ""  # of a flag that this machine must have
    variables: dict[str, str] = field(default_factory=dict)
    has_one_core: bool = False
    has_workers: bool = True  # beside each other; threads of several wait for each other

    @property
    def environment(self) -> dict[str, str]:
        bounds = {"ONEDNN_MAX_CPU_ISA": self.isa} if self.isa else {}
        bounds |= {FLAGS_VARIABLE: " ".join(sorted(flags_within(self.isa, cpu_flags())))} if self.isa else {}
        wanted = {**os.environ, "OMP_NUM_THREADS": "1", **bounds, **self.variables}
        return {name: value for name, value in wanted.items() if value}

    def missing(self) -> str | None:
        """Why this machine cannot stand in, if it cannot."""
        flags = cpu_flags()
        if self.isa and not any(flag.startswith(self.starts) for flag in flags):
            return f"this machine has no {self.isa}"
        if self.isa and flags_within(self.isa, flags) == flags:
            return f"this machine has nothing above {self.isa}"
        if self.has_one_core and not hasattr(os, "sched_setaffinity"):
            return "this system binds no process to a core"
        path = self.variables.get("PATH")
        found = [name for name in COMPILERS if path and shutil.which(name, path=path)]
        return f"{found[0]} stands beside this Python" if found else None


# MKL has kernels of its own for Intel's processors: bounds but COMPATIBLE change nothing on AMD's.
STAND_INS = {
    "native": StandIn(),
    "sse41": StandIn("SSE41", "sse4", {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"}),
    "avx2": StandIn("AVX2", "avx2", {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2"}),
    "avx512": StandIn("AVX512_CORE", "avx512", {"ATEN_CPU_CAPABILITY": "avx512", "MKL_CBWR": "AVX512"}),
    "avx512-bf16": StandIn("AVX512_CORE_BF16", "avx512_bf16", {"ATEN_CPU_CAPABILITY": "avx512", "MKL_CBWR": "AVX512"}),
    "other-mkl": StandIn(variables={"MKL_CBWR": "COMPATIBLE"}),
    "two-threads": StandIn(variables={"OMP_NUM_THREADS": "2"}, has_workers=False),
    "one-core": StandIn(variables={"OMP_NUM_THREADS": ""}, has_one_core=True, has_workers=False),
    "no-compiler": StandIn(variables={"PATH": PYTHON_ALONE, "CXX": ""}),
}


def run(stand_in: StandIn, options: list[str]) -> int:
    """Pytest's status."""
    before = os.sched_getaffinity(0) if stand_in.has_one_core else set()
    if before:
        os.sched_setaffinity(0, {min(before)})
    try:
        alone = [] if stand_in.has_workers else ["-n", "0"]
        command = [sys.executable, "-m", "pytest", *options, *alone]
        return subprocess.run(command, env=stand_in.environment, check=False).returncode
    finally:
        if before:
            os.sched_setaffinity(0, before)


def main() -> int:
    words = sys.argv[1:]
    at = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(prog="python -m tests.processors", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(STAND_INS)}; by default all of them")
    names = parser.parse_args(words[:at]).names or [*STAND_INS]
    if unknown := [name for name in names if name not in STAND_INS]:
        parser.error(f"Nothing is called {', '.join(unknown)}. There are {', '.join(STAND_INS)}.")
    ended = dict[str, str]()
    for name in names:
        missing, started = STAND_INS[name].missing(), time.monotonic()
        if missing:
            ended[name] = f"skipped: {missing}"
            continue
        print(f"\n{name}", flush=True)
        status = run(STAND_INS[name], words[at + 1 :])
        passed = "passed" if status in (0, NO_TESTS) else f"FAILED with status {status}"
        ended[name] = f"{passed} in {time.monotonic() - started:.0f} s"
    print("\n" + "\n".join(f"{name:12} {end}" for name, end in ended.items()))
    return int(any("FAILED" in end for end in ended.values()))


if __name__ == "__main__":
    sys.exit(main())
