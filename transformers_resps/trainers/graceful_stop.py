"""Ctrl-C ends a training run after the step it is in, with a checkpoint. Knows Transformers' Trainer and signals."""

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments


Handler = Callable[[int, FrameType | None], Any] | int | None


class Interruption(TrainerCallback):
    """Inside `with`, the first Ctrl-C makes the trainer save a checkpoint and stop; a second one stops it at once.

    Python hands signals to its main thread only, so elsewhere nothing changes.

    Args:
        steps: optimiser steps that belong together; the run stops after the last of them.

    Attributes:
        is_requested: Ctrl-C was pressed.
    """

    def __init__(self, steps: int = 1) -> None:
        self.is_requested = False
        self._steps = steps
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
        if self.is_requested and state.global_step % self._steps == 0:
            control.should_save = control.should_training_stop = True
        return control


def until_interrupted(trainer: Trainer, train: Callable[[], Any], steps: int = 1) -> Any:
    """Run `train` and return its result; Ctrl-C in a run of one process finishes its steps and saves a checkpoint.

    Args:
        trainer: the trainer.
        train: starts its training.
        steps: optimiser steps that belong together.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed, after the checkpoint.
    """
    if trainer.accelerator.num_processes > 1:  # each would stop at a step of its own, and wait for the others
        return train()
    with Interruption(steps) as interruption:
        trainer.add_callback(interruption)
        output = train()
        trainer.remove_callback(interruption)
    if interruption.is_requested:
        raise KeyboardInterrupt
    return output
