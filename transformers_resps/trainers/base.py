"""Check what a trainer is given before it starts to work.

Find the checkpoint that a killed run resumes from, and check that the run may resume from it.

Say what to do when a file of a run cannot be written, most often because the disk is full.

Show how a run goes: a bar, and a line per log that begins with the step.

Fit a learning rate schedule into a run that is shorter than it.

End a training run at Ctrl-C or SIGTERM after the step it is in, with a checkpoint.

Schedulers such as Slurm, Kubernetes and Docker send SIGTERM before they kill a process.

Trainers whose product is a folder beside the checkpoints, which is also what they push.
"""

import json
import logging
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, cast

import torch
from safetensors import SafetensorError
from torch import nn
from tqdm.auto import tqdm  # type: ignore[import-untyped]  # no stubs; Transformers depends on it
from transformers import (
    EarlyStoppingCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.trainer_utils import HubStrategy, TrainOutput

from ..hub import CARD, RESULTS, Destination, Existing, make_repository, upload


def check_kinds(trainer: str, **given: tuple[Any, type[Any]]) -> None:
    """Check the types of arguments; `given` maps each name to its value and the type it must have.

    Raises:
        ValueError: names the first of a wrong type.
    """
    for name, (value, kind) in given.items():
        if not isinstance(value, kind):
            raise ValueError(
                f"{trainer} got a {type(value).__name__} as `{name}`, but it needs a `{kind.__name__}`. Make one as "
                "docs/train-a-head.md and docs/tune-a-policy.md show."
            )


def check_dataset(dataset: Any, name: str, *, may_stream: bool) -> None:
    """Check that a dataset is of a class that can be prepared.

    Args:
        dataset: as given to a trainer.
        name: of the argument.
        may_stream: whether an `IterableDataset` will do.

    Raises:
        ValueError: names its class, or its splits.
    """
    import datasets

    if isinstance(dataset, Mapping):
        splits = [str(split) for split in dataset]
        raise ValueError(
            f"`{name}` is a {type(dataset).__name__} of the splits {splits}, but must be one of them. Pass, for "
            f"instance, `dataset[{splits[0] if splits else 'train'!r}]`."
        )
    if isinstance(dataset, datasets.IterableDataset) and not may_stream:
        raise ValueError(
            f"`{name}` is an `IterableDataset`, but its prompts are read many times. Take the first n: "
            "`Dataset.from_list(list(dataset.take(200)))`."
        )
    if not isinstance(dataset, datasets.Dataset | datasets.IterableDataset):
        raise ValueError(
            f"`{name}` is a {type(dataset).__name__}, but must be a `Dataset`{' or `IterableDataset`' * may_stream} "
            "of the package `datasets`. Make one with `Dataset.from_list(rows)` or `load_dataset`."
        )


def check_setting(config: Any, name: str, is_valid: bool, needed: str) -> None:
    """Check a setting of a trainer's `config`.

    Raises:
        ValueError: it is not valid; `needed` says what would be.
    """
    if not is_valid:
        raise ValueError(
            f"`{name}` is {getattr(config, name)!r}, but it must be {needed}. See `{type(config).__name__}`."
        )


_FACTS = "run.json"


def newest_checkpoint(folder: str | Path) -> str | None:
    """The newest complete checkpoint in an output folder: `trainer_state.json` is the last file that is written.

    Transformers' `get_last_checkpoint` would also return one that a kill left incomplete, which cannot be loaded.
    """
    complete = [path.parent for path in Path(folder).glob("checkpoint-*/trainer_state.json")]
    return str(max(complete, key=lambda path: int(path.name.split("-")[1]))) if complete else None


def check_resumable(folder: str | Path, facts: dict[str, str]) -> None:
    """Check that the checkpoints in an output folder were trained on what this run trains on.

    Args:
        folder: the output folder. Its `run.json` keeps the facts.
        facts: name of each input of the run -> a hash of it.

    Raises:
        ValueError: names the inputs that differ.
    """
    file = Path(folder) / _FACTS
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else facts
    changed = [name for name, value in facts.items() if before.get(name) != value]
    if changed and (checkpoint := newest_checkpoint(folder)):
        raise ValueError(
            f"{checkpoint} was trained with other {', '.join(changed)} than now. "
            "Pass another --output_dir, or the same inputs as that run."
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    written = file.with_suffix(".tmp")
    written.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    written.replace(file)  # a kill or a full disk leaves the old one


@contextmanager
def written(place: str | Path) -> Iterator[None]:
    """Inside, files of a run are written; PyTorch and safetensors raise errors of their own.

    Raises:
        OSError: names the place, the fault and the way on.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        fault = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise OSError(
            f"Writing {place} failed: {fault}. Free disk space and start the run again with the same settings: it "
            "goes on from the newest complete checkpoint."
        ) from error


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


_UNMEASURED = Existing(refuse=(RESULTS,))


def _is_saved_with_weights(file: Path) -> bool:
    """Not a recipe, card or metrics that an earlier run left in the folder."""
    return file.name == "config.json" or file.suffix == ".safetensors"


class ArtefactTrainer(Trainer):
    """Trainer whose product is a head or a policy, in `OUTPUT_DIR/artefact_name`; it pushes that folder to the Hub.

    The folder is written when the run has reached `max_steps`, or early stopping ended it. Until then the newest state
    is in `OUTPUT_DIR/artefact_name-unfinished`, written at each checkpoint.

    Transformers' own trainer would push the whole output folder: weights in training precision, and
    `training_args.bin`, which is a pickle. With `hub_strategy="end"` there is one push, at the end; otherwise there is
    one at each checkpoint, too.
    """

    artefact_name: ClassVar[str]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._replace_callbacks()

    def _replace_callbacks(self) -> None:
        """Transformers' `enable_jit_checkpoint` saves in the middle of a step, and what resumes there differs."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, JITCheckpointCallback):
                callback.on_train_end(self.args, self.state, self.control)  # gives its signal back
        self.remove_callback(JITCheckpointCallback)
        if any(type(callback) in (ProgressCallback, PrinterCallback) for callback in self.callback_handler.callbacks):
            self.remove_callback(ProgressCallback)  # a notebook's table stays
            self.remove_callback(PrinterCallback)
            self.add_callback(TrainingProgress())

    @property
    def artefact_folder(self) -> Path:
        """Where the product of a finished run is."""
        return Path(cast(str, self.args.output_dir)) / self.artefact_name

    @property
    def unfinished_folder(self) -> Path:
        """Where the newest state of a run is that has not ended."""
        return self.artefact_folder.with_name(f"{self.artefact_name}-unfinished")

    @property
    def is_finished(self) -> bool:
        """Whether the run reached `max_steps`, or early stopping ended it; true before `train`."""
        return self.state.global_step >= self.state.max_steps or any(
            isinstance(callback, EarlyStoppingCallback)
            and callback.early_stopping_patience_counter >= callback.early_stopping_patience
            for callback in self.callback_handler.callbacks
        )

    @property
    def steps_per_update(self) -> int:
        """Optimiser steps that belong together: an interrupted run stops after the last of them."""
        return 1

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in Transformers; then `artefact_folder` is written. At SIGINT or SIGTERM a checkpoint is saved first.

        Args:
            resume_from_checkpoint: a checkpoint's folder; `True` for the newest complete one in `output_dir`.
            args: see `transformers.Trainer.train`.
            kwargs: see there.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed.
            SystemExit: SIGTERM was received.
        """
        if resume_from_checkpoint is True:  # a kill may have left a newer one incomplete
            resume_from_checkpoint = newest_checkpoint(cast(str, self.args.output_dir)) or True
        with interruptible(self, self.steps_per_update):
            result = self._restored(resume_from_checkpoint) if isinstance(resume_from_checkpoint, str) else None
            if result is None:
                result = super().train(resume_from_checkpoint, *args, **kwargs)
            if self.is_finished and self.args.should_save:
                self._finish()
        return result

    def _restored(self, checkpoint: str) -> TrainOutput | None:
        """The end of a run that has taken all its steps before: Transformers would take one more."""
        state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
        if state.global_step < (self.args.max_steps if self.args.max_steps > 0 else state.max_steps):
            return None
        state.is_local_process_zero, state.is_world_process_zero = (
            self.is_local_process_zero(),
            self.is_world_process_zero(),
        )
        self.state = state
        is_best_kept = self.args.load_best_model_at_end and state.best_model_checkpoint is not None
        self._load_from_checkpoint(state.best_model_checkpoint if is_best_kept else checkpoint)
        logger.warning("The run has taken its %d steps before: nothing is trained.", state.global_step)
        return TrainOutput(state.global_step, 0.0, {})

    def write_artefact(self, folder: Path) -> None:
        """Write the current head or policy into `folder`, as it is served."""
        raise NotImplementedError

    def plain_card(self, repo_id: str) -> str:
        """The card of a repository that has no other."""
        raise NotImplementedError

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the head or policy as it is served, by default into `artefact_folder`.

        Raises:
            ValueError: no folder was passed, and the run has not finished.
        """
        if _internal_call:  # a checkpoint, in training precision
            super().save_model(output_dir, _internal_call=True)
        elif self.args.should_save:
            if output_dir is None:
                self._check_finished("saved")
            self.write_artefact(Path(output_dir) if output_dir else self.artefact_folder)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """As in Transformers, but a schedule longer than the run is shortened, with a warning."""
        fit_schedule(self.args, num_training_steps)
        return super().create_scheduler(num_training_steps, optimizer)

    def push_to_hub(  # type: ignore[override]  # only those of Trainer's parameters that apply to a folder
        self, commit_message: str | None = "End of training", **where: Any
    ) -> Any:
        """Push the head's or policy's folder to `args.hub_model_id`, in one commit; a plain card if there is none.

        Args:
            commit_message: subject of the commit.
            where: `token`, `revision` and `private`, if other than those of `args`.

        Returns:
            The address of the commit; `None` in all but one of several processes.

        Raises:
            ValueError: the run has not finished.
            OSError: the Hub refused, the connection broke, or the repository was published with measurements.
                Nothing was committed.
        """
        self._check_finished("pushed")
        if not self.is_world_process_zero():
            return None
        self.save_model()
        card = self.plain_card(self._destination().repo_id).encode()
        return self._push(self.artefact_folder, commit_message or "End of training", lambda file: True, card, **where)

    def _check_finished(self, what: str) -> None:
        if not self.is_finished:
            raise ValueError(
                f"The run stopped at step {self.state.global_step} of {self.state.max_steps}, so its "
                f"{self.artefact_name} is not {what}. Train on with `resume_from_checkpoint=True`; the newest state "
                f"is in {self.unfinished_folder}."
            )

    def _finish(self) -> None:
        """Write the product beside its place, then move it there file by file: a kill leaves no half-written file."""
        with written(self.unfinished_folder):
            self.write_artefact(self.unfinished_folder)
        self.artefact_folder.mkdir(parents=True, exist_ok=True)
        for file in _files(self.unfinished_folder):
            place = self.artefact_folder / file.relative_to(self.unfinished_folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            file.replace(place)
        shutil.rmtree(self.unfinished_folder)

    def _push(
        self, folder: Path, message: str, belongs: Callable[[Path], bool], card: bytes | None = None, **where: Any
    ) -> str | None:
        """Upload the files that belong to the commit, and `card` where neither folder nor repository has one."""
        files: dict[str, Path | bytes] = {
            file.relative_to(folder).as_posix(): file for file in _files(folder) if belongs(file)
        }
        existing = _UNMEASURED
        if card is not None and CARD not in files:
            files[CARD], existing = card, replace(_UNMEASURED, keep=(CARD,))
        return upload(files, self._destination(**where), message, existing=existing)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository before training, so that a refusal costs no work.

        Raises:
            OSError: the Hub refused, or the repository was published with measurements.
        """
        if self.is_world_process_zero():
            made: Any = make_repository(self._destination(), _UNMEASURED)
            self.hub_model_id = made  # Transformers infers that it is None

    def _destination(self, **where: Any) -> Destination:
        args = self.args
        return Destination(
            args.hub_model_id or Path(cast(str, args.output_dir)).absolute().name,
            private=where.get("private", args.hub_private_repo),
            token=where.get("token", args.hub_token),
            revision=where.get("revision", args.hub_revision),
        )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with written(cast(str, self.args.output_dir)):
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                self.write_artefact(self.unfinished_folder)
        if self.args.push_to_hub and self.args.hub_strategy != HubStrategy.END and self.is_world_process_zero():
            message = f"Training in progress, step {self.state.global_step}"
            try:
                self._push(self.unfinished_folder, message, _is_saved_with_weights)
            except OSError as error:  # the next checkpoint is pushed again; hours of training must not end here
                logger.warning("Step %d was not pushed: %s", self.state.global_step, error)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Does nothing: `_save_checkpoint` pushes in place of Transformers."""


def _files(folder: Path) -> Iterable[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())
