"""A function that `torch.compile` compiles with the weights inside, once for all sizes of its inputs.

Inductor lays the weights out for few rows and puts them into the graph ("freezing"): SmolLM2's forward in bfloat16
then runs near the memory limit of a CPU. They are constants from then on: see `WeightFingerprint`.
"""

import types
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .pages import collapse


# As options of `torch.compile` they come too late: weights become constants before these are read. Layers that read
# the same input are multiplied at once, which takes a twelfth off a step of SmolLM2; on a CPU C++ calls the kernels,
# which takes off a seventh.
_INDUCTOR = {"freezing": True, "cpp.enable_concat_linear": True}

# Of each tensor, the dimensions whose sizes change from call to call.
DynamicSizes = Sequence[Sequence[int]]


class CompiledFunction:
    """Compiles at the first call; sizes in `dynamic` dimensions may then change at every call.

    Args:
        function: tensors -> tensors, without gradients and without branches on values.
        dynamic: of its inputs. A size of 1 is compiled apart from all others.
        dynamic_buffers: of every buffer.
        options: of `torch.compile`, in place of inductor with freezing.

    The caller must drop the object when what the function reads besides its inputs has changed, as weights do:
    compiled code does not look (see `_guards_on_inputs`).
    """

    def __init__(
        self,
        function: Callable[..., Any],
        dynamic: DynamicSizes,
        dynamic_buffers: Sequence[int] = (),
        options: dict[str, Any] | None = None,
    ) -> None:
        self._function, self._options = function, options
        self._dynamic, self._dynamic_buffers = dynamic, dynamic_buffers
        self._compiled: dict[Hashable, Callable[..., Any]] = {}

    def __call__(self, inputs: Sequence[Tensor], buffers: Sequence[Tensor] = ()) -> Any:
        """Run `function(*inputs, *buffers)`; compile it first, where sizes are new."""
        kind, inputs = self._kind(inputs), [_dense(part) for part in inputs]
        if kind in self._compiled:
            return self._compiled[kind](*inputs, *buffers)
        sizes = [*self._dynamic, *[self._dynamic_buffers] * len(buffers)]
        for part, dimensions in zip([*inputs, *buffers], sizes, strict=True):
            for dimension in dimensions:
                if part.shape[dimension] > 1:
                    torch._dynamo.mark_dynamic(part, dimension)
        options = self._options  # made anew each time: `torch.compile` takes its filter out of them
        if options is None:
            options = {"fullgraph": True, "options": {"guard_filter_fn": _guards_on_inputs}}
        compiled = torch.compile(_with_own_code(self._function), **options)
        settings = _INDUCTOR | {"cpp_wrapper": inputs[0].device.type == "cpu"}
        with torch._inductor.config.patch(settings), _constants_in_huge_pages():
            outputs = compiled(*inputs, *buffers)
        self._compiled[kind] = compiled  # not before: compiling may be interrupted
        return outputs

    @property
    def is_compiled(self) -> bool:
        """Whether there is code for some sizes and settings."""
        return bool(self._compiled)

    def is_ready(self, inputs: Sequence[Tensor], buffers: Sequence[Tensor] = ()) -> bool:
        """Whether inputs of these sizes run without compilation."""
        return self._kind(inputs) in self._compiled

    def _kind(self, inputs: Sequence[Tensor]) -> Hashable:
        """What must be equal for two calls to run the same code: all sizes, the changing ones only as one or more, and
        the caller's settings.
        """
        sizes = tuple(
            tuple(min(size, 2) if index in dimensions else size for index, size in enumerate(part.shape))
            for part, dimensions in zip(inputs, self._dynamic, strict=True)
        )
        return sizes, _callers_settings(inputs[0].device.type)


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


def _dense(part: Tensor) -> Tensor:
    """With the strides of a new tensor: of a dimension of size 1 a view may have any, and other code would run."""
    stride, expected = 1, list[int]()
    for size in reversed(part.shape):
        expected.insert(0, stride)
        stride *= max(size, 1)
    return part if list(part.stride()) == expected else part.clone(memory_format=torch.contiguous_format)


def _callers_settings(device_type: str) -> Hashable:
    """Of a caller, what is compiled in: no guard asks for it."""
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
