"""Ctrl-C ends a training run after the step it is in, with a checkpoint. Knows Transformers' callbacks and signals."""

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


Handler = Callable[[int, FrameType | None], Any] | int | None


class Interruption(TrainerCallback):
    """Inside `with`, the first Ctrl-C asks the trainer for a checkpoint and an end; a second one ends it at once.

    Python hands signals to its main thread only, so elsewhere nothing changes.

    Attributes:
        is_requested: Ctrl-C was pressed.
    """

    def __init__(self) -> None:
        self.is_requested = False
        self._before: Handler = None

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._request)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.is_requested = True
        self._restore()

    def _restore(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Stop here, if asked to."""
        if self.is_requested:
            control.should_save = control.should_training_stop = True
        return control
