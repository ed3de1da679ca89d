"""A function that `torch.compile` compiles with the weights inside, once for all sizes of its inputs.

Inductor lays the weights out for few rows and puts them into the graph ("freezing"): SmolLM2's forward in bfloat16
then runs near the memory limit of a CPU. They are constants from then on: see `WeightFingerprint`.
"""

import logging
import types
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .packages import ModulePackages, PackagedCode
from .pages import collapse


logger = logging.getLogger(f"transformers.{__name__}")

# As options of `torch.compile` they come too late: weights become constants before these are read. Layers that read
# the same input are multiplied at once, which takes a twelfth off a step of SmolLM2; on a CPU C++ calls the kernels,
# which takes off a seventh. What is computed of three tensors and read by several layers is kept, as the cosines of
# positions: by default every head of every layer computes them anew.
_INDUCTOR = {"freezing": True, "cpp.enable_concat_linear": True, "realize_reads_threshold": 2}

# Fused operators would hand on what they have not rounded yet, and what is fused depends on what else the code gives:
# Gemma 3 rounded otherwise where its hidden states were outputs.
_AS_EAGER = {"emulate_precision_casts": True}

# What `torch.export` and AOTInductor raise. They trace less than `torch.compile`, which is then tried.
_UNPACKAGED = (RuntimeError, OSError, ValueError, TypeError, AttributeError, LookupError, AssertionError)

# Of each tensor, the dimensions whose sizes change from call to call.
DynamicSizes = Sequence[Sequence[int]]
_Key = tuple[Hashable, Hashable]


class CompiledFunction:
    """Compiles at the first call; sizes in `dynamic` dimensions may then change at every call.

    Args:
        function: tensors -> tensors, without gradients and without branches on values.
        dynamic: of its inputs. A size of 1 is compiled apart from all others.
        dynamic_buffers: of every buffer.
        options: of `torch.compile`, in place of inductor with freezing.
        is_invariant: whether a row gets the same bits whatever others there are. Every operator then rounds its
            result in low precision, as eager code does.
        packages: keep the code for later processes, under `name`.

    The caller must drop the object when what the function reads besides its inputs has changed, as weights do:
    compiled code does not look (see `_guards_on_inputs`).
    """

    def __init__(
        self,
        function: Callable[..., Any],
        dynamic: DynamicSizes,
        dynamic_buffers: Sequence[int] = (),
        options: dict[str, Any] | None = None,
        packages: ModulePackages | None = None,
        name: str = "",
        *,
        is_invariant: bool = False,
    ) -> None:
        self._function, self._options = function, options
        self._inductor = _INDUCTOR | (_AS_EAGER if is_invariant else {})
        self._is_invariant, self._packages, self._name = is_invariant, packages, name
        self._dynamic, self._dynamic_buffers = dynamic, dynamic_buffers
        self._compiled: dict[_Key, Callable[..., Any]] = {}

    def __call__(self, inputs: Sequence[Tensor], buffers: Sequence[Tensor] = ()) -> Any:
        """Run `function(*inputs, *buffers)`; compile it first, where sizes are new."""
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
                logger.info(f"Compiled code of {self._name} ends with this process: {reason}")
            else:
                outputs = code(*tensors)
                self._compiled[key] = code
                return outputs
        compiled, outputs = self._compile(tensors, sizes)
        self._compiled[key] = compiled  # not before: compiling may be interrupted
        return outputs

    def run_packaged(
        self, inputs: Sequence[Tensor], buffers: Sequence[Tensor], settings: Hashable | None = None
    ) -> Any:
        """As a call, by packaged code alone, which is never traced again; `None` where none serves these sizes.

        `settings` are the `callers_settings` of now, where the caller knows them.
        """
        code = self._compiled.get(self._key(inputs, settings))
        if not isinstance(code, _Packaged):
            return None
        tensors = [*(part.contiguous() for part in inputs), *buffers]  # no guard asks for strides
        return code(*tensors) if code.fits(tensors) else None

    def _compile(self, tensors: Sequence[Tensor], sizes: DynamicSizes) -> tuple[Callable[..., Any], Any]:
        """Compile for this process; returns code and its first outputs."""
        for part, dimensions in zip(tensors, sizes, strict=True):
            for dimension in dimensions:
                if part.shape[dimension] > 1:
                    torch._dynamo.mark_dynamic(part, dimension)
        options = self._options  # made anew each time: `torch.compile` takes its filter out of them
        if options is None:
            options = {"fullgraph": True, "options": {"guard_filter_fn": _guards_on_inputs}}
        compiled = torch.compile(_with_own_code(self._function), **options)
        settings = self._inductor | {"cpp_wrapper": tensors[0].device.type == "cpu"}
        with torch._inductor.config.patch(settings), _constants_in_huge_pages(), _without_advice():
            return compiled, compiled(*tensors)

    def _compile_package(self, tensors: Sequence[Tensor], sizes: DynamicSizes, setting: str) -> "_Packaged":
        """Compile for later processes as well."""
        assert self._packages is not None
        outputs: list[Any] = []

        def function(*tensors: Tensor) -> list[Tensor]:
            outputs[:] = [self._function(*tensors)]
            return [leaf for leaf in tree_leaves(outputs[0]) if isinstance(leaf, Tensor)]

        with _without_advice():
            arguments = self._name, setting, function, tensors, sizes, self._inductor
            code = self._packages.compile(*arguments, alike=self._is_invariant)
        return _Packaged(code, outputs[0])

    def _are_packaged(self, inputs: Sequence[Tensor]) -> bool:
        return self.needs_compiler(inputs) and self._packages is not None and self._packages.are_kept

    def load(self, inputs: Sequence[Tensor], buffers: Sequence[Tensor], outputs: Any) -> bool:
        """Take code for inputs of these sizes from a package, if one lies ready. `outputs` are the function's."""
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
        """Forget code for inputs of these sizes that was loaded, and remove its package."""
        assert self._packages is not None
        self._compiled.pop(self._key(inputs), None)
        self._packages.discard(self._name, self._setting(inputs, buffers), reason)

    def needs_compiler(self, inputs: Sequence[Tensor]) -> bool:
        """Whether a C++ compiler is called for such inputs, where no code lies ready."""
        return self._options is None and inputs[0].device.type == "cpu"

    def is_compiled_for(self, inputs: Sequence[Tensor]) -> bool:
        """Whether there is code for inputs of these sizes under some settings."""
        sizes = self._sizes(inputs)
        return any(key[0] == sizes for key in self._compiled)

    def is_ready(self, inputs: Sequence[Tensor], buffers: Sequence[Tensor] = ()) -> bool:
        """Whether inputs of these sizes run without compilation."""
        code = self._compiled.get(self._key(inputs))
        return code is not None and _serves(code, [*inputs, *buffers])

    def _key(self, inputs: Sequence[Tensor], settings: Hashable | None = None) -> _Key:
        """What must be equal for two calls to run the same code: all sizes, the changing ones only as one or more, and
        the caller's settings.
        """
        return self._sizes(inputs), settings or callers_settings(inputs[0].device.type)

    def _sizes(self, inputs: Sequence[Tensor]) -> tuple[tuple[int, ...], ...]:
        all_sizes = []
        for part, dimensions in zip(inputs, self._dynamic, strict=True):
            sizes = list(part.shape)
            for dimension in dimensions:
                sizes[dimension] = min(sizes[dimension], 2)
            all_sizes.append(tuple(sizes))
        return tuple(all_sizes)

    def _setting(self, inputs: Sequence[Tensor], buffers: Sequence[Tensor]) -> str:
        """The same in words, for other processes. Packaged code serves in inference mode and outside."""
        fixed = [[size for i, size in enumerate(part.shape) if i not in self._dynamic_buffers] for part in buffers]
        dtypes = [str(part.dtype) for part in (*inputs, *buffers)]
        _, *settings = callers_settings(inputs[0].device.type)
        return f"{self._sizes(inputs)}, {fixed}, {dtypes}, {settings}"


class _Packaged:
    """Packaged code as the function that it was made of, which returns such nested `outputs`."""

    def __init__(self, code: PackagedCode, outputs: Any) -> None:
        self._code, self._nested, self.fits = code, _nesting(outputs), code.fits

    def __call__(self, *tensors: Tensor) -> Any:
        return self._nested(iter(self._code(*tensors)))


def _nesting(outputs: Any) -> Callable[[Iterator[Tensor]], Any]:
    """What takes tensors from an iterator and nests them as these outputs are.

    PyTorch's `tree_unflatten` takes several times as long, at each step.
    """
    if isinstance(outputs, Tensor):
        return next
    if isinstance(outputs, dict):
        named = {name: _nesting(part) for name, part in outputs.items()}
        return lambda tensors: {name: part(tensors) for name, part in named.items()}
    if not isinstance(outputs, list | tuple):
        return lambda _: outputs
    parts, make = [_nesting(part) for part in outputs], getattr(outputs, "_make", type(outputs))
    return lambda tensors: make(part(tensors) for part in parts)


def _serves(code: Callable[..., Any], tensors: Sequence[Tensor]) -> bool:
    return code.fits(tensors) if isinstance(code, _Packaged) else True


@contextmanager
def _constants_in_huge_pages() -> Iterator[None]:
    """Move what inductor lays out inside the `with` block: each step reads it once."""
    from torch._inductor.codecache import PyCodeCache  # loads the compiler

    # Not a public place. Where it is another, constants stay in small pages.
    modules: list[types.ModuleType] = getattr(PyCodeCache, "modules", [])
    known = len(modules)
    yield
    constants = (value for module in modules[known:] for value in vars(module).values())
    collapse(value for value in constants if isinstance(value, Tensor))


@contextmanager
def _without_advice() -> Iterator[None]:
    """Inside, inductor does not tell of each operator that it calls in a slower way from C++; no user can help it."""
    compiler = logging.getLogger("torch._inductor.ir")
    compiler.addFilter(_is_no_advice)
    try:
        yield
    finally:
        compiler.removeFilter(_is_no_advice)


def _is_no_advice(record: logging.LogRecord) -> bool:
    return "c-shim" not in str(record.msg)


def _dense(part: Tensor) -> Tensor:
    """With the strides of a new tensor: of a dimension of size 1 a view may have any, and other code would run."""
    stride, expected = 1, list[int]()
    for size in reversed(part.shape):
        expected.insert(0, stride)
        stride *= max(size, 1)
    return part if list(part.stride()) == expected else part.clone(memory_format=torch.contiguous_format)


def callers_settings(device_type: str) -> tuple[Any, ...]:
    """Of a caller, what is compiled in: no guard asks for it. To look takes as long as some operators of a step."""
    backends: list[Any] = [torch.backends.cuda, torch.backends.mkldnn]
    return (
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type),
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        *(one.matmul.fp32_precision for one in backends),  # of which torch's common getter raises if they differ
    )


def _guards_on_inputs(guards: Sequence[Any]) -> list[bool]:
    """Keep what compiled code asks of its inputs before it runs, and leave out all else.

    Of modules there are hundreds of guards, which take as long as a layer. Others ask how many classes of models
    Transformers has met: with one more, PyTorch compiles anew inside a step, and without freezing.
    """
    of_tensors = torch.compiler.keep_tensor_guards_unsafe(guards)
    return [kept or guard.guard_type == "SHAPE_ENV" for kept, guard in zip(of_tensors, guards, strict=True)]


def _with_own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of `function` with a code object of its own.

    `torch.compile` finds compiled code by the code object and by guards. Two closures of one `def` share it: with so
    few guards one model would run the other's weights, and a call under autocast what was compiled without.
    """
    assert isinstance(function, types.FunctionType)
    code = function.__code__.replace()
    copied = types.FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied
