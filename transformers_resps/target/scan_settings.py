"""How recurrent mixers read a few tokens at once as they would read them one after the other, and quickly."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock
from typing import Any

from torch import Tensor


_NO_LIMIT = (0.0, float("inf"))  # seconds: no step is cut
_reads_tree: ContextVar[bool] = ContextVar("resps_reads_tree", default=False)  # in this thread: others share mixers
_lock = Lock()  # held while settings are lent or given back


def chunk_keyword(mixer: Any, states: Tensor) -> dict[str, int]:
    """What lets a delta rule without kernels compute the tokens of `states` `[r, m, h]`, and not a chunk of 64.

    A keyword of the mixer's forward, which hands it on to the function that computes chunks. An accelerator's kernels
    are made for long chunks.
    """
    is_fixed = hasattr(mixer, "chunk_size") or states.device.type != "cpu"
    return {} if is_fixed else {"chunk_size": states.shape[1]}


class TimeStepLimit(tuple[float, ...]):
    """A mixer's own limit, which does not hold where the thread that asks reads a tree.

    Attributes:
        own: as it was, to be given back.
        chunk_size: likewise.
        users: calls that decode with the mixer.
    """

    own: Any
    chunk_size: int
    users: int = 0

    def __iter__(self) -> Iterator[float]:
        return iter(_NO_LIMIT) if _reads_tree.get() else super().__iter__()

    def __getitem__(self, index: Any) -> Any:
        return _NO_LIMIT[index] if _reads_tree.get() else super().__getitem__(index)


class ScanSettings:
    """The settings of the Mamba-2 mixers among some mixers, lent inside `with`; others have none.

    - `time_step_limit`: several tokens at once have their time steps cut to it, a single token has not. Plain decoding
      reads its own text one token after the other, so a tree must not be cut either.
    - `chunk_size`: without kernels, a chunk of 256 tokens is computed for a tree of four. A short one gives the same.
      A prompt that another thread reads meanwhile takes longer.

    Args:
        mixers: of one target.
    """

    def __init__(self, mixers: Iterable[Any]) -> None:
        self._mixers = [mixer for mixer in mixers if hasattr(mixer, "time_step_limit")]

    def __enter__(self) -> "ScanSettings":
        with _lock:
            for mixer in self._mixers:
                if not isinstance(mixer.time_step_limit, TimeStepLimit):
                    limit = TimeStepLimit(mixer.time_step_limit or _NO_LIMIT)
                    limit.own, limit.chunk_size = mixer.time_step_limit, mixer.chunk_size
                    mixer.time_step_limit = limit
                mixer.time_step_limit.users += 1
        return self

    def __exit__(self, *exception: object) -> None:
        with _lock:
            for mixer in self._mixers:
                limit = mixer.time_step_limit
                limit.users -= 1
                if not limit.users:
                    mixer.time_step_limit, mixer.chunk_size = limit.own, limit.chunk_size

    @contextmanager
    def of_tree(self, depth: int) -> Iterator[None]:
        """Settings for `depth` tokens at once, which go on from a state."""
        token = _reads_tree.set(True)
        try:
            for mixer in self._mixers:
                if mixer.A_log.device.type == "cpu":  # an accelerator's kernels are made for long chunks
                    mixer.chunk_size = min(mixer.time_step_limit.chunk_size, depth)
            yield
        finally:
            for mixer in self._mixers:
                mixer.chunk_size = mixer.time_step_limit.chunk_size
            _reads_tree.reset(token)
