"""A training run of a given time: its seconds, kept across interruptions, and one progress bar for all its stages."""

import json
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.utils.logging import tqdm


_SECONDS_BETWEEN_LINES = 30.0  # where there is no terminal


class RunHours:
    """Counts a run's seconds in `FOLDER/hours.json`, where an interrupted run goes on, and shows one bar.

    Args:
        folder: the run's `output_dir`.
        hours: of the whole run.
        is_terminal: show a bar, else a line every half a minute.
        clock: in seconds.
    """

    def __init__(
        self, folder: Path, hours: float, *, is_terminal: bool, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._file, self._clock, self._started = folder / "hours.json", clock, clock()
        found = json.loads(self._file.read_text(encoding="utf-8")) if self._file.exists() else {}
        self._before: float = found.get("seconds", 0.0)
        self.max_steps: int | None = found.get("max_steps")  # of the training stage, once it is known
        self.total, self._is_terminal, self._told = hours * 3600, is_terminal, float("-inf")
        self._bar: Any = tqdm(
            total=round(self.total),
            initial=round(self._before),
            disable=not is_terminal,
            file=sys.stderr,
            bar_format="{desc} {percentage:3.0f}%|{bar}|{postfix}",
        )

    @property
    def spent(self) -> float:
        """Seconds of the run so far, those before an interruption included."""
        return self._before + self._clock() - self._started

    def plan(self, max_steps: int) -> None:
        """Keep the number of training steps, which an interrupted run must not change."""
        self.max_steps = max_steps
        self._write()

    def tick(self, stage: str, told: str = "") -> None:
        """Keep the seconds, and show the stage, what it tells, and the estimated end."""
        self._write()
        left = f"{timedelta(seconds=round(max(self.total - self.spent, 0)))} left"
        self._bar.set_description_str(stage, refresh=False)
        self._bar.set_postfix_str(f"{left}, {told}" if told else left, refresh=False)
        self._bar.update(min(round(self.spent), round(self.total)) - self._bar.n)
        now = self._clock()
        if not self._is_terminal and now - self._told >= _SECONDS_BETWEEN_LINES:
            self._told = now
            print(f"{stage}: {self.spent / self.total:.0%} of the time, {left}{told and ', ' + told}", flush=True)

    def close(self) -> None:
        self._bar.close()

    def _write(self) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._file.write_text(json.dumps({"seconds": round(self.spent, 1), "max_steps": self.max_steps}))


class AnsweringTicks:
    """Moves the bar of `hours` with each batch of answers, and ends the answering after their `share` of the run."""

    def __init__(self, hours: RunHours, share: float, total: int, before: int) -> None:
        self._hours, self._share, self._answered = hours, share, before

    def __enter__(self) -> "AnsweringTicks":
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    @property
    def is_over(self) -> bool:
        return self._hours.spent >= self._share * self._hours.total

    def watch(self, model: Any, prompts: int, most_steps: int) -> AbstractContextManager[None]:
        return nullcontext()

    def add(self, prompts: int, tokens: int) -> None:
        self._answered += prompts
        self._hours.tick("Answering", f"{self._answered} answers")


class TrainingTicks(TrainerCallback):
    """Moves the bar of `hours` with each step of training and of evaluation."""

    def __init__(self, hours: RunHours) -> None:
        self._hours = hours

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._hours.tick("Training", f"step {state.global_step} of {state.max_steps}")

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._hours.tick("Evaluating")
