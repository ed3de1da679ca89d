"""A function whose launches a CUDA graph repeats, captured once for each size of its inputs."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


_WARM_UPS = 3  # before a capture, so that libraries have chosen kernels and made their workspaces


class CapturedFunction:
    """Captures at the first call with inputs of some sizes, and replays at later ones: one launch.

    Args:
        function: tensors -> tensors on one CUDA device, without gradients, host reads and branches on values. What it
            reads besides its inputs must stay where it is.

    The outputs are overwritten by the next call with inputs of the same sizes.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._captured: dict[tuple[torch.Size, ...], _Capture] = {}
        self._places: list[int] = []  # addresses of the buffers, which graphs have fixed
        self._pool: Any = None  # graphs of one function share memory: they never run at the same time

    def __call__(self, inputs: Sequence[Tensor], buffers: Sequence[Tensor] = ()) -> Any:
        """Run `function(*inputs, *buffers)`, by a graph that is captured first where sizes are new.

        Args:
            inputs: are copied to where the graph reads.
            buffers: are read and written in place.
        """
        if not self.is_ready(inputs, buffers):
            places = [part.data_ptr() for part in buffers]
            if places != self._places:
                self._captured, self._places = {}, places
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            self._captured[_sizes(inputs, buffers)] = _Capture(self._function, inputs, buffers, self._pool)
        return self._captured[_sizes(inputs, buffers)].replay(inputs)

    def is_ready(self, inputs: Sequence[Tensor], buffers: Sequence[Tensor] = ()) -> bool:
        """Whether a graph for these buffers and for inputs of these sizes is there."""
        return _sizes(inputs, buffers) in self._captured and [part.data_ptr() for part in buffers] == self._places


def _sizes(inputs: Sequence[Tensor], buffers: Sequence[Tensor]) -> tuple[torch.Size, ...]:
    return (*(part.shape for part in inputs), *(part.shape for part in buffers[:1]))


class _Capture:
    """One graph, the inputs that it reads and the outputs that it writes."""

    def __init__(
        self, function: Callable[..., Any], inputs: Sequence[Tensor], buffers: Sequence[Tensor], pool: Any
    ) -> None:
        self._inputs = [part.clone() for part in inputs]
        current, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            for _ in range(_WARM_UPS):
                function(*self._inputs, *buffers)
        current.wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self._outputs = function(*self._inputs, *buffers)

    def replay(self, inputs: Sequence[Tensor]) -> Any:
        torch._foreach_copy_(self._inputs, list(inputs))
        self._graph.replay()
        return self._outputs
