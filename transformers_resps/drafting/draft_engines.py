"""What a model keeps for the heads that it drafts with."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from threading import Lock

from ..head import BoundHead, DraftHead
from .draft_engine import DraftEngine


_HEADS = 4  # each engine holds its head's weights once more


class DraftEngines:
    """An engine for each of the last heads: whoever drafts with several in turn compiles each of them once.

    A copied or pickled model starts anew.

    Args:
        make: makes the engine of one head.
    """

    def __init__(self, make: Callable[[], DraftEngine] = DraftEngine) -> None:
        self._make = make
        self._engines: dict[DraftHead, DraftEngine] = {}  # the one that was used last comes last
        self._lock = Lock()

    def __reduce__(self) -> tuple[type["DraftEngines"], tuple[()]]:
        return DraftEngines, ()

    def borrow(self, bound: BoundHead | None) -> AbstractContextManager[DraftEngine | None]:
        """Lend the engine of a head; see `DraftEngine.borrow`. Nothing without a head."""
        if bound is None:
            return nullcontext()
        with self._lock:
            engine = self._engines.pop(bound.head, None) or self._make()
            self._engines[bound.head] = engine
            for head in list(self._engines)[:-_HEADS]:
                del self._engines[head]
        return engine.borrow(bound)
