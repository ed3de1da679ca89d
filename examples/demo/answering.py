"""Answers one prompt twice, plain and with a draft head, and takes the time of both."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from transformers_resps.heads import DraftHead
from transformers_resps.policies.fixed import FixedPolicy
from transformers_resps.telemetry.report import SpeculationReport
from transformers_resps.testing import Divergence, explain_divergence
from transformers_resps.tools.inspect import Examination, Recorder


Show = Callable[[str, list[int], float], None]  # method, tokens so far, tokens per second so far


@dataclass(frozen=True, slots=True)
class TimedAnswer:
    """What one call of `generate` wrote, and how long it took.

    Attributes:
        token_ids: `[t]`, without the prompt.
        seconds: of the whole call, prefill included.
        token_seconds: median time from one token to the next.
        speculation: every step; `None` for a plain answer.
    """

    token_ids: Tensor
    seconds: float
    token_seconds: float
    speculation: SpeculationReport | None

    @property
    def tokens(self) -> int:
        """Number of new tokens."""
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Both answers to one prompt; `divergence` says where they part, `examination` holds every step."""

    kind: str
    dtype: torch.dtype
    plain: TimedAnswer
    speculative: TimedAnswer
    divergence: Divergence | None
    examination: Examination | None = None

    @property
    def passed(self) -> bool:
        """Whether the texts are equal, or rounding explains where they part."""
        return self.divergence is None or self.divergence.explained


class _Watch(BaseStreamer):
    """A streamer that hands every new token on and notes when it came."""

    def __init__(self, method: str, show: Show) -> None:
        self.method, self.show = method, show
        self.tokens: list[int] | None = None  # the first `put` brings the prompt
        self.started = time.perf_counter()
        self.arrivals: list[float] = []

    def put(self, value: Tensor) -> None:
        if self.tokens is None:
            self.tokens = []
            return
        self.tokens += value.flatten().tolist()
        self.arrivals.append(time.perf_counter())
        self.show(self.method, self.tokens, len(self.tokens) / (self.arrivals[-1] - self.started))

    def end(self) -> None:
        """Nothing is buffered."""


def compare(
    kind: str, model: PreTrainedModel, head: DraftHead, prompt_ids: Tensor, max_new_tokens: int, show: Show
) -> Comparison:
    """Answer `prompt_ids` `[s]` plain, then with the head's default tree, and judge the difference."""
    recorder = Recorder(FixedPolicy(head.default_shape))
    plain = _answer("plain", model, {}, prompt_ids, max_new_tokens, show)
    drafting = {"assistant_model": head, "policy": recorder}
    speculative = _answer("with the head", model, drafting, prompt_ids, max_new_tokens, show)
    divergence = explain_divergence(model, prompt_ids, plain.token_ids, speculative.token_ids)
    assert speculative.speculation is not None
    examination = Examination(
        prompt_ids=prompt_ids,
        plain_ids=plain.token_ids,
        plain_seconds=plain.seconds,
        report=speculative.speculation,
        seconds=speculative.seconds,
        steps=recorder.steps,
        divergence=divergence,
    )
    return Comparison(kind, model.dtype, plain, speculative, divergence, examination)


def _answer(
    method: str, model: PreTrainedModel, drafting: dict[str, Any], prompt_ids: Tensor, max_new_tokens: int, show: Show
) -> TimedAnswer:
    watch = _Watch(method, show)
    output: Any = cast(Any, model).generate(
        prompt_ids[None],
        attention_mask=torch.ones_like(prompt_ids)[None],
        max_new_tokens=max_new_tokens,
        do_sample=False,
        streamer=watch,
        return_dict_in_generate=True,
        **drafting,
    )
    seconds = time.perf_counter() - watch.started
    gaps = [after - before for before, after in zip(watch.arrivals, watch.arrivals[1:], strict=False)]
    speculation = output.speculation if drafting else None
    return TimedAnswer(output.sequences[0, len(prompt_ids) :], seconds, median(gaps) if gaps else seconds, speculation)
