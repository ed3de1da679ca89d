"""Answers of the target to prompts, recorded with what its head would have drafted at every position."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor
from transformers.utils.logging import tqdm

from ..head import DraftHead, parameter_fingerprint
from ..policy import ActionGrid
from ..replay import RecordedText, ReplayText, record_pools, record_text
from ..replay.replay_text import FORMAT
from .policy_prompts import name_of
from .writing import written


class _Recording(Protocol):
    def save(self, file: str | Path) -> None: ...

    @classmethod
    def load(cls, file: str | Path) -> Self: ...


Recorded = TypeVar("Recorded", bound=_Recording)


@dataclass(frozen=True, slots=True)
class Form(Generic[Recorded]):
    """What is kept of an answer.

    Attributes:
        kind: class of the recordings.
        record: makes one, of a target, a head, `[s]` prompt and answer, the prompt's length and `spare_room`.
        facts: JSON values that change with everything that changes a recording.
    """

    kind: type[Recorded]
    record: Callable[..., Recorded]
    facts: list[Any]


def outcomes_for(grid: ActionGrid) -> Form[ReplayText]:
    """Keep what gives the outcome of every shape of `grid`."""
    return Form(ReplayText, partial(record_text, grid=grid), [FORMAT, grid.to_list()])


def pools_of(depths: dict[int, int]) -> Form[RecordedText]:
    """Keep the pools themselves: for each `top_k` of `depths`, of so many levels."""
    return Form(RecordedText, partial(record_pools, depths=depths), ["pools", sorted(depths.items())])


@dataclass
class Recorder(Generic[Recorded]):
    """Lets the target answer prompts, and records the answers in a folder; those that are there are used again.

    Args:
        target: attached.
        head: drafts.
        form: what is kept.
        folder: one file for each answer.
        generation: passed to `generate`, with `max_new_tokens`; JSON values.
    """

    target: Any
    head: DraftHead
    form: Form[Recorded]
    folder: Path
    generation: dict[str, Any]

    def record(self, prompts: Sequence[Tensor], what: str = "prompts") -> list[Recorded]:
        """Recordings of all prompts with an answer of at least two tokens, in their order.

        Each of several processes records its share, then reads the recordings of all.

        Args:
            prompts: `[s]` each.
            what: their name in the progress bar.

        Raises:
            ValueError: no prompt has such an answer.
        """
        from accelerate import PartialState  # of the extra `train`; heads are checked without it

        self.folder.mkdir(parents=True, exist_ok=True)
        state = PartialState()
        share = prompts[state.process_index :: state.num_processes]
        missing = [prompt for prompt in share if not self._file(prompt).is_file()]
        for prompt in tqdm(missing, desc=f"Recording answers to {what}", disable=not missing):
            text = self._answer(prompt)
            if text is not None:
                unfinished = self._file(prompt).with_suffix(f".{os.getpid()}")
                with written(unfinished.parent):
                    text.save(unfinished)
                    unfinished.replace(self._file(prompt))
        state.wait_for_everyone()
        found = [self.form.kind.load(file) for file in map(self._file, prompts) if file.is_file()]
        if not found:
            raise ValueError(
                f"None of {len(prompts)} prompts has an answer of at least two tokens. Pass other prompts, or raise "
                "`max_completion_length`."
            )
        return found

    def _file(self, prompt: Tensor) -> Path:
        return self.folder / f"{name_of(prompt)}-{self._made_with}.safetensors"

    @cached_property
    def _made_with(self) -> str:
        """Changes with everything that changes a recording: the target's weights, not its path."""
        answered = [parameter_fingerprint(self.target), str(self.target.dtype), self.generation]
        return digest([*answered, self.head.fingerprint(), *self.form.facts])[:8]

    def _answer(self, prompt: Tensor) -> Recorded | None:
        torch.manual_seed(int(name_of(prompt), 16) % 2**31)  # an answer does not depend on earlier ones
        inputs = prompt[None].to(self.target.device)
        mask = torch.ones_like(inputs)
        text = self.target.generate(
            inputs, attention_mask=mask, assistant_model=self.head, policy="auto", **self.generation
        )[0]
        answered = len(text) - len(prompt)
        if answered < 2:
            return None
        room = self.generation["max_new_tokens"] - answered
        return self.form.record(self.target, self.head, text, len(prompt), spare_room=room)


def digest(value: Any) -> str:
    """SHA-256 of JSON values."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
