"""The policy "auto", and the cache that keeps named policies between calls."""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch

from .base import Policy
from .guard import BaselineGuard
from .throughput import ThroughputPolicy


def default_policy() -> Policy:
    """Make the policy "auto", which needs no training."""
    return BaselineGuard(ThroughputPolicy())


class PolicyCache:
    """Keeps the named policies of one target, one for each head and key, as long as target and head exist."""

    def __init__(self) -> None:
        self._policies: WeakKeyDictionary[Any, dict[Hashable, Policy]] = WeakKeyDictionary()

    @staticmethod
    def key(
        target: Any, rows: int, name: str = "auto", compile: bool | str | None = None, invariant: bool | None = None
    ) -> Hashable:
        """Join a policy's name with all that a step's cost depends on."""
        return name, target.device, target.dtype, torch.get_num_threads(), rows, compile or False, invariant or False

    @contextmanager
    def borrow(
        self, head: object | None, key: Hashable, make: Callable[[], Policy] = default_policy
    ) -> Iterator[Policy]:
        """Lend the policy of this head and key, or a new one, also while another thread has it."""
        policies = self._policies.setdefault(self if head is None else head, {})
        policy = policies.pop(key, None) or make()
        try:
            yield policy
        finally:
            policies[key] = policy

    def clear(self) -> None:
        self._policies.clear()

    def __reduce__(self) -> tuple[type["PolicyCache"], tuple[()]]:
        """A copied or pickled target starts anew."""
        return PolicyCache, ()
