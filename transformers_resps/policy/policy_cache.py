"""What `policy="auto"` means, and where it keeps what it learned between calls of `generate`."""

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch

from .guard import BaselineGuard
from .policy import Policy
from .throughput import ThroughputPolicy


_ATTRIBUTE = "_resps_kept_policies"


def default_policy() -> Policy:
    """The policy that "auto" stands for. It needs no training."""
    return BaselineGuard(ThroughputPolicy())


class _NoHead:
    """The key of calls without a head."""


class PolicyCache:
    """The default policies of one target, one for each head and place, kept as long as target and head exist.

    A place is what the cost of a step depends on: device, dtype, threads and rows of the batch. What a policy learned
    affects speed, never the output. A second call that runs at the same time does not share the policy: it starts with
    a fresh one.
    """

    def __init__(self) -> None:
        self._no_head = _NoHead()
        self._policies: WeakKeyDictionary[Any, dict[Hashable, Policy]] = WeakKeyDictionary()

    @classmethod
    def of(cls, target: Any) -> "PolicyCache":
        """Those that a model keeps."""
        kept: PolicyCache = target.__dict__.setdefault(_ATTRIBUTE, cls())
        return kept

    @staticmethod
    def place(target: Any, rows: int) -> Hashable:
        """Where a batch of `rows` is decoded now."""
        return target.device, target.dtype, torch.get_num_threads(), rows

    @staticmethod
    @contextmanager
    def set_aside(target: Any) -> Iterator[None]:
        """Inside, `target` keeps none; afterwards those that it had."""
        kept = target.__dict__.pop(_ATTRIBUTE, None)
        try:
            yield
        finally:
            if kept is not None:
                target.__dict__[_ATTRIBUTE] = kept

    @staticmethod
    def forget(target: Any) -> None:
        target.__dict__.pop(_ATTRIBUTE, None)

    def take(self, head: object | None, place: Hashable) -> Policy:
        """The policy that learned with `head` at this place, or a fresh one."""
        return self._policies.get(self._key(head), {}).pop(place, None) or default_policy()

    def give_back(self, head: object | None, place: Hashable, policy: Policy) -> None:
        self._policies.setdefault(self._key(head), {})[place] = policy

    def _key(self, head: object | None) -> object:
        return self._no_head if head is None else head

    def __reduce__(self) -> tuple[type["PolicyCache"], tuple[()]]:
        """A copied or pickled target starts anew."""
        return PolicyCache, ()
