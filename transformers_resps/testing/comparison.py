"""Compares the outputs of `generate` with and without a head and a policy, token for token.

In fp32 and fp64 they must be equal. In half precision rounding may change a token, and later tokens depend on it, so
only the first divergence is judged. It is excused if a logit that is a few floating-point spacings higher makes plain
decoding, with the same random numbers, pick either token. In the exact mode (`invariant`) any difference fails.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from ..compat import unwrapped
from ..drafting import DraftSource
from ..generation.attach import attach, attached, detached
from ..generation.keywords import SpeculationDefaults
from ..generation.output import end_ids, left_padded, up_to_end
from ..policies.base import Policy
from ..telemetry.report import SpeculationReport
from ..verifying.lending import Change, evaluation_mode, lent
from .divergence import HALF_PRECISIONS, MAX_SPACINGS, Divergence, explain_divergence


@dataclass(frozen=True, slots=True)
class Written:
    """Output of a call of `generate`, and the state of the random generator after the call."""

    outputs: list[Tensor]  # [t] for each prompt: the new tokens, up to the first end token
    generated: Tensor  # [b, t] the new tokens, padding included
    random_state: Tensor


@dataclass(frozen=True, slots=True)
class ModelUnderTest:
    """The tested model, drafter and policy; generates plain output, and speculative output with drafter and policy."""

    model: Any  # the user's object, perhaps a PEFT model
    head: DraftSource | None  # `None` drafts only by lookup
    policy: Policy | str | None
    invariant: bool = False  # whether every call, plain calls included, runs in the exact mode
    done: Callable[[], Any] = lambda: None  # callback after each call with the policy, to move a progress bar

    @property
    def target(self) -> PreTrainedModel:
        return unwrapped(self.model)

    def plain(self, prompts: Sequence[Tensor], seed: int = 0, **settings: Any) -> Written:
        """Generate the reference output: by Transformers alone or, in the exact mode, by this package's loop."""
        torch.manual_seed(seed)
        if not self.invariant:
            with detached(self.model):
                return self._written(self._generate(prompts, **settings).sequences, prompts)
        attach(self.model)
        return self._written(self._generate(prompts, invariant=True, **settings).sequences, prompts)

    def speculative(
        self, prompts: Sequence[Tensor], seed: int = 0, **settings: Any
    ) -> tuple[Written, SpeculationReport]:
        attach(self.model)
        torch.manual_seed(seed)
        own = {"assistant_model": self.head, "policy": self.policy, "invariant": self.invariant}
        output = self._generate(prompts, **own, **settings)
        self.done()
        return self._written(output.sequences, prompts), output.speculation

    def pick(self, text: Tensor, **settings: Any) -> int:
        """Return the token that plain decoding writes after `text` `[s]`, without changing the random generator."""
        with detached(self.model), self._forked():
            sequences = self._generate([text], **settings | {"max_new_tokens": 1}).sequences
        return int(sequences[0, -1])

    def _written(self, sequences: Tensor, prompts: Sequence[Tensor]) -> Written:
        generated, ends = sequences[:, max(len(prompt) for prompt in prompts) :], end_ids(self.target)
        on_gpu = self.target.device.type == "cuda"
        drawn = torch.cuda.get_rng_state(self.target.device) if on_gpu else torch.get_rng_state()
        return Written([up_to_end(row, ends) for row in generated], generated, drawn)

    def _generate(self, prompts: Sequence[Tensor], **settings: Any) -> Any:
        ids, mask = (part.to(self.target.device) for part in left_padded(prompts))
        settings |= {"pad_token_id": 0, "return_dict_in_generate": True}
        return self.model.generate(input_ids=ids, attention_mask=mask, **settings)

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Attach the model in evaluation mode for a `with` block; then restore it and the global random generators."""
        with self._forked(), SpeculationDefaults.suspended(), evaluation_mode(self.model), attached(self.model):
            yield

    def without_settings(self) -> AbstractContextManager[None]:
        """Give the model default generation settings in a `with` block, without logits processors and end tokens."""
        holders = dict.fromkeys((self.model, self.target))  # a PEFT model has its own settings
        changes = [Change(holder, "generation_config", lambda own: GenerationConfig()) for holder in holders]
        return lent.holding(*changes)

    def _forked(self) -> Any:
        device = self.target.device
        return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


GREEDY: dict[str, Any] = {"do_sample": False}
SAMPLED: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
PROCESSED = SAMPLED | {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.1}
# At a low temperature more drafts are accepted, and the penalty changes the logits after every token.
PENALISED = SAMPLED | {"temperature": 0.4, "repetition_penalty": 1.3}


@dataclass(frozen=True, slots=True)
class Difference:
    """A speculative output that differs from the plain output for the same prompt and seed."""

    prompt: int  # index of the prompt
    seed: int  # 0 for greedy outputs
    divergence: Divergence

    def __str__(self) -> str:
        unexcused = "NOT excused in the invariant mode" if self.divergence.invariant else "NOT explained by rounding"
        verdict = "rounding explains it" if self.divergence.explained else unexcused
        return f"prompt {self.prompt}, seed {self.seed}, {self.divergence}: {verdict}"


@dataclass(frozen=True, slots=True)
class TextCheck:
    """Result of comparing speculative outputs with plain outputs, under one decoding setting."""

    name: str  # the decoding setting
    answers: int  # number of compared outputs
    tokens: int  # number of tokens written with drafting
    target_forwards: int  # number of forwards for these tokens, counted for each row of a batch
    differences: tuple[Difference, ...]
    mismatches: tuple[str, ...] = ()  # differences of padding or random numbers, in calls with equal outputs
    is_of_policy: bool = True  # whether the tested policy chose the trees; false for built-in trees

    @property
    def accepted(self) -> bool:
        """Whether any drafted token was accepted; if not, plain decoding was compared with itself."""
        return self.tokens > self.target_forwards

    @property
    def passed(self) -> bool:
        return not self.mismatches and all(difference.divergence.explained for difference in self.differences)

    @property
    def tau(self) -> float:
        return self.tokens / max(self.target_forwards, 1)

    @property
    def verdict(self) -> str:
        if not self.passed:
            return "NOT lossless"
        equal = "equal" if not self.differences else "equal except for near-ties"
        return equal if self.accepted else f"{equal}, but no drafted token was ever accepted"

    def __str__(self) -> str:
        equal = self.answers - len(self.differences)
        return f"{equal} of {self.answers} answers equal, {self.tokens} tokens, tau {self.tau:.2f}: {self.verdict}"


@dataclass(frozen=True, slots=True)
class ComparedCall:
    """A prompt and settings, with which `compare` generates a plain and a speculative output."""

    index: int  # index of the prompt
    prompt: Tensor  # [s]
    seed: int
    settings: dict[str, Any]


def compare(
    model: ModelUnderTest, name: str, batches: Sequence[Sequence[ComparedCall]], *, alone: bool = False
) -> TextCheck:
    """Compare speculative output to plain output for each batch of calls, which share their seed and settings.

    In half precision a batch of several calls must be greedy, because a single row's random draw cannot be repeated.
    With `alone` (exact mode only), the plain output is generated for each prompt alone, with the prompt in one chunk.
    """
    differences, mismatches, tokens, forwards = [], [], 0, 0
    for calls in batches:
        prompts, seed, settings = [call.prompt for call in calls], calls[0].seed, calls[0].settings
        if alone:
            at_once = settings | {"prefill_chunk_size": None}
            plain = [model.plain([prompt], seed, **at_once) for prompt in prompts]
        else:
            plain = [model.plain(prompts, seed, **settings)]
        own, report = model.speculative(prompts, seed, **settings)
        tokens += sum(map(len, own.outputs))
        forwards += sum(step.decoded_rows for step in report.steps)
        if not alone:
            where = f"prompt {calls[0].index}, seed {seed}: " if len(calls) == 1 else ""
            mismatches += [where + mismatch for mismatch in _mismatches_beside(plain[0], own)]
        expected = [output for written in plain for output in written.outputs]
        for call, *outputs in zip(calls, expected, own.outputs, strict=True):
            difference = _first_difference(model, call, *outputs)
            differences += [] if difference is None else [difference]
    return TextCheck(name, sum(map(len, batches)), tokens, forwards, tuple(differences), tuple(mismatches))


def _mismatches_beside(plain: Written, own: Written) -> list[str]:
    """Describe how calls with equal outputs differ in padding or random generator state; `[]` for unequal outputs."""
    if not all(map(torch.equal, plain.outputs, own.outputs)):
        return []
    equal = {
        "other tokens after the end of an answer": torch.equal(plain.generated, own.generated),
        "a different number of random numbers was drawn": torch.equal(plain.random_state, own.random_state),
    }
    return [mismatch for mismatch, is_equal in equal.items() if not is_equal]


def _first_difference(model: ModelUnderTest, call: ComparedCall, plain: Tensor, own: Tensor) -> Difference | None:
    """Compare a speculative output, `own`, with the plain one; return their first difference, `None` if equal."""
    divergence = explain_divergence(model.target, call.prompt, plain, own, invariant=model.invariant)
    if divergence is None:
        return None
    if divergence.dtype in HALF_PRECISIONS:
        pair = (divergence.plain_token, divergence.speculative_token)
        needed = [_spacings_until_picked(token, model, call, plain, divergence) for token in pair]
        divergence = replace(divergence, needed=max(needed))
    return Difference(call.index, call.seed, divergence)


def _spacings_until_picked(
    token: int | None, model: ModelUnderTest, call: ComparedCall, plain: Tensor, divergence: Divergence
) -> float:
    """Raise the logit of `token` at the divergence by 0, 1, 2, 4, ... spacings of the dtype, until plain decoding
    picks `token`. Return that number of spacings; infinity above `MAX_SPACINGS`, or if `token` is `None`.
    """
    if token is None:
        return math.inf
    torch.manual_seed(call.seed)
    if divergence.position:  # bring the random generator to its state at that position
        model.plain([call.prompt], call.seed, **call.settings | {"max_new_tokens": divergence.position})
    prefix = torch.cat([call.prompt, plain[: divergence.position].to(call.prompt.device)])
    spacings = 0.0
    while spacings <= MAX_SPACINGS:
        raised = {(token,): spacings * divergence.spacing}
        if model.pick(prefix, **call.settings | {"sequence_bias": raised}) == token:
            return spacings
        spacings = 2 * spacings or 1.0
    return math.inf
