"""Change shared attributes during a call, then restore them: names of attention, scans of mixers, training modes."""

from bisect import insort
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, NamedTuple

from torch.nn import Module


class Change(NamedTuple):
    """A change that sets attribute `name` of `owner` to `make(original value)`."""

    owner: Any
    name: str
    make: Callable[[Any], Any]
    rank: int = 0  # if calls overlap, the change of the highest rank wins, then the newest


class _Value(NamedTuple):
    value: Any
    rank: int


@dataclass
class _Loan:
    own: Any  # the value before all calls
    values: list[_Value] = field(default_factory=list)  # one for each running call; the last one is set now


class Lent:
    """Changes attributes while calls run; calls of several threads may overlap.

    When the last call ends, the original value is restored, unless other code has set the attribute meanwhile.
    """

    def __init__(self) -> None:
        self._lock, self._loans = Lock(), dict[tuple[int, str], _Loan]()

    @contextmanager
    def holding(self, *changes: Change) -> Iterator[None]:
        values = list[_Value]()
        with self._lock:
            for owner, name, make, rank in changes:
                loan = self._loans.setdefault((id(owner), name), _Loan(getattr(owner, name)))
                values.append(_Value(make(loan.own), rank))
                insort(loan.values, values[-1], key=lambda one: one.rank)
                setattr(owner, name, loan.values[-1].value)
        try:
            yield
        finally:
            with self._lock:
                for (owner, name, *_), value in zip(changes, values, strict=True):
                    self._give_back(owner, name, value)

    def _give_back(self, owner: Any, name: str, value: _Value) -> None:
        loan, now = self._loans[id(owner), name], getattr(owner, name)
        is_ours = any(now is one.value or now == one.value for one in loan.values)
        del loan.values[next(place for place, one in enumerate(loan.values) if one is value)]
        if is_ours:
            setattr(owner, name, loan.values[-1].value if loan.values else loan.own)
        if not loan.values:
            del self._loans[id(owner), name]


lent = Lent()  # one for the process, like the modules and models that its threads share


@contextmanager
def evaluation_mode(*models: Module | None) -> Iterator[None]:
    """Set all modules of `models` to evaluation mode inside the `with` block; skip models that are `None`."""
    modules: Iterable[Module] = (module for model in models if model is not None for module in model.modules())
    with lent.holding(*(Change(module, "training", lambda own: False) for module in modules)):
        yield
