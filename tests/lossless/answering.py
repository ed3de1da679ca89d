"""Both ways of answering, trees so wide that most picks are drafted, and what watches or disturbs a call."""

from collections.abc import Callable
from threading import Thread
from typing import Any

import torch
from transformers import LogitsProcessor, set_seed
from transformers.generation.streamers import BaseStreamer

from tests.targets import VOCABULARY
from transformers_resps import DraftHead, FixedPolicy, TreeShape


WIDE = TreeShape(40, 3, VOCABULARY)  # so wide that most picks are drafted
SAMPLING = {"do_sample": True, "temperature": 1.3}


def both(target: Any, head: DraftHead, inputs: Any, shape: TreeShape = WIDE, seed: int = 0, **options: Any) -> Any:
    """The output of the same call, plain and with the head."""
    inputs = inputs if isinstance(inputs, dict) else {"input_ids": inputs}
    outputs = []
    for extra in ({}, {"assistant_model": head, "policy": FixedPolicy(shape)}):
        set_seed(seed)
        call = {"max_new_tokens": 24, "return_dict_in_generate": True, **options}
        made = {name: value() if isinstance(value, type) else value for name, value in call.items()}
        outputs.append(target.generate(**inputs, **made, **extra))
    return outputs


class Restive(LogitsProcessor):
    """Stateful: forbids the likeliest token at every n-th call, and counts its calls."""

    def __init__(self, every: int = 2) -> None:
        self.every, self.calls = every, 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.calls += 1
        return scores if self.calls % self.every else scores.scatter(1, scores.argmax(-1, keepdim=True), -torch.inf)


class Raises(LogitsProcessor):
    """Raises at the n-th token: in stock decoding, and with trees in the middle of a walk."""

    def __init__(self, at: int, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.left, self.error = at, error

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.left -= 1
        if not self.left:
            raise self.error
        return scores


class Heard(BaseStreamer):
    """Keeps what is streamed."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.values.append(value.tolist())

    def end(self) -> None:
        self.ended += 1


def in_threads(*calls: Callable[[], Any]) -> list[Any]:
    """What calls at the same time return."""
    found: dict[int, Any] = {}
    runners = [Thread(target=lambda at=at: found.update({at: calls[at]()})) for at in range(len(calls))]  # type: ignore[misc]
    for runner in runners:
        runner.start()
    for runner in runners:
        runner.join()
    return [found[at] for at in range(len(calls))]
