"""End a training run at Ctrl-C after the step it is in, with a checkpoint.

Transformers' own `enable_jit_checkpoint` does so for SIGTERM.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class GracefulStopCallback(TrainerCallback):
    """Saves a checkpoint and stops, once asked to.

    Args:
        steps: optimiser steps that belong together; the run stops after the last of them.

    Attributes:
        is_requested: set it to stop.
    """

    def __init__(self, steps: int) -> None:
        self.is_requested = False
        self._steps = steps

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Stop here, if asked to."""
        if self.is_requested and state.global_step % self._steps == 0:
            control.should_save = control.should_training_stop = True
        return control


@contextmanager
def graceful_stop(trainer: Trainer, steps: int = 1) -> Iterator[None]:
    """Inside, the first Ctrl-C makes `trainer` save a checkpoint and stop; a second one stops it at once.

    Nothing changes where Python does not get the signal, outside its main thread, nor in a run of several processes:
    each would stop at a step of its own, and wait for the others.

    Args:
        trainer: the trainer, about to train.
        steps: optimiser steps that belong together.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed, after the checkpoint.
    """
    before = signal.getsignal(signal.SIGINT)
    in_main_thread = threading.current_thread() is threading.main_thread()
    if trainer.accelerator.num_processes > 1 or not in_main_thread or before is None:
        yield
        return
    callback = GracefulStopCallback(steps)

    def request(*_: Any) -> None:
        callback.is_requested = True
        signal.signal(signal.SIGINT, before)

    trainer.add_callback(callback)
    signal.signal(signal.SIGINT, request)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        trainer.remove_callback(callback)
    if callback.is_requested:
        raise KeyboardInterrupt
