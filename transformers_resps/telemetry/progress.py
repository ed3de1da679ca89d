"""Moves a progress bar while a model decodes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import nn


class Bar(Protocol):
    """What is moved: a `tqdm`, for example."""

    def update(self, n: int) -> Any: ...


@contextmanager
def moving(bar: Bar, model: nn.Module, rows: int, most_steps: int) -> Iterator[None]:
    """Inside, `bar` moves by `rows`, evenly over the forwards that a batch of so many rows takes at most.

    What is left when the batch ends early is made up at the end.
    """
    steps = shown = 0

    def move(*_: Any) -> None:
        nonlocal steps, shown
        steps += 1
        reached = rows * min(steps, most_steps) // most_steps
        bar.update(reached - shown)
        shown = reached

    handle = model.register_forward_hook(move)
    try:
        yield
        bar.update(rows - shown)
    finally:
        handle.remove()
