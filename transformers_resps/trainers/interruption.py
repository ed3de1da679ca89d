"""End a training run at Ctrl-C or SIGTERM after the step it is in, with a checkpoint.

Schedulers such as Slurm, Kubernetes and Docker send SIGTERM before they kill a process.
"""

import logging
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments


logger = logging.getLogger(f"transformers.{__name__}")

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class InterruptionCallback(TrainerCallback):
    """Saves a checkpoint and stops, once asked to.

    In a run of several processes all stop at the same step, as soon as one of them was asked.

    Args:
        trainer: the trainer whose callback it is.
        steps: optimiser steps that belong together; the run stops after the last of them.

    Attributes:
        received: the signal that asked; `None` before.
    """

    def __init__(self, trainer: Trainer, steps: int) -> None:
        self.received: int | None = None
        self._trainer, self._steps = trainer, steps

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Stop here, if asked to."""
        if state.global_step % self._steps == 0:
            self.received = self._agreed()
            if self.received is not None:
                control.should_save = control.should_training_stop = True
        return control

    def _agreed(self) -> int | None:
        """The signal that any process received."""
        accelerator = self._trainer.accelerator
        if accelerator.num_processes == 1:
            return self.received
        received = torch.tensor([self.received or 0], device=accelerator.device)
        return int(accelerator.gather(received).max()) or None


@contextmanager
def interruptible(trainer: Trainer, steps: int = 1) -> Iterator[None]:
    """Inside, the first SIGINT or SIGTERM makes `trainer` save a checkpoint and stop; a second one stops it at once.

    Nothing changes outside Python's main thread, which alone gets signals.

    Args:
        trainer: the trainer, about to train.
        steps: optimiser steps that belong together.

    Raises:
        KeyboardInterrupt: after the checkpoint, SIGINT was received.
        SystemExit: after the checkpoint, SIGTERM was received; the exit status is 143.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    callback = InterruptionCallback(trainer, steps)
    before = {int(number): signal.getsignal(number) for number in _SIGNALS}

    def request(number: int, frame: FrameType | None) -> None:
        callback.received = number
        signal.signal(number, before[number])

    trainer.add_callback(callback)
    watched = [number for number, handler in before.items() if handler is not None]
    for number in watched:
        signal.signal(number, request)
    try:
        yield
    finally:
        for number in watched:
            signal.signal(number, before[number])
        trainer.remove_callback(callback)
    if callback.received is not None:
        _leave(trainer, callback.received)


def _leave(trainer: Trainer, received: int) -> None:
    state = trainer.state
    logger.warning(
        "%s stopped the run at step %d of %d, and a checkpoint was saved. Start the run again with the same "
        "settings and `resume_from_checkpoint=True` to go on.",
        signal.Signals(received).name,
        state.global_step,
        state.max_steps,
    )
    if received == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + received)
