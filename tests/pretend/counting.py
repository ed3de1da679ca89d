# mypy: disable-error-code="no-untyped-call"
"""Counts kernels, views and host synchronisations on the pretend device: by region, and by line of the package."""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from .device import PretendTensor, held, is_there, run


_ONE_KERNEL = {  # on a GPU; on CPU they come apart
    torch.nn.functional.scaled_dot_product_attention,
    torch.rms_norm,
    torch.nn.functional.rms_norm,
}
_PACKAGE = "/transformers_resps/"


class Count(TorchDispatchMode):
    """Counts while it is entered.

    Attributes:
        kernels: operations that launch one, by region.
        views: operations that launch none, by region.
        waits: host synchronisations, by region. A copy between host and device is one, either way.
        sites: host synchronisations outside the target, by their kind and `file:line` of the package.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.views: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.sites: Counter[tuple[str, str]] = Counter()
        self._region, self._is_paused = "step", False
        self._functions = _Functions(self)

    def __enter__(self) -> Any:
        self._functions.__enter__()
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._functions.__exit__(*exception)

    def enter_region(self, name: str) -> str:
        """Book under another name from now on. Returns the name so far."""
        before, self._region = self._region, name
        return before

    @contextmanager
    def paused(self) -> Iterator[None]:
        before, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = before

    def launched(self, name: str, *, is_view: bool) -> None:
        (self.views if is_view else self.kernels)[self._region] += 1

    def waited(self, kind: str) -> None:
        self.waits[self._region] += 1
        if self._region == "step":
            self.sites[kind, _line()] += 1

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return operation(*args, **kwargs or {}) if self._is_paused else run(operation, args, kwargs or {}, self)


class _Functions(TorchFunctionMode):
    """What the dispatcher never sees, or sees in parts that a GPU runs as one."""

    def __init__(self, count: Count) -> None:
        super().__init__()
        self.count = count

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first: Any = args[0] if args else None
        is_ours = isinstance(first, PretendTensor)
        if is_ours and function in _ONE_KERNEL:
            self.count.launched(function.__name__, is_view=False)
            with self.count.paused():
                return PretendTensor(function(*map(held, args), **{key: held(value) for key, value in kwargs.items()}))
        if function in (torch.tensor, torch.as_tensor) and is_there(kwargs.get("device")) and not is_ours:
            return self._uploaded(function, args, {key: value for key, value in kwargs.items() if key != "device"})
        if is_ours and function is Tensor.tolist:
            self.count.waited("read")
            return first.held.tolist()
        if is_ours and function in (Tensor.__getitem__, Tensor.__setitem__):
            args = (first, self._with_uploaded_lists(args[1]), *args[2:])
        return function(*args, **kwargs)

    def _uploaded(self, function: Any, args: Any, kwargs: Any) -> Tensor:
        with self.count.paused():
            made = function(*args, **kwargs)
        self.count.launched("copy", is_view=False)
        self.count.waited("write")
        return PretendTensor(made)

    def _with_uploaded_lists(self, index: Any) -> Any:
        """An index in which lists are tensors of the device."""
        parts = index if isinstance(index, tuple) else (index,)
        made = tuple(self._uploaded(torch.tensor, (list(part),), {}) if _is_list(part) else part for part in parts)
        return made if isinstance(index, tuple) else made[0]


def _is_list(part: Any) -> bool:
    return isinstance(part, list | range)


def _line() -> str:
    """The innermost line of the package that runs."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _PACKAGE not in frame.f_code.co_filename:
        frame = frame.f_back
    return f"{frame.f_code.co_filename.split(_PACKAGE)[-1]}:{frame.f_lineno}"
