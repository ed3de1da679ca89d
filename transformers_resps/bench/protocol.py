"""Decode every prompt with every method, in turn. Knows models and clocks; nothing of files or tables."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..head import DraftHead
from ..policy import FixedPolicy
from ..tree import TreeShape
from .measurement import Measurement, token_count


PLAIN = "plain"


@dataclass(frozen=True, slots=True)
class Method:
    """A name and what it adds to the keywords of `generate`."""

    name: str
    keywords: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Prompt:
    """`name` is `dataset/row`; `input_ids` is `[s]`."""

    name: str
    input_ids: Tensor


def methods(
    head: DraftHead, shapes: Sequence[TreeShape], *, prompt_lookup: bool = False, auto: bool = False
) -> list[Method]:
    """Plain decoding first, then prompt lookup of Transformers, every fixed shape, and `policy="auto"`."""
    found = [Method(PLAIN)]
    if prompt_lookup:
        found.append(Method("prompt lookup", {"prompt_lookup_num_tokens": 10}))
    for shape in shapes:
        found.append(Method(shape_name(shape), {"assistant_model": head, "policy": FixedPolicy(shape)}))
    if auto:
        found.append(Method("auto, no head", {"policy": "auto"}))
        found.append(Method("auto", {"assistant_model": head, "policy": "auto"}))
    return found


def shape_name(shape: TreeShape) -> str:
    """`tree 8/4/2`, and `+6` for nodes that lookup may add."""
    name = f"tree {shape.total_tokens}/{shape.depth}/{shape.top_k}"
    return f"{name}+{shape.lookup}" if shape.lookup else name


class Bench:
    """One target that decodes greedily, up to `max_new_tokens`, timed by `clock`."""

    def __init__(self, model: Any, max_new_tokens: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.model, self.max_new_tokens, self._clock = model, max_new_tokens, clock
        ends = model.generation_config.eos_token_id
        self._end_ids = set(ends) if isinstance(ends, list) else {ends}
        self._forwards = 0
        model.register_forward_pre_hook(self._count_forward)

    def run(self, prompts: Sequence[Prompt], chosen: Sequence[Method], repeats: int) -> Iterator["Run"]:
        """Warm up, then measure: of each prompt all methods, each repeat and prompt beginning with the next one."""
        for method in chosen:
            self.decode(prompts[0], method, 0)
        for repeat in range(repeats):
            for number, prompt in enumerate(prompts):
                first = (number + repeat) % len(chosen)
                for method in [*chosen[first:], *chosen[:first]]:
                    yield self.decode(prompt, method, repeat)

    def decode(self, prompt: Prompt, method: Method, repeat: int) -> "Run":
        """One call of `generate`."""
        input_ids = prompt.input_ids[None].to(self.model.device)
        self._forwards = 0
        started = self._clock()
        sequences = self.model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            **method.keywords,
        )
        answer = sequences[0, input_ids.shape[1] :].tolist()  # reading it waits for the device
        seconds = self._clock() - started
        count = token_count(answer, self._end_ids, self.max_new_tokens)
        measured = Measurement(method.name, prompt.name, repeat, count, self._forwards, seconds)
        return Run(measured, torch.tensor(answer[:count]))

    def _count_forward(self, *_: Any) -> None:
        self._forwards += 1


@dataclass(frozen=True, slots=True)
class Run:
    """A measurement and the text `[t]` it wrote."""

    measurement: Measurement
    token_ids: Tensor
