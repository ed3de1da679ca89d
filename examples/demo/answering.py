"""Answers one prompt by one method, takes the time, and judges whether two answers are the same text."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from transformers_resps.heads import DraftHead
from transformers_resps.policies.fixed import FixedPolicy
from transformers_resps.telemetry.report import SpeculationReport
from transformers_resps.testing import explain_divergence
from transformers_resps.tools.inspect import Examination, StepRecorder


PLAIN, LOOKUP, TREE, AUTO = "plain", "lookup", "tree", "auto"
Show = Callable[[str, list[int], float], None]  # method, tokens so far, tokens per second so far


@dataclass(frozen=True, slots=True)
class TimedAnswer:
    """What one call of `generate` wrote, and how long it took.

    Attributes:
        token_ids: `[t]`, without the prompt.
        seconds: of the whole call, prefill included.
        speculation: every step; `None` for stock decoding.
    """

    token_ids: Tensor
    seconds: float
    speculation: SpeculationReport | None

    @property
    def tokens(self) -> int:
        """Number of new tokens."""
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Answers:
    """The answers of several methods to one prompt, the plain one first."""

    prompt_ids: Tensor
    by_method: dict[str, TimedAnswer]

    def is_same(self, method: str) -> bool:
        """Whether a method wrote the plain text, token for token."""
        return bool(torch.equal(self.by_method[method].token_ids, self.by_method[PLAIN].token_ids))

    @property
    def are_same(self) -> bool:
        return all(map(self.is_same, self.by_method))


class _Watch(BaseStreamer):
    """A streamer that hands every new token on."""

    def __init__(self, method: str, show: Show) -> None:
        self.method, self.show = method, show
        self.tokens: list[int] | None = None  # the first `put` brings the prompt
        self.started = time.perf_counter()

    def put(self, value: Tensor) -> None:
        if self.tokens is None:
            self.tokens = []
            return
        self.tokens += value.flatten().tolist()
        self.show(self.method, self.tokens, len(self.tokens) / (time.perf_counter() - self.started))

    def end(self) -> None:
        """Nothing is buffered."""


def drafting(method: str, head: DraftHead) -> dict[str, Any]:
    """The keywords of `generate` that a method adds."""
    added: dict[str, dict[str, Any]] = {
        PLAIN: {},
        LOOKUP: {"policy": "auto"},
        TREE: {"assistant_model": head},
        AUTO: {"assistant_model": head, "policy": "auto"},
    }
    return added[method]


def answer(
    method: str, model: PreTrainedModel, added: dict[str, Any], prompt_ids: Tensor, max_new_tokens: int, show: Show
) -> TimedAnswer:
    """Answer `prompt_ids` `[s]` greedily, with keywords of `generate` that are `added` for the method."""
    watch = _Watch(method, show)
    output: Any = cast(Any, model).generate(
        prompt_ids[None],
        attention_mask=torch.ones_like(prompt_ids)[None],
        max_new_tokens=max_new_tokens,
        do_sample=False,
        streamer=watch,
        return_dict_in_generate=True,
        **added,
    )
    seconds = time.perf_counter() - watch.started
    return TimedAnswer(output.sequences[0, len(prompt_ids) :], seconds, getattr(output, "speculation", None))


def examine(
    model: PreTrainedModel, head: DraftHead, prompt_ids: Tensor, max_new_tokens: int, show: Show
) -> tuple[Answers, Examination]:
    """Answer `prompt_ids` `[s]` by stock `generate` and with the head's own tree, of which every step is kept."""
    recorder = StepRecorder(FixedPolicy(head.default_shape))
    plain = answer(PLAIN, model, {}, prompt_ids, max_new_tokens, show)
    tree = answer(TREE, model, {"assistant_model": head, "policy": recorder}, prompt_ids, max_new_tokens, show)
    assert tree.speculation is not None
    examination = Examination(
        prompt_ids=prompt_ids,
        plain_ids=plain.token_ids,
        plain_seconds=plain.seconds,
        report=tree.speculation,
        seconds=tree.seconds,
        steps=recorder.steps,
        divergence=explain_divergence(model, prompt_ids, plain.token_ids, tree.token_ids),
    )
    return Answers(prompt_ids, {PLAIN: plain, TREE: tree}), examination
