"""Show how a run goes: a bar, and a line per log that begins with the step."""

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from tqdm.auto import tqdm  # type: ignore[import-untyped]  # no stubs; Transformers depends on it
from transformers import ProgressCallback, TrainerControl, TrainerState, TrainingArguments


_IN_BAR = ("loss", "tokens_per_second", "eval_tau", "eval_gain_over_best_fixed")
_LEFT_OUT = ("total_flos", "epoch", "minutes_left")  # the last two are shown in another form


class TrainingProgress(ProgressCallback):
    """Transformers' bar with the newest metrics beside it; each log is one line with step, epoch and time left.

    Args:
        clock: in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # Transformers is untyped
        self._clock = clock
        self._began: tuple[float, int] | None = None  # seconds and step

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar, unless `disable_tqdm` is set."""
        self._began, self.current_step = None, state.global_step
        if state.is_world_process_zero and not args.disable_tqdm:
            self.training_bar = tqdm(total=state.max_steps, initial=state.global_step, dynamic_ncols=True, unit="step")

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note when the first step begins."""
        self._began = self._began or (self._clock(), state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the bar."""
        if self.training_bar is not None:
            super().on_step_end(args, state, control, **kwargs)  # type: ignore[no-untyped-call]

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Move the bar of an evaluation."""
        if not args.disable_tqdm:
            super().on_prediction_step(args, state, control, eval_dataloader, **kwargs)  # type: ignore[no-untyped-call]

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write one line."""
        if not state.is_world_process_zero or logs is None:
            return
        shown = {name: _readable(value) for name, value in logs.items() if name not in _LEFT_OUT}
        if self.training_bar is not None:
            self.training_bar.set_postfix({name: shown[name] for name in _IN_BAR if name in shown}, refresh=False)
        where = {"step": f"{state.global_step}/{state.max_steps}"}
        if state.epoch is not None:
            where["epoch"] = f"{state.epoch:.2f}"
        left = (
            {} if (seconds := self._seconds_left(state)) is None else {"ETA": str(timedelta(seconds=round(seconds)))}
        )
        tqdm.write("  ".join(f"{name} {value}" for name, value in (where | shown | left).items()))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        if self.training_bar is not None:
            super().on_train_end(args, state, control, **kwargs)  # type: ignore[no-untyped-call]

    def _seconds_left(self, state: TrainerState) -> float | None:
        """By the pace of this process; `None` before its first step and after the last."""
        if self._began is None or not self._began[1] < state.global_step < state.max_steps:
            return None
        began, first = self._began
        return (self._clock() - began) / (state.global_step - first) * (state.max_steps - state.global_step)


def _readable(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
