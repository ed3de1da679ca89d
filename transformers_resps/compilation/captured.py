"""Run a function as a CUDA graph, which is captured once for each combination of input sizes."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


Outputs = Any  # tensors, nested as the function returns them

_WARM_UPS = 3  # Runs before a capture, in which libraries choose kernels and allocate their workspaces.


class CapturedFunction:
    """Captures a CUDA graph at the first call with inputs of new sizes, and replays it at later calls in one launch.

    `function` maps tensors to tensors on one CUDA device, without gradients, copies to the host or branches on values.
    Weights that it reads must keep their addresses. The next call with the same sizes overwrites the outputs.
    """

    def __init__(self, function: Callable[..., Outputs]) -> None:
        self._function = function
        self._captured: dict[tuple[torch.Size, ...], tuple[torch.cuda.CUDAGraph, list[Tensor], Outputs]] = {}
        self._addresses: list[int] = []  # addresses of the buffers that the captured graphs use
        # Graphs of one function share memory, since they never run at the same time.
        self._pool: torch.cuda._POOL_HANDLE | None = None

    def __call__(self, inputs: Sequence[Tensor], buffers: Sequence[Tensor] = ()) -> Outputs:
        """Run `function(*inputs, *buffers)` by a graph, and capture the graph first if the sizes are new.

        Inputs are copied into the graph's own input tensors; buffers are read and written in place.
        """
        if not self.is_ready(inputs, buffers):
            addresses = [part.data_ptr() for part in buffers]
            if addresses != self._addresses:
                self._captured, self._addresses = {}, addresses
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            self._captured[_sizes(inputs, buffers)] = self._capture(inputs, buffers)
        graph, own, outputs = self._captured[_sizes(inputs, buffers)]
        torch._foreach_copy_(own, list(inputs))
        graph.replay()
        return outputs

    def _capture(
        self, inputs: Sequence[Tensor], buffers: Sequence[Tensor]
    ) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Outputs]:
        """Capture and return a graph, the input tensors that it reads and the outputs that it writes."""
        own = [part.clone() for part in inputs]
        current, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            for _ in range(_WARM_UPS):
                self._function(*own, *buffers)
        current.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            return graph, own, self._function(*own, *buffers)

    def is_ready(self, inputs: Sequence[Tensor], buffers: Sequence[Tensor] = ()) -> bool:
        """Whether a graph exists for these buffers and for inputs of these sizes."""
        is_captured = _sizes(inputs, buffers) in self._captured
        return is_captured and [part.data_ptr() for part in buffers] == self._addresses


def _sizes(inputs: Sequence[Tensor], buffers: Sequence[Tensor]) -> tuple[torch.Size, ...]:
    return tuple(part.shape for part in (*inputs, *buffers[:1]))
