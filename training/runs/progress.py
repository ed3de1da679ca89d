"""The progress of a run that answers many prompts."""

import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

import torch
from transformers.utils.logging import tqdm

from transformers_resps.telemetry.display import moving


class PromptProgress:
    """A bar over prompts with the time left and tokens/s; where there is no terminal, a line for each batch.

    Args:
        total: prompts.
        before: prompts that an earlier run answered.
        is_terminal: show the bar.
        clock: in seconds.
    """

    def __init__(
        self, total: int, before: int, *, is_terminal: bool, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._total, self._before, self._answered, self._tokens = total, before, before, 0
        self._clock, self._started, self._is_terminal = clock, clock(), is_terminal
        self._bar: Any = tqdm(
            desc="Answering", total=total, initial=before, unit="prompt", disable=not is_terminal, file=sys.stderr
        )

    def __enter__(self) -> "PromptProgress":
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def watch(self, model: torch.nn.Module, prompts: int, most_steps: int) -> AbstractContextManager[None]:
        """Return a context in which the bar moves by a batch's prompts, evenly over its most steps."""
        return moving(self._bar, model, prompts, most_steps)

    def add(self, prompts: int, tokens: int) -> None:
        """Count a batch that is written: its prompts, and the tokens of its answers."""
        self._answered, self._tokens = self._answered + prompts, self._tokens + tokens
        seconds = self._clock() - self._started
        rate = f"{self._tokens / seconds:.0f} tokens/s"
        self._bar.set_postfix_str(rate)
        if not self._is_terminal:
            left = seconds / (self._answered - self._before) * (self._total - self._answered)
            print(f"{self._answered}/{self._total} prompts, {rate}, {timedelta(seconds=round(left))} left", flush=True)
