"""What a model or a head keeps of compiled code from call to call, and when it does without.

One call uses an engine at a time. Code is forgotten when weights change; its first run must give what the eager
function gives; what cannot be compiled runs as it is, after one warning.
"""

import logging
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from threading import Lock
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from torch import Tensor, nn

from .captured import CapturedFunction
from .compiled import CompiledFunction, callers_settings
from .kernels import NO_COMPILER, compiler
from .packages import ModulePackages, packages_folder


logger = logging.getLogger(f"transformers.{__name__}")

# What compilers and allocators raise: those of PyTorch and CUDA are all `RuntimeError`s, a full disk is an `OSError`.
FAULTS = (RuntimeError, OSError)

Owner = TypeVar("Owner")


@dataclass(frozen=True, slots=True, eq=False)
class Code:
    """A function of tensors, and what runs in its place."""

    function: Callable[..., Any]  # without compilation
    fast: CompiledFunction | CapturedFunction
    compared: Callable[[Any], Tensor]  # of the function's outputs, the values that must agree
    values: str  # what these are, in a warning
    dtype: torch.dtype  # of the weights


class CompileEngine(ABC, Generic[Owner]):
    """Lends, checks, times and forgets compiled code. A copied or pickled engine starts anew."""

    name: ClassVar[str]  # of what runs, in warnings
    duration: ClassVar[str]  # of compiling it, in a warning
    owner: Owner  # of the code, while the engine is lent: code asks for it here, so that it keeps no owner alive

    def __init__(self, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._codes: dict[Hashable, Code] = {}
        self._fingerprint: WeightFingerprint | None = None  # of the weights in the code
        self._packages: ModulePackages | None = None
        self._settings: Hashable | None = None  # of the caller that has the engine; `None` before they are asked for
        self._untaken_seconds = 0.0
        self._warned: set[str] = set()
        self._waits = True  # whether the call that has the engine waits for a compiler
        self._missing: set[Code] = set()  # what it would wait for, and runs as it is
        self.is_broken = False  # whether something could not be compiled, or gave other values
        self.obstacle: str | None = None  # that it warned of last
        self._lock = Lock()

    def __reduce__(self) -> tuple[type[Self], tuple[()]]:
        return type(self), ()

    @abstractmethod
    def fingerprint(self) -> "WeightFingerprint":
        """That of the owner's weights now."""

    @property
    @abstractmethod
    def module(self) -> nn.Module:
        """What the owner's code reads weights of."""

    @contextmanager
    def borrow(self, owner: Owner, *, waits: bool = True) -> Iterator[Self | None]:
        """Lend the engine, without code for other weights; nothing while another call uses it. A caller that does not
        wait for a compiler gets the code that lies ready.
        """
        if not self._lock.acquire(blocking=False):
            yield None
            return
        try:
            self.owner, self._settings, self._waits = owner, None, waits
            self._missing.clear()
            if self._fingerprint is not None and self._fingerprint != self.fingerprint():
                self.forget()
                self._fingerprint, self._packages, self.is_broken = None, None, False
            yield self
        finally:
            del self.owner
            self._lock.release()

    @property
    def is_compiled(self) -> bool:
        return bool(self._codes)

    @property
    def lacks_code(self) -> bool:
        """Whether the newest call would have waited for a compiler."""
        return bool(self._missing)

    def code(self, key: Hashable, make: Callable[[], Code]) -> Code:
        """The code under a key, made at the first call with the weights of now."""
        if key not in self._codes:
            self._fingerprint = self._fingerprint or self.fingerprint()
            self._codes[key] = make()
        return self._codes[key]

    def forget(self) -> None:
        """Drop all code, and what is known of it."""
        self._codes.clear()

    @property
    def packages(self) -> ModulePackages:
        """Code for the weights of now, made by any process."""
        self._fingerprint = self._fingerprint or self.fingerprint()
        if self._packages is None:
            self._packages = ModulePackages(lambda: self.module, self.name)
        return self._packages

    def run(self, code: Code, inputs: Sequence[Tensor], buffers: Sequence[Tensor], *, is_ready: bool = False) -> Any:
        """Run code, which is prepared first where sizes are new; `None` where that fails.

        `is_ready` says that the caller has asked whether they are.
        """
        if not self.is_broken and not is_ready and not code.fast.is_ready(inputs, buffers):
            if code not in self._missing:
                self.prepare(code, inputs, buffers)
            if code in self._missing:
                return None
        if self.is_broken:
            return None
        try:
            return code.fast(inputs, buffers)
        except FAULTS as fault:
            self._give_up(described(fault))
            return None

    def run_packaged(self, code: Code, inputs: Sequence[Tensor], buffers: Sequence[Tensor]) -> Any:
        """Run code that is never traced again; `None` where there is none yet, or it fails."""
        if self.is_broken or not isinstance(code.fast, CompiledFunction):
            return None
        self._settings = self._settings or callers_settings(inputs[0].device.type)
        try:
            return code.fast.run_packaged(inputs, buffers, self._settings)
        except FAULTS as fault:
            self._give_up(described(fault))
            return None

    def prepare(self, code: Code, inputs: Sequence[Tensor], buffers: Sequence[Tensor]) -> None:
        """Compile or capture for inputs of these sizes, and give up if the values are not those of eager code."""
        with self.preparing():
            # First, because Transformers adds the hooks that are compiled at an eager call. What it raises is no fault
            # of a compiler.
            outputs = code.function(*inputs, *buffers)
            expected = code.compared(outputs)
            if isinstance(code.fast, CompiledFunction):
                if code.fast.load(inputs, buffers, outputs):
                    reason = self._difference(code, inputs, buffers, expected)
                    if reason is None:
                        return
                    code.fast.discard(inputs, buffers, reason)
                if not self._waits and code.fast.needs_compiler(inputs):
                    self._missing.add(code)
                    return
                if code.fast.needs_compiler(inputs) and compiler() is None:
                    self._give_up(NO_COMPILER)
                    return
                self._announce(is_again=code.fast.is_compiled_for(inputs))
            reason = self._difference(code, inputs, buffers, expected)
        if reason is not None:
            self._give_up(reason)

    def _difference(
        self, code: Code, inputs: Sequence[Tensor], buffers: Sequence[Tensor], expected: Tensor
    ) -> str | None:
        """Run fast code, which is made first; say what failed, or how far its values are from those `expected`."""
        try:
            difference = disagreement(code.compared(code.fast(inputs, buffers)), expected, code.dtype)
        except FAULTS as fault:
            return described(fault)
        return None if difference is None else f"its {code.values} {difference}"

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """Count the seconds inside the `with` block as compiling."""
        started, before = self._clock(), self._untaken_seconds
        try:
            yield
        finally:
            self._untaken_seconds = before + self._clock() - started

    def take_compile_seconds(self) -> float:
        seconds, self._untaken_seconds = self._untaken_seconds, 0.0
        return seconds

    def warn(self, reason: str) -> None:
        """Warn, once for each reason, that all runs as it is."""
        self.obstacle = reason
        if reason not in self._warned:
            self._warned.add(reason)
            logger.warning(f"{self.name.capitalize()} runs without compilation: {reason}.")

    def _give_up(self, reason: str) -> None:
        self.is_broken = True
        self.forget()
        self.warn(reason)

    def _announce(self, *, is_again: bool) -> None:
        if is_again:
            logger.warning(
                f"Compiling {self.name} again, because inference mode, autocast or the number of threads has changed. "
                "Call `generate` in the same way every time."
            )
        elif self.name not in self._warned:  # of several functions only once
            self._warned.add(self.name)
            folder = packages_folder()
            kept = "" if folder is None else f" The code is kept in {folder}, and later processes load it in a second."
            logger.warning(f"Compiling {self.name}, once. {self.duration}{kept}")


def described(fault: Exception) -> str:
    """What went wrong, in one line: PyTorch adds advice for its developers, and names the backend first."""
    lines = [line for line in str(fault).splitlines() if line.strip() and not line.endswith("raised:")]
    return " ".join([f"{type(fault).__name__}:", *lines[:1]]).rstrip(".")


# Share by which compiled and eager code may differ. SmolLM2's logits in bfloat16: 0.02 to 0.06. One matrix of another
# layer makes it 0.16, a token hidden from the newest 0.19; positions off by one, 0.10, look almost like rounding.
_NORM_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
_LOW_PRECISION_NORM_TOLERANCE = 0.1


def disagreement(fast: Tensor, expected: Tensor, dtype: torch.dtype) -> str | None:
    """Say how far compiled values are from eager ones; `None` where rounding explains it. `dtype` is the weights'.

    All values count together: in low precision a single one may be far off.
    """
    difference, scale = (float(part.float().norm()) for part in (fast - expected, expected))
    if difference <= _NORM_TOLERANCE.get(dtype, _LOW_PRECISION_NORM_TOLERANCE) * max(scale, 1.0):
        return None
    return f"differ from the eager ones by {difference / max(scale, 1.0):.2g} of their norm"


def is_of_this_mode(tensor: Tensor) -> bool:
    """Whether it was made in inference mode, as this call is, or outside, likewise.

    Outside, PyTorch refuses to write what was made in inference mode; and it compiles anew for tensors of the other
    kind.
    """
    return tensor.is_inference() == torch.is_inference_mode_enabled()


_SAMPLED = 4  # values of each tensor: a write through `.data` leaves no other trace


class WeightFingerprint:
    """Places, versions and some values of a module's parameters and buffers, and its mode.

    Compiled code holds weights as constants or by their addresses. `load_state_dict`, `.to(...)`, a merged adapter or
    a switch to training would be ignored. `setting` is anything else that the code depends on.
    """

    def __init__(self, module: nn.Module, *setting: Any) -> None:
        tensors = list(chain(module.parameters(), module.buffers()))
        self._marks = [_mark(tensor) for tensor in tensors]
        self._values = _sampled(tensors)
        self._setting = (module.training, type(module), *setting)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, WeightFingerprint):
            return NotImplemented
        mine, theirs = (one._marks + [one._setting] for one in (self, other))
        return mine == theirs and torch.equal(self._values, other._values)

    __hash__ = None  # type: ignore[assignment]  # weights change


def _mark(tensor: Tensor) -> Any:
    version = None if tensor.is_inference() else tensor._version
    return id(tensor), tensor.data_ptr(), version, tensor.requires_grad, tensor.dtype, tensor.device


@torch.no_grad()
def _sampled(tensors: list[Tensor]) -> Tensor:
    """The first values of every tensor in the CPU's memory; of others they would have to be waited for."""
    rows: defaultdict[torch.dtype, list[Tensor]] = defaultdict(list)  # each call of `generate` waits for this
    for tensor in tensors:
        if tensor.device.type == "cpu" and tensor.numel():
            rows[tensor.dtype].append(_first_values(tensor))
    return torch.cat([torch.empty(0), *(torch.cat(values).to(torch.float64) for values in rows.values())]).nan_to_num()


def _first_values(tensor: Tensor) -> Tensor:
    if type(tensor) in (Tensor, nn.Parameter) and tensor.dim():  # other classes may keep values elsewhere
        return tensor.as_strided((min(tensor.shape[-1], _SAMPLED),), (tensor.stride(-1),))
    return (tensor[(0,) * (tensor.dim() - 1)] if tensor.dim() else tensor[None])[:_SAMPLED]
