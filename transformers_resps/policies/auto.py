"""The policy "auto", and the cache that keeps a target's policies between calls of `generate`."""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch

from .base import Policy
from .guard import BaselineGuard
from .throughput import ThroughputPolicy


def default_policy() -> Policy:
    """Make a new policy "auto", which needs no training."""
    return BaselineGuard(ThroughputPolicy())


class PolicyCache:
    """Keeps a target's policies between calls: one for each head and key. Deleting a head deletes its policies."""

    def __init__(self) -> None:
        self._policies: WeakKeyDictionary[Any, dict[Hashable, Policy]] = WeakKeyDictionary()

    @staticmethod
    def key(
        target: Any, rows: int, name: str = "auto", compile: bool | str | None = None, invariant: bool | None = None
    ) -> Hashable:
        """Return the key under which a target keeps a policy: its name and all settings that change a step's cost."""
        return name, target.device, target.dtype, torch.get_num_threads(), rows, compile or False, invariant or False

    @contextmanager
    def borrow(
        self, head: object | None, key: Hashable, make: Callable[[], Policy] = default_policy
    ) -> Iterator[Policy]:
        """Yield the policy kept for head and key; `make` another if none is kept or another thread is using it."""
        policies = self._policies.setdefault(self if head is None else head, {})
        policy = policies.pop(key, None) or make()
        try:
            yield policy
        finally:
            policies[key] = policy

    def clear(self) -> None:
        self._policies.clear()

    def __reduce__(self) -> tuple[type["PolicyCache"], tuple[()]]:
        """Make every copy and pickle an empty cache, so that a copied target starts with new policies."""
        return PolicyCache, ()
