"""Attributes that calls change while they run, and give back: names of attention, scans of mixers, training modes."""

from bisect import insort
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, NamedTuple

from torch.nn import Module


class Change(NamedTuple):
    """Of the attribute `name` of `owner`: what `make` makes of its own value. Among the calls that run the largest
    `rank` counts, and the newest of equals.
    """

    owner: Any
    name: str
    make: Callable[[Any], Any]
    rank: int = 0


class _Value(NamedTuple):
    value: Any
    rank: int


@dataclass
class _Loan:
    own: Any  # what stood there before
    values: list[_Value] = field(default_factory=list)  # of the calls that run, the one that counts last


class Lent:
    """Who has changed what. Calls of several threads may overlap: see `Change` for whose value counts. The last call
    gives back what was there first. What anyone else has set meanwhile stays.
    """

    def __init__(self) -> None:
        self._lock, self._loans = Lock(), dict[tuple[int, str], _Loan]()

    @contextmanager
    def holding(self, *changes: Change) -> Iterator[None]:
        """Keep these changes inside the `with` block."""
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


lent = Lent()  # of this process, as what it lends: modules of Transformers, and models that several threads share


@contextmanager
def evaluation_mode(*models: Module | None) -> Iterator[None]:
    """Keep all layers of `models` out of training mode inside the `with` block; `None` is skipped."""
    modules: Iterable[Module] = (module for model in models if model is not None for module in model.modules())
    with lent.holding(*(Change(module, "training", lambda own: False) for module in modules)):
        yield
