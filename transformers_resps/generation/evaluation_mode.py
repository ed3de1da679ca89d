"""Evaluation mode for the time of a call, for models that train."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

from torch.nn import Module


class EvaluationMode:
    """Takes layers out of training mode while calls run, and puts them back after the last one.

    Calls of several threads may overlap: none may train a layer that another one still runs.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._calls = 0
        self._training: list[Module] = []

    @contextmanager
    def held(self, *models: Any) -> Iterator[None]:
        """Keep all layers of `models` in evaluation mode inside the `with` block; `None` is skipped."""
        with self._lock:
            self._calls += 1
            modules = [module for model in models if model is not None for module in model.modules()]
            self._training += [module for module in modules if module.training]
            for module in modules:
                module.training = False
        try:
            yield
        finally:
            with self._lock:
                self._calls -= 1
                if not self._calls:
                    for module in self._training:
                        module.training = True
                    self._training.clear()

    def __reduce__(self) -> tuple[type["EvaluationMode"], tuple[()]]:
        """A copied or pickled model has no calls yet."""
        return EvaluationMode, ()
