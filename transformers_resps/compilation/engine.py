"""Keep the compiled code of a model or a draft head from call to call, check the code, and run eagerly if it fails.

Only one call at a time uses an engine. Code is dropped when weights change. Its first results are compared with those
of the eager function. A function that cannot be compiled runs eagerly, after one warning.
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
from typing import ClassVar, Generic, Self, TypeVar

import torch
from torch import Tensor, nn

from ..compat import plain_tensors
from .captured import CapturedFunction, Outputs
from .compiled import CompiledFunction, callers_settings
from .kernels import NO_COMPILER, compiler
from .packages import ModulePackages, packages_folder


logger = logging.getLogger(f"transformers.{__name__}")

# Errors of compilers and allocators. PyTorch and CUDA raise only `RuntimeError`s, a full disk an `OSError`.
FAULTS = (RuntimeError, OSError)

Owner = TypeVar("Owner")


@dataclass(frozen=True, slots=True, eq=False)
class Code:
    """A function of tensors, and the compiled or captured function that replaces it."""

    function: Callable[..., Outputs]  # the eager function
    fast: CompiledFunction | CapturedFunction
    compared: Callable[[Outputs], Tensor]  # selects the outputs in which both functions must agree
    values: str  # the name of these values in a warning
    dtype: torch.dtype  # dtype of the weights
    tolerance: float | None = None  # allowed relative difference; `None`: what rounding in `dtype` explains


class CompileEngine(ABC, Generic[Owner]):
    """Keeps and checks the compiled code of an `owner`, for one call at a time. Copies and pickles omit the code."""

    name: ClassVar[str]  # the name of the compiled model in warnings
    duration: ClassVar[str]  # how long compiling takes, in a warning
    owner: Owner  # set only during `borrow`; code reads the owner from here, and so does not keep it alive

    def __init__(self, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._codes: dict[Hashable, Code] = {}
        self._fingerprint: WeightFingerprint | None = None  # fingerprint of the weights for which code was compiled
        self._packages: ModulePackages | None = None
        self._settings: Hashable | None = None  # `callers_settings` of this call, once they were read
        self._untaken_seconds = 0.0
        self._warned: set[str] = set()
        self._waits = True  # whether this call waits for a compiler
        self._missing: set[Code] = set()  # code that this call lacks, because it does not wait
        self.is_broken = False  # whether a function could not be compiled, or its code gave wrong values
        self.obstacle: str | None = None  # the reason that the newest warning gave
        self._lock = Lock()

    def __reduce__(self) -> tuple[type[Self], tuple[()]]:
        return type(self), ()

    @abstractmethod
    def fingerprint(self) -> "WeightFingerprint":
        """Return a fingerprint of the owner's present weights."""

    @property
    @abstractmethod
    def module(self) -> nn.Module:
        """The module whose weights the code reads."""

    @contextmanager
    def borrow(self, owner: Owner, *, waits: bool = True) -> Iterator[Self | None]:
        """Reserve the engine for a call, or yield `None` if another call uses it. Drop all code if weights changed.

        If `waits` is false, the call uses only code that is ready, and never waits for a compiler.
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
        """Whether the newest call ran some functions eagerly because it did not wait for a compiler."""
        return bool(self._missing)

    def code(self, key: Hashable, make: Callable[[], Code]) -> Code:
        """Return the code stored under `key`; make it first if there is none for the present weights."""
        if key not in self._codes:
            self._fingerprint = self._fingerprint or self.fingerprint()
            self._codes[key] = make()
        return self._codes[key]

    def forget(self) -> None:
        """Drop all code."""
        self._codes.clear()

    @property
    def packages(self) -> ModulePackages:
        """The store on disk of compiled code for `module` with its present weights; all processes share it."""
        self._fingerprint = self._fingerprint or self.fingerprint()
        if self._packages is None:
            self._packages = ModulePackages(lambda: self.module, self.name)
        return self._packages

    def run(
        self, code: Code, inputs: Sequence[Tensor], buffers: Sequence[Tensor], *, is_ready: bool = False
    ) -> Outputs | None:
        """Run `code.fast`, after `prepare` if sizes are new; `None` if it fails or would have to wait for a compiler.

        With `is_ready` the caller asserts that the code is ready for these sizes, and no check is made.
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

    def run_packaged(self, code: Code, inputs: Sequence[Tensor], buffers: Sequence[Tensor]) -> Outputs | None:
        """Run code of a loaded package, without compiling; return `None` if no package is loaded, or if it fails."""
        if self.is_broken or not isinstance(code.fast, CompiledFunction):
            return None
        self._settings = self._settings or callers_settings(inputs[0].device.type)
        try:
            return code.fast.run_packaged(inputs, buffers, self._settings)
        except FAULTS as fault:
            self._give_up(described(fault))
            return None

    def prepare(self, code: Code, inputs: Sequence[Tensor], buffers: Sequence[Tensor]) -> None:
        """Load, compile or capture code for these sizes, and check it. If this fails, all later calls run eagerly."""
        with self.preparing():
            # Eager code runs first: Transformers then adds hooks, which must be compiled, too; and an error of the
            # function itself is raised here, and not taken for an error of the compiler.
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
        """Run compiled code; describe its error or its difference from `expected` values, or return `None`."""
        try:
            difference = disagreement(code.compared(code.fast(inputs, buffers)), expected, code.dtype, code.tolerance)
        except FAULTS as fault:
            return described(fault)
        return None if difference is None else f"its {code.values} {difference}"

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """Count the time inside the `with` block as compile time."""
        started, before = self._clock(), self._untaken_seconds
        try:
            yield
        finally:
            self._untaken_seconds = before + self._clock() - started

    def take_compile_seconds(self) -> float:
        seconds, self._untaken_seconds = self._untaken_seconds, 0.0
        return seconds

    def warn(self, reason: str) -> None:
        """Log a warning that eager code runs and why, once for each `reason`."""
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
        elif self.name not in self._warned:  # once for all functions of the engine
            self._warned.add(self.name)
            folder = packages_folder()
            kept = "" if folder is None else f" The code is kept in {folder}, and later processes load it in a second."
            logger.warning(f"Compiling {self.name}, once. {self.duration}{kept}")


def described(fault: Exception) -> str:
    """Describe an exception in one line, without PyTorch's backend name and its advice to PyTorch developers."""
    lines = [line for line in str(fault).splitlines() if line.strip() and not line.endswith("raised:")]
    return " ".join([f"{type(fault).__name__}:", *lines[:1]]).rstrip(".")


# Relative difference that rounding may cause. SmolLM2's logits in bfloat16 differ by 0.02 to 0.06; with a matrix of
# the wrong layer by 0.16, with one token masked by 0.19, and with positions off by one by 0.10, almost like rounding.
_NORM_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
_LOW_PRECISION_NORM_TOLERANCE = 0.1


def disagreement(fast: Tensor, expected: Tensor, dtype: torch.dtype, tolerance: float | None = None) -> str | None:
    """Describe how far compiled values are from eager values; `None` if rounding in the weights' `dtype` explains it.

    `tolerance` is the allowed relative difference; with `None` it depends on the `dtype`. The norm over all values is
    compared, since in low precision a single value may be far off.
    """
    difference, scale = (float(part.float().norm()) for part in (fast - expected, expected))
    most = _NORM_TOLERANCE.get(dtype, _LOW_PRECISION_NORM_TOLERANCE) if tolerance is None else tolerance
    if difference <= most * max(scale, 1.0):
        return None
    return f"differ from the eager ones by {difference / max(scale, 1.0):.2g} of their norm"


def is_of_this_mode(tensor: Tensor) -> bool:
    """Whether a tensor was made in the present mode: inference mode, or normal mode.

    PyTorch compiles again for tensors of the other mode, and refuses to write inference tensors outside their mode.
    """
    return tensor.is_inference() == torch.is_inference_mode_enabled()


_SAMPLED = 4  # Number of values of each tensor in a fingerprint. Only these reveal a write through `.data`.


class WeightFingerprint:
    """Records a module's state, so that `==` detects changes of its training mode, its tensors or any `setting`.

    Tensors are compared by address, version and some values. Compiled code holds weights as constants or by their
    addresses, and would ignore `load_state_dict`, `.to(...)`, a merged adapter or a switch to training.
    """

    def __init__(self, module: nn.Module, *setting: object) -> None:
        tensors = [part for each in chain(module.parameters(), module.buffers()) for part in plain_tensors(each)]
        self._marks = [_mark(tensor) for tensor in tensors]
        self._values = _sampled(tensors)
        self._setting = (module.training, type(module), *setting)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, WeightFingerprint):
            return NotImplemented
        mine, theirs = (one._marks + [one._setting] for one in (self, other))
        return mine == theirs and torch.equal(self._values, other._values)

    __hash__ = None  # type: ignore[assignment]  # weights change


def _mark(tensor: Tensor) -> tuple[object, ...]:
    version = None if tensor.is_inference() else tensor._version
    return id(tensor), tensor.data_ptr(), version, tensor.requires_grad, tensor.dtype, tensor.device


@torch.no_grad()
def _sampled(tensors: list[Tensor]) -> Tensor:
    """Return the first values of all tensors in CPU memory, as one tensor. From other devices a copy would be slow."""
    rows: defaultdict[torch.dtype, list[Tensor]] = defaultdict(list)  # Each call of `generate` waits for this.
    for tensor in tensors:
        if tensor.device.type == "cpu" and tensor.numel():
            rows[tensor.dtype].append(_first_values(tensor))
    return torch.cat([torch.empty(0), *(torch.cat(values).to(torch.float64) for values in rows.values())]).nan_to_num()


def _first_values(tensor: Tensor) -> Tensor:
    if type(tensor) in (Tensor, nn.Parameter) and tensor.dim():  # Other classes may store values elsewhere.
        return tensor.as_strided((min(tensor.shape[-1], _SAMPLED),), (tensor.stride(-1),))
    return (tensor[(0,) * (tensor.dim() - 1)] if tensor.dim() else tensor[None])[:_SAMPLED]
