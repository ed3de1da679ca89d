"""Nothing leaks: after many calls the memory, the tensors and the hooks are those after few.

`RESPS_GENERATIONS` sets how many; `make test-endurance` makes it the thousand that we promise.
"""

import gc
import os
import tracemalloc
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import psutil
import torch
from transformers import PreTrainedModel

from tests.targets import VOCABULARY, Architecture
from transformers_resps import DraftHead, FixedPolicy, TreeShape, attach


GENERATIONS = int(os.environ.get("RESPS_GENERATIONS", "24"))
WARM_UP = 12
POLICIES: list[Any] = [FixedPolicy(TreeShape(20, 3, 8)), "auto", FixedPolicy(TreeShape(4, 2, 2, lookup=4))]


def generate(target: PreTrainedModel, head: DraftHead, index: int) -> None:
    """A short call like none before it; every fourth has no head, every fifth ends in an error."""
    prompt = torch.randint(1, VOCABULARY, (1, 4 + index % 7), generator=torch.Generator().manual_seed(index))
    extra: dict[str, Any] = {"policy": "auto"}
    if index % 4:
        extra = {"assistant_model": head, "policy": POLICIES[index % len(POLICIES)]}
    if index % 5 == 0:
        handle = target.lm_head.register_forward_hook(_fails)
        try:
            target.generate(prompt, max_new_tokens=4, **extra)
        except InterruptedError:
            handle.remove()
        return
    target.generate(prompt, max_new_tokens=4, return_dict_in_generate=True, **extra)


def _fails(*_: Any) -> None:
    raise InterruptedError


def census(target: PreTrainedModel) -> Counter[str]:
    """What is alive: tensors, objects of ours, hooks in the target."""
    gc.collect()
    alive: Counter[str] = Counter()
    for found in gc.get_objects():
        kind = type(found)
        if issubclass(kind, torch.Tensor):
            alive["tensors"] += 1
        elif str(kind.__module__).startswith("transformers_resps"):
            alive[kind.__qualname__] += 1
    for module in target.modules():
        alive["hooks"] += len(module._forward_hooks) + len(module._forward_pre_hooks)
        alive["hooks"] += len(module._forward_pre_hooks_with_kwargs)
    return alive


def test_many_short_generations_leave_memory_flat() -> None:
    target = attach(Architecture("llama").build("sdpa"))
    head = DraftHead.from_target(target)
    for index in range(WARM_UP):
        generate(target, head, index)
    before, resident = census(target), psutil.Process().memory_info().rss
    for index in range(GENERATIONS):
        generate(target, head, index)
    assert not census(target) - before, "fewer are no leak: other tests' may go meanwhile"
    assert psutil.Process().memory_info().rss < resident * 1.01
    assert _traced_growth(lambda index: generate(target, head, index)) < 16 * 1024


def _traced_growth(run: Callable[[int], None]) -> int:
    """Bytes of Python objects that twenty calls leave behind: the least of three times twenty, because a leak never
    pauses, and caches that fill do.
    """
    tracemalloc.start()
    traced = []
    for start in (0, 20, 40, 60):
        for index in range(start, start + 20):
            run(index)
        gc.collect()
        traced.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    return min(after - before for before, after in pairwise(traced))
