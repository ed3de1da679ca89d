"""Where the time and memory of a draft tree go, next to plain decoding.

Hooks and wrappers take the times and are removed again; on a GPU each waits for the device.
"""

import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from ..head import BoundHead, DraftHead
from .methods import Method
from .prompts import Prompt
from .protocol import Bench
from .timing import PLAIN


_PREFILL_REPEATS = 3


@dataclass(frozen=True, slots=True)
class Profile:
    """Ratios to plain decoding, and shares.

    Attributes:
        prefill_ratio: of a call that writes one token; it drafts nothing.
        overhead_share: of decoding time outside the forwards of target and head.
        level_cost: one level of the head, in one-token forwards of the target.
        peak_bytes_plain: most memory of the process, up to and with plain decoding.
        peak_bytes_tree: the same after decoding with the tree too.
    """

    prefill_ratio: float
    overhead_share: float
    level_cost: float
    peak_bytes_plain: int
    peak_bytes_tree: int


class Stopwatch:
    """Seconds of every call, by name."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self._clock = clock

    @contextmanager
    def around(self, owner: Any, attribute: str, name: str) -> Iterator[None]:
        """Time calls of `owner.attribute`."""
        inner = getattr(owner, attribute)
        own = attribute in vars(owner)

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = self._clock()
            result = inner(*args, **kwargs)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds[name].append(self._clock() - started)
            return result

        timed.__wrapped__ = inner  # type: ignore[attr-defined]  # Transformers reads the signature of `forward`
        setattr(owner, attribute, timed)
        try:
            yield
        finally:
            if own:
                setattr(owner, attribute, inner)
            else:
                delattr(owner, attribute)


def profile(bench: Bench, head: DraftHead, tree: Method, prompts: Sequence[Prompt]) -> Profile:
    """Decode `prompts` plain and with `tree`, in turn."""
    plain = Method(PLAIN)
    for method in (plain, tree):
        bench.decode(prompts[0], method)
    plain_watch = Stopwatch()
    with plain_watch.around(bench.model, "forward", "target"):
        for prompt in prompts:
            bench.decode(prompt, plain)
    peak_plain = _peak_bytes()
    watch = Stopwatch()
    total, prefill = 0.0, 0.0
    with ExitStack() as stack:
        stack.enter_context(watch.around(bench.model, "forward", "target"))
        stack.enter_context(watch.around(head, "forward", "head"))
        stack.enter_context(watch.around(head, "fuse", "fuse"))
        stack.enter_context(watch.around(BoundHead, "logits", "logits"))
        for prompt in prompts:
            first = len(watch.seconds["target"])
            total += bench.decode(prompt, tree).timing.seconds
            prefill += watch.seconds["target"][first]
    forwards = sum(map(sum, watch.seconds.values()))
    return Profile(
        prefill_ratio=_prefill_ratio(bench, tree, prompts),
        overhead_share=(total - forwards) / (total - prefill),
        level_cost=(median(watch.seconds["head"]) + median(watch.seconds["logits"]))
        / median(plain_watch.seconds["target"]),
        peak_bytes_plain=peak_plain,
        peak_bytes_tree=_peak_bytes(),
    )


def _prefill_ratio(bench: Bench, tree: Method, prompts: Sequence[Prompt]) -> float:
    """Median over prompts and repeats of calls that write one token."""
    one = Bench(bench.model, 1)
    pairs = [
        [one.decode(prompt, method).timing.seconds for method in (Method(PLAIN), tree)]
        for _ in range(_PREFILL_REPEATS)
        for prompt in prompts
    ]
    return median(with_tree / plain for plain, with_tree in pairs)


def _peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
