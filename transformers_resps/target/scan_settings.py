"""How recurrent mixers read a few tokens at once as they would read them one after the other, and quickly."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from threading import RLock
from typing import Any

from torch import Tensor


_lock = RLock()  # two threads may share mixers, whose settings are attributes
_NO_LIMIT = (0.0, float("inf"))  # seconds: no step is cut


def chunk_keyword(mixer: Any, states: Tensor) -> dict[str, int]:
    """What lets a delta rule without kernels compute the tokens of `states` `[r, m, h]`, and not a chunk of 64.

    A keyword of the mixer's forward, which hands it on to the function that computes chunks. An accelerator's kernels
    are made for long chunks.
    """
    is_fixed = hasattr(mixer, "chunk_size") or states.device.type != "cpu"
    return {} if is_fixed else {"chunk_size": states.shape[1]}


class ScanSettings:
    """The settings of the Mamba-2 mixers among some mixers; others have none.

    - `time_step_limit`: several tokens at once have their time steps cut to it, a single token has not. Plain decoding
      reads its own text one token after the other, so a tree must not be cut either.
    - `chunk_size`: without kernels, a chunk of 256 tokens is computed for a tree of four. A short one gives the same.

    Args:
        mixers: of one target.
    """

    def __init__(self, mixers: Iterable[Any]) -> None:
        self._mixers = [mixer for mixer in mixers if hasattr(mixer, "time_step_limit")]

    @contextmanager
    def of_prompt(self) -> Iterator[None]:
        """The mixers' own settings, as nothing else runs."""
        if not self._mixers:
            yield
            return
        with _lock:
            yield

    @contextmanager
    def of_tree(self, depth: int) -> Iterator[None]:
        """Settings for `depth` tokens at once, which go on from a state."""
        if not self._mixers:
            yield
            return
        with _lock:
            own = [(mixer, mixer.time_step_limit, mixer.chunk_size) for mixer in self._mixers]
            try:
                for mixer, _, chunk_size in own:
                    mixer.time_step_limit = _NO_LIMIT
                    if mixer.A_log.device.type == "cpu":  # an accelerator's kernels are made for long chunks
                        mixer.chunk_size = min(chunk_size, depth)
                yield
            finally:
                for mixer, limit, chunk_size in own:
                    mixer.time_step_limit, mixer.chunk_size = limit, chunk_size
