"""The decoding methods that a benchmark compares, and the timing of one answer."""

import copy
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field, replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..drafting import DraftSource
from ..generation.keywords import SpeculationDefaults
from ..generation.output import end_ids, sampling, up_to_end
from ..policies.base import Policy
from ..policies.fixed import FixedPolicy
from ..telemetry.report import SpeculationReport
from ..tree import TreeShape
from ..verifying.forward import decoder_layers
from .results import COMPILED, COMPILED_PLAIN, INVARIANT, PLAIN, AnswerTiming, Run, peak_mib, reset_peak


EAGLE_TREES = ((60, 5, 10), (60, 7, 10))  # total_token, depth and top_k in EAGLE's counting


class Answer(NamedTuple):
    """A method's answer. Without `report` and `target_forwards`, `Bench` counts forwards by a hook on the target."""

    token_ids: list[int]
    report: SpeculationReport | None = None  # report of `generate` with a policy
    target_forwards: int | None = None  # counted by a library that runs its own layers
    prefill_seconds: float = 0.0  # until the first token, if the method measures them; else 0


@dataclass(frozen=True)
class Method(ABC):
    """One decoding method that the benchmark times, such as plain decoding or a tree."""

    name: str
    _: KW_ONLY
    effort: int = 0  # rank of the work to set it up; among equally fast methods, the lowest rank is advised
    # Whether a sampled text equals the plain text with the same seed. Transformers' assistants draw other random
    # numbers, so that only the distribution of their texts is that of plain decoding.
    seed_exact: bool = True
    reference: str = PLAIN  # method whose texts it must reproduce: plain decoding in the same mode

    @property
    def reports_steps(self) -> bool:
        return False

    @abstractmethod
    def prepare(
        self, target: Any, input_ids: Tensor, max_new_tokens: int, temperature: float, ends: Sequence[int]
    ) -> Callable[[], Answer]:
        """Return the function to time, which answers the prompt `[1, s]` and copies the answer to the host."""


@dataclass(frozen=True)
class Generate(Method):
    """A method that calls `generate` with the given keywords."""

    keywords: Mapping[str, Any] = field(default_factory=dict)

    @property
    def reports_steps(self) -> bool:
        return "policy" in self.keywords

    def prepare(
        self, target: Any, input_ids: Tensor, max_new_tokens: int, temperature: float, ends: Sequence[int]
    ) -> Callable[[], Answer]:
        keywords = {**self.keywords, **sampling(temperature)}
        times: list[float] = []  # when `generate` streamed the prompt, and then each token
        if self.reports_steps:  # each answer starts with the loaded policy; "auto" goes on learning
            watch = SimpleNamespace(put=lambda _: times.append(time.perf_counter()), end=lambda: None)
            keywords |= {"policy": copy.deepcopy(keywords["policy"]), "streamer": watch}

        def answer() -> Answer:
            started = time.perf_counter()
            with SpeculationDefaults.suspended():  # ignore the defaults of `attach`
                output = target.generate(
                    input_ids,
                    attention_mask=torch.ones_like(input_ids),
                    max_new_tokens=max_new_tokens,
                    return_dict_in_generate=True,
                    **keywords,
                )
            token_ids = output.sequences[0, input_ids.shape[1] :].tolist()
            report = getattr(output, "speculation", None)
            return Answer(token_ids, report, prefill_seconds=times[1] - started if self.reports_steps else 0.0)

        return answer


def plain() -> Generate:
    """Return the method of plain decoding by Transformers."""
    return Generate(PLAIN)


def compiled(method: Generate) -> Generate:
    """Return a copy of a method of this package with compiled forwards."""
    return replace(method, name=method.name + COMPILED, keywords={**method.keywords, "compile": True})


def plain_steps() -> Generate:
    """Return the method of plain decoding by this package's loop, which can compile and has an invariant mode."""
    return Generate(PLAIN, {"policy": FixedPolicy(TreeShape.plain())})


def invariant(method: Generate) -> Generate:
    """Return a copy of a method of this package, compiled or not, in the invariant mode."""
    reference = (COMPILED_PLAIN if "compile" in method.keywords else PLAIN) + INVARIANT
    keywords = {**method.keywords, "invariant": True}
    return replace(method, name=method.name + INVARIANT, keywords=keywords, reference=reference)


def prompt_lookup() -> Generate:
    """Return the method of Transformers' prompt lookup, with ten looked-up tokens as in its documentation."""
    return Generate("prompt lookup", {"prompt_lookup_num_tokens": 10}, effort=1, seed_exact=False)


def draft_model(model: PreTrainedModel) -> Generate:
    """Return the method of Transformers' assisted generation with a small model."""
    return Generate("draft model", {"assistant_model": model}, effort=2, seed_exact=False)


def fixed_tree(head: DraftSource | None, shape: TreeShape, name: str | None = None) -> Generate:
    """Return the method with the same tree at every step; a shape that only looks up needs no head."""
    assistant = {"assistant_model": head} if shape.asks_head else {}
    return Generate(name or f"tree {shape}", {**assistant, "policy": FixedPolicy(shape)}, effort=3)


def eagle_trees(head: DraftSource) -> list[Generate]:
    """Return one method for each of the trees that EAGLE-3 publishes."""
    shapes = {f"EAGLE-3 {'/'.join(map(str, numbers))}": TreeShape.from_eagle(*numbers) for numbers in EAGLE_TREES}
    return [fixed_tree(head, shape, name) for name, shape in shapes.items()]


def policies(head: DraftSource | None, loaded: Mapping[str, Policy | str]) -> list[Generate]:
    """Return one method for each policy in `loaded`, a dict from the name in the table to the policy."""
    assistant = {} if head is None else {"assistant_model": head}
    return [
        Generate(name, {**assistant, "policy": policy}, effort=4 if policy == "auto" else 5)
        for name, policy in loaded.items()
    ]


@dataclass(frozen=True, slots=True)
class Prompt:
    """The tokens of a conversation up to the turn that a method must answer."""

    name: str  # `dataset/row`
    input_ids: Tensor  # [s]
    turn: int = 1


class Bench:
    """Times the answers that methods generate with one target, of up to `max_new_tokens` tokens."""

    def __init__(self, target: Any, max_new_tokens: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.target, self.max_new_tokens, self._clock = target, max_new_tokens, clock
        self._end_ids = end_ids(target)

    def compile_refusal(self, prompt: Prompt) -> str | None:
        """Try to compile plain decoding, on `prompt`; return the reason if that fails, else `None`."""
        self.decode(prompt, compiled(plain_steps()), max_new_tokens=2)
        engine = self.target.speculation_state.slot_engine
        return None if engine.is_compiled else str(engine.obstacle)

    def decode(
        self,
        prompt: Prompt,
        method: Method,
        repeat: int = 0,
        temperature: float = 0.0,
        *,
        max_new_tokens: int | None = None,
    ) -> Run:
        """Time an answer of `method`, with `repeat` as the seed; time it again if code was compiled meanwhile."""
        most = max_new_tokens or self.max_new_tokens
        input_ids = prompt.input_ids[None].to(self.target.device)
        while True:
            write = method.prepare(self.target, input_ids, most, temperature, sorted(self._end_ids))
            torch.manual_seed(repeat)
            reset_peak(self.target.device)
            with self._forwards_noted(method) as begun:
                started = self._clock()
                answer = write()
                seconds = self._clock() - started
            report = answer.report
            if report is None or not report.compile_seconds:
                break
        forwards, prefill = answer.target_forwards, answer.prefill_seconds
        if report is not None:
            forwards = report.target_forwards
        elif forwards is None:
            forwards, prefill = len(begun), begun[1] - started if len(begun) > 1 else seconds
        token_ids = up_to_end(answer.token_ids, self._end_ids)[:most]
        counted = (len(token_ids), forwards, seconds, prompt.turn, temperature, prefill)
        timing = AnswerTiming(method.name, prompt.name, repeat, *counted, peak_mib(self.target.device))
        return Run(timing, torch.tensor(token_ids, dtype=torch.long), [] if report is None else report.steps)

    @contextmanager
    def _forwards_noted(self, method: Method) -> Iterator[list[float]]:
        """Record the start time of each target forward in the yielded list, unless the method reports its steps.

        A method that reports its steps may compile the target's layers, and would compile the hook too. The hook is
        on the first layer, since another library may run the layers without calling the model.
        """
        begun: list[float] = []
        if method.reports_steps:
            yield begun
            return
        hook = decoder_layers(self.target)[0].register_forward_pre_hook(lambda *_: begun.append(self._clock()))
        try:
            yield begun
        finally:
            hook.remove()
