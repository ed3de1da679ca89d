"""Measure how long a training takes, over all the runs that it is resumed in."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


_SECONDS = "seconds.json"


class TimingCallback(TrainerCallback):
    """Counts the seconds of training. Every checkpoint holds them, so a resumed run continues the count.

    Steps that a kill undid are not counted.

    Args:
        checkpoint: the one that the run resumes from, if any.
        clock: in seconds.

    Attributes:
        seconds: so far; `None` if the checkpoint does not say how long it took.
    """

    def __init__(self, checkpoint: str | Path | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = 0.0 if checkpoint is None else _seconds_in(Path(checkpoint))
        self._clock, self._last = clock, clock()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start."""
        self._last = self._clock()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note the time in the checkpoint that was just written."""
        self._advance()
        if state.is_world_process_zero and self.seconds is not None:
            folder = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            (folder / _SECONDS).write_text(json.dumps(self.seconds), encoding="utf-8")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop."""
        self._advance()

    def _advance(self) -> None:
        now = self._clock()
        if self.seconds is not None:
            self.seconds += now - self._last
        self._last = now


def _seconds_in(checkpoint: Path) -> float | None:
    file = checkpoint / _SECONDS
    return float(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None
