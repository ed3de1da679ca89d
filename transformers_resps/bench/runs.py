"""Answers one prompt with one method, and takes the time."""

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.utils.logging import tqdm

from ..generation.output import end_ids, sampling
from ..generation.state import SpeculationDefaults
from ..verifying.forward import decoder_layers
from ..verifying.slots import SlotEngine
from .methods import Answer, Method, compiled_plain
from .prompts import Prompt
from .steps import Step, steps_of
from .timing import AnswerTiming, token_count


_WARM_UP_TOKENS = 12


@dataclass(frozen=True, slots=True)
class Run:
    """One answer: how long it took, its text `[t]`, and its steps where they are told."""

    timing: AnswerTiming
    token_ids: Tensor
    steps: list[Step] = field(default_factory=list)


class Bench:
    """One target that answers with up to `max_new_tokens`, timed by `clock`."""

    def __init__(self, model: Any, max_new_tokens: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.model, self.max_new_tokens, self._clock = model, max_new_tokens, clock
        self._end_ids = end_ids(model)

    def warm_up(self, prompt: Prompt, methods: Sequence[Method]) -> None:
        """Decode a few tokens with every method."""
        few = min(_WARM_UP_TOKENS, self.max_new_tokens)
        for method in tqdm(methods, desc="Warming up", unit="method"):
            self.decode(prompt, method, max_new_tokens=few)

    def compile_refusal(self, prompt: Prompt) -> str | None:
        """Return why plain decoding cannot be compiled, or `None` after it was."""
        self.decode(prompt, compiled_plain(), max_new_tokens=2)
        engine: SlotEngine = self.model.speculation_state.slot_engine
        return None if engine.is_compiled else engine.obstacle

    def decode(
        self,
        prompt: Prompt,
        method: Method,
        repeat: int = 0,
        temperature: float = 0.0,
        *,
        max_new_tokens: int | None = None,
    ) -> Run:
        """Answer once, with the repeat as the seed; again after an answer in which something was compiled."""
        while True:
            answer, run = self._decode(prompt, method, repeat, temperature, max_new_tokens or self.max_new_tokens)
            if answer.report is None or not answer.report.compile_seconds:
                return run

    def _decode(
        self, prompt: Prompt, method: Method, repeat: int, temperature: float, most: int
    ) -> tuple[Answer, Run]:
        input_ids = prompt.input_ids[None].to(self.model.device)
        write = self._prepared(method, input_ids, most, temperature)
        torch.manual_seed(repeat)
        with self._forwards_noted(method) as begun:
            started = self._clock()
            answer = write()
            seconds = self._clock() - started
        if answer.report is not None:
            forwards = answer.report.target_forwards
            prefill = seconds - sum(step.step_seconds for step in answer.report.steps[1:])
        elif answer.target_forwards is not None:
            forwards, prefill = answer.target_forwards, answer.prefill_seconds
        else:
            forwards, prefill = len(begun), begun[1] - started if len(begun) > 1 else seconds
        count = token_count(answer.token_ids, self._end_ids, most)
        measured = AnswerTiming(
            method.name, prompt.name, repeat, count, forwards, seconds, prompt.turn, temperature, prefill
        )
        steps = [] if answer.report is None else steps_of(answer.report)
        return answer, Run(measured, torch.tensor(answer.token_ids[:count]), steps)

    def _prepared(self, method: Method, input_ids: Tensor, most: int, temperature: float) -> Callable[[], Answer]:
        """Return all that is timed: it gives the answer, read from the device."""
        if method.answer is not None:
            return partial(method.answer, input_ids, most, temperature, sorted(self._end_ids))
        keywords = {**method.keywords, **sampling(temperature)}
        if "policy" in keywords:  # each answer meets it as it was loaded; "auto" learns on
            keywords["policy"] = copy.deepcopy(keywords["policy"])

        def generated() -> Answer:
            with SpeculationDefaults.suspended():  # plain decoding is plain, whatever the model was attached with
                output = self.model.generate(
                    input_ids,
                    attention_mask=torch.ones_like(input_ids),
                    max_new_tokens=most,
                    return_dict_in_generate=True,
                    **keywords,
                )
            token_ids = output.sequences[0, input_ids.shape[1] :].tolist()
            return Answer(token_ids, getattr(output, "speculation", None))

        return generated

    @contextmanager
    def _forwards_noted(self, method: Method) -> Iterator[list[float]]:
        """Yield when each forward began, unless the method reports its steps: a hook would be compiled with the layer.

        The hook is not the model's: another library may run its layers without it.
        """
        begun: list[float] = []
        if method.reports_steps:
            yield begun
            return
        hook = decoder_layers(self.model)[0].register_forward_pre_hook(lambda *_: begun.append(self._clock()))
        try:
            yield begun
        finally:
            hook.remove()
