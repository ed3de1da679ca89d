"""Fit a learning rate schedule into a run that is shorter than it."""

import logging
from typing import Any

from transformers import TrainingArguments


logger = logging.getLogger(f"transformers.{__name__}")


def fit_schedule(args: TrainingArguments, steps: int) -> None:
    """Shorten the warmup and the decay in `args` in proportion, with a warning, if together they exceed the run.

    Transformers would begin in the middle of the decay, at a fraction of the learning rate.

    Args:
        args: `warmup_steps` and `lr_scheduler_kwargs["num_decay_steps"]` are changed.
        steps: optimiser steps of the run.
    """
    asked: dict[str, Any] = dict(args.lr_scheduler_kwargs or {})  # type: ignore[arg-type]  # a string is parsed before
    warmup, decay = args.get_warmup_steps(steps), asked.get("num_decay_steps", 0)
    if not isinstance(decay, int) or warmup + decay <= steps:
        return
    fitted = warmup * steps // (warmup + decay)
    args.warmup_steps = fitted
    if decay:
        args.lr_scheduler_kwargs = asked | {"num_decay_steps": steps - fitted}
    logger.warning(
        "The run has %d steps, fewer than the schedule's %d of warmup and %d of decay: it warms up for %d and decays "
        "for %d.",
        steps,
        warmup,
        decay,
        fitted,
        steps - fitted if decay else 0,
    )
