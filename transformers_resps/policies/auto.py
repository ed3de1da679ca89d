"""What `policy="auto"` means, and where policies that calls name keep what they learned between calls."""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch

from .base import Policy
from .guard import BaselineGuard
from .throughput import ThroughputPolicy


def default_policy() -> Policy:
    """The policy that "auto" stands for. It needs no training."""
    return BaselineGuard(ThroughputPolicy())


class PolicyCache:
    """The policies of one target that calls named, one for each head and key, kept as long as target and head exist.

    What a policy learned affects speed, never the output. An attached model owns one as `policy_cache`.
    """

    def __init__(self) -> None:
        self._policies: WeakKeyDictionary[Any, dict[Hashable, Policy]] = WeakKeyDictionary()

    @staticmethod
    def key(
        target: Any, rows: int, name: str = "auto", compile: bool | str | None = None, invariant: bool | None = None
    ) -> Hashable:
        """The policy's name, and what a step's cost depends on: device, dtype and threads now, rows of the batch,
        whether steps run compiled, and whether they are invariant.
        """
        return name, target.device, target.dtype, torch.get_num_threads(), rows, compile or False, invariant or False

    @contextmanager
    def borrow(
        self, head: object | None, key: Hashable, make: Callable[[], Policy] = default_policy
    ) -> Iterator[Policy]:
        """Lend the policy that learned with `head` under this key, or one that `make` makes, and keep it afterwards.

        A second call that runs at the same time, for instance in another thread, gets a fresh one.
        """
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
