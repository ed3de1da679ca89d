"""Compile a function once for all sizes of its inputs, with the weights as constants of the code.

Inductor makes the weights constants and stores them in a layout that is fast for few rows ("freezing"): SmolLM2's
forward in bfloat16 then nearly reaches a CPU's memory bandwidth. If weights change, code must be compiled again: see
`WeightFingerprint`.
"""

import logging
import types
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .captured import Outputs
from .packages import CompileJob, ModulePackages, PackagedCode, packages_folder
from .pages import collapse


logger = logging.getLogger(f"transformers.{__name__}")

# Inductor's settings. They are patched in, since options of `torch.compile` apply only after weights became constants.
# Joining linear layers with the same input saves a twelfth of the time of SmolLM2's step; calling kernels from C++ on
# CPUs saves a seventh (`cpp_wrapper` below). `realize_reads_threshold` makes code store values that many layers read,
# such as cosines of positions: by default every head of every layer computes them again.
_INDUCTOR = {"freezing": True, "cpp.enable_concat_linear": True, "realize_reads_threshold": 2}

# Round after every operator, as eager code does. Fused operators do not round intermediate values, and which operators
# are fused depends on the outputs: Gemma 3's logits changed when its hidden states were also returned.
_AS_EAGER = {"emulate_precision_casts": True}

# Errors of `torch.export` and AOTInductor. They support fewer functions than `torch.compile`, which is tried next.
_UNPACKAGED = (RuntimeError, OSError, ValueError, TypeError, AttributeError, LookupError, AssertionError)

# For each tensor, the dimensions whose sizes change from call to call.
DynamicSizes: TypeAlias = Sequence[Sequence[int]]
_Sizes: TypeAlias = tuple[tuple[int, ...], ...]
_Function: TypeAlias = Callable[..., Outputs]


class CompiledFunction:
    """Compiles `function` at the first call. The sizes of its `dynamic` dimensions may change at every later call.

    Compiled code ignores changes of the weights (see `_guards_on_inputs`): after a change, make a new object.

    `function` maps tensors to tensors, without gradients and without branches on values. `dynamic` lists for each
    input the dimensions whose sizes may change, and `dynamic_buffers` lists them for all buffers; a size of 1 gets
    separate code. `options` are arguments of `torch.compile`; the default is inductor with freezing. `packages`
    store the code under `name` for later processes. With `is_invariant`, the result of a row must not depend on other
    rows, not even in its last bits. Every operator then rounds its result to low precision, like eager code. Packaged
    code rounds weights in bfloat16 to `bits` (8 or 4) if our kernels can read such weights.
    """

    def __init__(
        self,
        function: _Function,
        dynamic: DynamicSizes,
        dynamic_buffers: Sequence[int] = (),
        options: dict[str, Any] | None = None,
        packages: ModulePackages | None = None,
        name: str = "",
        *,
        is_invariant: bool = False,
        bits: int = 16,
    ) -> None:
        self._function, self._options = function, options
        self._inductor = _INDUCTOR | (_AS_EAGER if is_invariant else {})
        self._is_invariant, self._bits, self._packages, self._name = is_invariant, bits, packages, name
        self._dynamic, self._dynamic_buffers = dynamic, dynamic_buffers
        self._compiled: dict[tuple[_Sizes, Hashable], _Function] = {}

    def __call__(self, inputs: Sequence[Tensor], buffers: Sequence[Tensor] = ()) -> Outputs:
        """Run `function(*inputs, *buffers)`; compile it first if the sizes are new."""
        key, tensors = self._key(inputs), [*(_dense(part) for part in inputs), *buffers]
        code = self._compiled.get(key)
        if code is not None and _serves(code, tensors):
            return code(*tensors)
        sizes = [*self._dynamic, *[self._dynamic_buffers] * len(buffers)]
        if code is None and self._are_packaged(inputs):
            try:
                code = self._compile_package(tensors, sizes, self._setting(inputs, buffers))
            except _UNPACKAGED as fault:
                reason = str(fault).partition("\n")[0]
                if self._bits < 16 or (self._packages is not None and self._packages.hold_few_bits):
                    raise RuntimeError(f"weights of few bits need code that can be stored, and {reason}") from fault
                logger.info(f"Compiled code of {self._name} ends with this process: {reason}")
            else:
                outputs = code(*tensors)
                self._compiled[key] = code
                return outputs
        compiled, outputs = self._compile(tensors, sizes)
        self._compiled[key] = compiled  # not earlier, since compiling may be interrupted
        return outputs

    def run_packaged(
        self, inputs: Sequence[Tensor], buffers: Sequence[Tensor], settings: Hashable | None = None
    ) -> Outputs | None:
        """Run code from a package that is already loaded, without compiling; `None` if there is none for these sizes.

        `settings` is the result of `callers_settings`, which is called if `None`.
        """
        code = self._compiled.get(self._key(inputs, settings))
        if not isinstance(code, _Packaged):
            return None
        tensors = [*(part.contiguous() for part in inputs), *buffers]  # Packaged code does not check strides.
        return code(*tensors) if code.fits(tensors) else None

    def _compile(self, tensors: Sequence[Tensor], sizes: DynamicSizes) -> tuple[_Function, Outputs]:
        """Compile by `torch.compile`, without storing the code; return the code and its outputs for `tensors`."""
        for part, dimensions in zip(tensors, sizes, strict=True):
            for dimension in dimensions:
                if part.shape[dimension] > 1:
                    torch._dynamo.mark_dynamic(part, dimension)
        # The default is a new dict each time, since `torch.compile` removes the filter from the dict.
        options = self._options or {"fullgraph": True, "options": {"guard_filter_fn": _guards_on_inputs}}
        compiled = torch.compile(_with_own_code(self._function), **options)
        settings = self._inductor | {"cpp_wrapper": tensors[0].device.type == "cpu"}
        with torch._inductor.config.patch(settings), _constants_in_huge_pages(), _without_advice():
            return compiled, compiled(*tensors)

    def _compile_package(self, tensors: Sequence[Tensor], sizes: DynamicSizes, setting: str) -> "_Packaged":
        """Compile code and store it as a package, which later processes can load."""
        assert self._packages is not None
        outputs: list[Outputs] = []

        def function(*tensors: Tensor) -> list[Tensor]:
            outputs[:] = [self._function(*tensors)]
            return [leaf for leaf in tree_leaves(outputs[0]) if isinstance(leaf, Tensor)]

        job = CompileJob(function, tensors, sizes, self._inductor, self._is_invariant, self._bits)
        with _without_advice():
            code = self._packages.compile(self._name, setting, job)
        return _Packaged(code, outputs[0])

    def _are_packaged(self, inputs: Sequence[Tensor]) -> bool:
        return self.needs_compiler(inputs) and self._packages is not None and packages_folder() is not None

    def load(self, inputs: Sequence[Tensor], buffers: Sequence[Tensor], outputs: Outputs) -> bool:
        """Load the package for these sizes of the arguments; return whether that worked. `outputs` is an example."""
        key = self._key(inputs)
        if key in self._compiled or not self._are_packaged(inputs):
            return False
        assert self._packages is not None
        code = self._packages.load(self._name, self._setting(inputs, buffers))
        if code is None or not code.fits([*inputs, *buffers]):
            return False
        self._compiled[key] = _Packaged(code, outputs)
        return True

    def discard(self, inputs: Sequence[Tensor], buffers: Sequence[Tensor], reason: str) -> None:
        """Drop the code that was loaded for these sizes, remove its package, and log the `reason` as a warning."""
        assert self._packages is not None
        self._compiled.pop(self._key(inputs), None)
        self._packages.discard(self._name, self._setting(inputs, buffers), reason)

    def needs_compiler(self, inputs: Sequence[Tensor]) -> bool:
        """Whether compiling code for these inputs needs a C++ compiler."""
        return self._options is None and inputs[0].device.type == "cpu"

    def is_compiled_for(self, inputs: Sequence[Tensor]) -> bool:
        """Whether code for these sizes was compiled, even if under other PyTorch settings than the present ones."""
        return self._sizes(inputs) in {sizes for sizes, _ in self._compiled}

    def is_ready(self, inputs: Sequence[Tensor], buffers: Sequence[Tensor] = ()) -> bool:
        """Whether inputs of these sizes run without compiling."""
        code = self._compiled.get(self._key(inputs))
        return code is not None and _serves(code, [*inputs, *buffers])

    def _key(self, inputs: Sequence[Tensor], settings: Hashable | None = None) -> tuple[_Sizes, Hashable]:
        """Return the key in `_compiled` of the code for these inputs: their sizes, and PyTorch settings."""
        return self._sizes(inputs), settings or callers_settings(inputs[0].device.type)

    def _sizes(self, inputs: Sequence[Tensor]) -> _Sizes:
        """Return all sizes of the inputs, with 2 in place of larger sizes that may change: these share code."""
        all_sizes = []
        for part, dimensions in zip(inputs, self._dynamic, strict=True):
            sizes = list(part.shape)
            for dimension in dimensions:
                sizes[dimension] = min(sizes[dimension], 2)
            all_sizes.append(tuple(sizes))
        return tuple(all_sizes)

    def _setting(self, inputs: Sequence[Tensor], buffers: Sequence[Tensor]) -> str:
        """Describe the sizes, dtypes and PyTorch settings for which a package is made, without inference mode."""
        fixed = [[size for i, size in enumerate(part.shape) if i not in self._dynamic_buffers] for part in buffers]
        dtypes = [str(part.dtype) for part in (*inputs, *buffers)]
        _, *settings = callers_settings(inputs[0].device.type)
        return f"{self._sizes(inputs)}, {fixed}, {dtypes}, {settings}"


class _Packaged:
    """Calls code from a package, and nests its output tensors like those in the example `outputs`."""

    def __init__(self, code: PackagedCode, outputs: Outputs) -> None:
        self._code, self._nested, self.fits = code, _nesting(outputs), code.fits

    def __call__(self, *tensors: Tensor) -> Outputs:
        return self._nested(iter(self._code(*tensors)))


def _nesting(outputs: Outputs) -> Callable[[Iterator[Tensor]], Outputs]:
    """Return a function that nests tensors like `outputs`. It is faster than `tree_unflatten`."""
    if isinstance(outputs, Tensor):
        return next
    if isinstance(outputs, dict):
        named = {name: _nesting(part) for name, part in outputs.items()}
        return lambda tensors: {name: part(tensors) for name, part in named.items()}
    if not isinstance(outputs, list | tuple):
        return lambda _: outputs
    parts, make = [_nesting(part) for part in outputs], getattr(outputs, "_make", type(outputs))
    return lambda tensors: make(part(tensors) for part in parts)


def _serves(code: _Function, tensors: Sequence[Tensor]) -> bool:
    return not isinstance(code, _Packaged) or code.fits(tensors)


@contextmanager
def _constants_in_huge_pages() -> Iterator[None]:
    """Move weights that inductor rearranges in the `with` block to huge pages, since every step reads all weights."""
    from torch._inductor.codecache import PyCodeCache  # loads the compiler

    # A private attribute. Where a release lacks it, constants stay in small pages.
    modules: list[types.ModuleType] = getattr(PyCodeCache, "modules", [])
    known = len(modules)
    yield
    constants = (value for module in modules[known:] for value in vars(module).values())
    collapse(value for value in constants if isinstance(value, Tensor))


@contextmanager
def _without_advice() -> Iterator[None]:
    """Silence inductor's warnings about operators that are slow to call from C++, since users cannot change this."""

    def is_no_advice(record: logging.LogRecord) -> bool:
        return "c-shim" not in str(record.msg)

    compiler = logging.getLogger("torch._inductor.ir")
    compiler.addFilter(is_no_advice)
    try:
        yield
    finally:
        compiler.removeFilter(is_no_advice)


def _dense(part: Tensor) -> Tensor:
    """Return the tensor, or a copy if any stride, even at size 1, is not contiguous: PyTorch would compile again."""
    stride, expected = 1, list[int]()
    for size in reversed(part.shape):
        expected.insert(0, stride)
        stride *= max(size, 1)
    return part if list(part.stride()) == expected else part.clone(memory_format=torch.contiguous_format)


def callers_settings(device_type: str) -> tuple[Hashable, ...]:
    """Return the PyTorch settings that compiled code assumes but does not check. Takes as long as a few operators."""
    return (
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type),
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cuda.matmul.fp32_precision,  # PyTorch's common getter raises if these two differ
        torch.backends.mkldnn.matmul.fp32_precision,  # type: ignore[attr-defined]
    )


def _guards_on_inputs(guards: Sequence[Any]) -> list[bool]:
    """Return for each guard (a check before compiled code runs) whether to keep it: only guards on inputs are kept.

    Hundreds of guards on modules would take as long as a layer. Other guards check how many model classes Transformers
    has loaded: after loading another model, PyTorch would compile again during a step, and without freezing.
    """
    of_tensors = torch.compiler.keep_tensor_guards_unsafe(guards)
    return [kept or guard.guard_type == "SHAPE_ENV" for kept, guard in zip(of_tensors, guards, strict=True)]


def _with_own_code(function: _Function) -> _Function:
    """Copy a function and its code object.

    `torch.compile` finds compiled code by code object and by guards. All closures of one `def` share a code object,
    and few guards are kept: a model would run code with another model's weights, and autocast would have no effect.
    """
    assert isinstance(function, types.FunctionType)
    code = function.__code__.replace()
    copied = types.FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied
