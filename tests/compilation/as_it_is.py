"""Compiled code that is the function itself: what calls it can be tried in milliseconds."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from torch import Tensor

from transformers_resps.compilation.compiled import CompiledFunction
from transformers_resps.drafting import engine
from transformers_resps.verifying.slots import engine as slots


class AsItIs(CompiledFunction):
    """Needs no compilation."""

    def __init__(self, function: Callable[..., Any], *args: Any, **options: Any) -> None:
        self.function = function

    def is_ready(self, inputs: Sequence[Tensor], buffers: Sequence[Tensor] = ()) -> bool:
        return True

    def run_packaged(self, inputs: Sequence[Tensor], buffers: Sequence[Tensor], settings: Any = None) -> Any:
        return None

    def __call__(self, inputs: Sequence[Tensor], buffers: Sequence[Tensor] = ()) -> Any:
        return self.function(*inputs, *buffers)


class Forwards(AsItIs):
    """Of the target. Notes the shapes of tokens and logits."""

    noted: ClassVar[list[tuple[torch.Size, torch.Size]]] = []

    def __call__(self, inputs: Sequence[Tensor], buffers: Sequence[Tensor] = ()) -> Any:
        outputs = super().__call__(inputs, buffers)
        self.noted.append((inputs[0].shape, outputs[0].shape))
        return outputs


@contextmanager
def compiled_as_it_is() -> Iterator[list[tuple[torch.Size, torch.Size]]]:
    """Inside, what is compiled on a CPU runs as it is. Yields the shapes of the target's forwards."""
    Forwards.noted.clear()
    with patch.object(slots, "CompiledFunction", Forwards), patch.object(engine, "CompiledFunction", AsItIs):
        yield Forwards.noted
