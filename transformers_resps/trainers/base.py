"""The base class of both trainers: writes the result, handles interruption and resumption, and checks settings."""

import json
import logging
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import field, fields, replace
from enum import Enum
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, TypeVar

import torch
import yaml
from safetensors import SafetensorError
from torch import nn
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, TrainOutput

from ..hub.upload import CARD, METRICS, RECIPE, RESULTS, Destination, Existing, make_repository, upload


logger = logging.getLogger(f"transformers.{__name__}")

Value = TypeVar("Value")

_UNMEASURED = Existing(refuse=(RESULTS,))  # A results file describes the weights that the upload would replace.


class ArtefactTrainer(Trainer):
    """Trains a head or policy, writes it to `OUTPUT_DIR/artefact_name`, and pushes only that folder to the Hub.

    A finished run writes the folder, with the run's settings in `recipe.yaml`, and the run's length and the results of
    later evaluations in `metrics.json`. Before that, each checkpoint writes the current head or policy to
    `OUTPUT_DIR/artefact_name-unfinished` and, unless `hub_strategy="end"`, pushes it. Transformers' `Trainer` would
    instead push the weights in training precision, and a pickle.
    """

    artefact_name: ClassVar[str]
    steps_per_update = 1  # number of optimiser steps; an interrupted run stops at the end of an update

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._is_trained = False
        self._timing = TimingCallback()
        self.add_callback(self._timing)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, JITCheckpointCallback):
                callback.on_train_end(self.args, self.state, self.control)  # restores its signal handler
        self.remove_callback(JITCheckpointCallback)  # it saves in the middle of a step, so a resumed run would differ

    def write_artefact(self, folder: Path) -> None:
        """Write the current head or policy to `folder`, in the form and precision for decoding."""
        raise NotImplementedError

    def plain_card(self, repo_id: str) -> str:
        """Return a minimal model card, which is added to the repository `repo_id` if it has none."""
        raise NotImplementedError

    def metrics(self) -> dict[str, Any]:
        """Return the content of `metrics.json` for a finished run; the entry `training` says how long the run was."""
        return {"training": {"steps": self.state.global_step}}

    def models(self) -> dict[str, str | None]:
        """Return the folder or Hub id of each model that the run started from, by role: "target" or "head"."""
        return {}

    @property
    def artefact_folder(self) -> Path:
        return Path(str(self.args.output_dir)) / self.artefact_name

    @property
    def is_finished(self) -> bool:
        """Whether the run has reached `max_steps` or was stopped early; also true before the first call of `train`."""
        return self.state.global_step >= self.state.max_steps or any(
            isinstance(callback, EarlyStoppingCallback)
            and callback.early_stopping_patience_counter >= callback.early_stopping_patience
            for callback in self.callback_handler.callbacks
        )

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as Transformers' `Trainer` does, and write `artefact_folder` if the run has finished.

        `resume_from_checkpoint` is a checkpoint's folder, or `True` for the newest complete checkpoint in
        `output_dir`. After SIGINT or SIGTERM, a checkpoint is saved and `KeyboardInterrupt` or `SystemExit` raised.
        """
        if resume_from_checkpoint is True:  # the newest checkpoint may be incomplete after a kill
            resume_from_checkpoint = newest_checkpoint(str(self.args.output_dir)) or True
        if isinstance(resume_from_checkpoint, str):
            self._timing.resume(resume_from_checkpoint)
        with interruptible(self, self.steps_per_update):
            result = self._restored(resume_from_checkpoint) if isinstance(resume_from_checkpoint, str) else None
            if result is None:
                result = super().train(resume_from_checkpoint, *args, **kwargs)
            if self.is_finished and self.args.should_save:
                write_whole(self.artefact_folder, self._write_finished)
        self._is_trained = self.is_finished
        return result

    def _write_finished(self, folder: Path) -> None:
        self.write_artefact(folder)
        add_metrics(folder, self.metrics())
        write_recipe(folder, self.args, type(self).__name__, self.models())

    def _restored(self, checkpoint: str) -> TrainOutput | None:
        """If no steps of the run are left after `checkpoint`, load it and return a result; otherwise return `None`."""
        state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
        if state.global_step < (self.args.max_steps if self.args.max_steps > 0 else state.max_steps):
            return None
        state.is_local_process_zero = self.is_local_process_zero()
        state.is_world_process_zero = self.is_world_process_zero()
        self.state = state
        is_best_kept = self.args.load_best_model_at_end and state.best_model_checkpoint is not None
        self._load_from_checkpoint(state.best_model_checkpoint if is_best_kept else checkpoint)
        logger.warning("The run has taken its %d steps before: nothing is trained.", state.global_step)
        return TrainOutput(state.global_step, 0.0, {})

    def create_scheduler(self, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
        fit_schedule(self.args, num_training_steps)
        return super().create_scheduler(num_training_steps, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the head or policy for decoding to `output_dir`, by default `artefact_folder` of a finished run."""
        if _internal_call:  # a checkpoint, in training precision
            super().save_model(output_dir, _internal_call=True)
        elif self.args.should_save:
            if output_dir is None:
                self._check_finished("saved")
            self.write_artefact(Path(output_dir) if output_dir else self.artefact_folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = _unfinished(self.artefact_folder)
        with written(str(self.args.output_dir)):
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                self.write_artefact(folder)
        if self.args.push_to_hub and self.args.hub_strategy != HubStrategy.END and self.is_world_process_zero():
            message = f"Training in progress, step {self.state.global_step}"
            files = [*folder.glob("config.json"), *folder.glob("*.safetensors")]  # no card or metrics of earlier runs
            try:
                push_folder(folder, self.args, message, files=files)
            except OSError as error:  # training goes on: the next checkpoint is pushed, too
                logger.warning("Step %d was not pushed: %s", self.state.global_step, error)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Do nothing, although Transformers would push here: `_save_checkpoint` has pushed already."""

    def push_to_hub(  # type: ignore[override]  # without Trainer's other parameters, which do not apply to a folder
        self, commit_message: str | None = "End of training", **where: Any
    ) -> Any:
        """Push `artefact_folder` to `args.hub_model_id` in one commit and return the commit's URL.

        A minimal card is added if there is none. `where` overrides `token`, `revision` or `private` of `args`. With
        several processes, only the main process pushes; the others return `None`. Raises `ValueError` if the run has
        not finished, `FileExistsError` if the repository has a results file, and the other errors of `upload`.
        """
        self._check_finished("pushed")
        if not self.is_world_process_zero():
            return None
        self.save_model()
        card = self.plain_card(destination_of(self.args).repo_id)
        return push_folder(self.artefact_folder, self.args, commit_message or "End of training", card=card, **where)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the Hub repository. Transformers calls this before training, so that a refusal loses no work."""
        if self.is_world_process_zero():
            self.hub_model_id: Any = make_unmeasured_repository(self.args)

    def _check_finished(self, what: str) -> None:
        if not self.is_finished:
            raise ValueError(
                f"The run stopped at step {self.state.global_step} of {self.state.max_steps}, so its "
                f"{self.artefact_name} is not {what}. Train on with `resume_from_checkpoint=True`; the newest state "
                f"is in {_unfinished(self.artefact_folder)}."
            )


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _unfinished(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}-unfinished")


def write_whole(folder: Path, write: Callable[[Path], None]) -> None:
    """Call `write` with a temporary folder, then move the files to `folder`, which thus never has a partial file."""
    unfinished = _unfinished(folder)
    with written(unfinished):
        write(unfinished)
    for file in _files(unfinished):
        place = folder / file.relative_to(unfinished)
        place.parent.mkdir(parents=True, exist_ok=True)
        file.replace(place)
    shutil.rmtree(unfinished)


def add_metrics(folder: Path, metrics: dict[str, Any]) -> None:
    """Write `metrics` into `metrics.json` in a head's or policy's folder; entries there with other names are kept."""
    file = folder / METRICS
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    file.write_text(json.dumps(known | metrics, indent=2) + "\n", encoding="utf-8")


_LOCAL_SUFFIXES = ("_dir", "_token", "run_name", "local_rank")  # Recipes leave out settings whose names end so.


def write_recipe(folder: Path, args: TrainingArguments, trainer: str, models: Mapping[str, str | None]) -> None:
    """Write `recipe.yaml`: the names of a run's models, and its settings that differ from the defaults."""
    settings: dict[str, Any] = {}
    for setting in fields(args):
        default = setting.default_factory() if callable(setting.default_factory) else setting.default
        value = getattr(args, setting.name)
        value = value.value if isinstance(value, Enum) else value
        if value != default and not setting.name.endswith(_LOCAL_SUFFIXES) and _is_plain(value):
            settings[setting.name] = value
    names = {
        name: Path(model).resolve().name if model and Path(model).is_dir() else model for name, model in models.items()
    }
    head = f"# Written by {trainer}. `card` is missing: PUBLISHING.md beside the scripts says what a card tells.\n"
    (folder / RECIPE).write_text(head + yaml.safe_dump(names | settings, sort_keys=False), encoding="utf-8")


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(name, str) and _is_plain(part) for name, part in value.items())
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return isinstance(value, str | int | float | None)


@contextmanager
def written(place: str | Path) -> Iterator[None]:
    """If writing files in the `with` block fails, raise an `OSError` that names `place`, the cause and a remedy."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        fault = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise OSError(
            f"Writing {place} failed: {fault}. Free disk space and start the run again with the same settings: it "
            "goes on from the newest complete checkpoint."
        ) from error


def destination_of(args: TrainingArguments, **where: Any) -> Destination:
    """Return the Hub repository of a run; `where` overrides `token`, `revision` and `private` of `args`."""
    return Destination(
        args.hub_model_id or Path(str(args.output_dir)).absolute().name,
        private=where.get("private", args.hub_private_repo),
        token=where.get("token", args.hub_token),
        revision=where.get("revision", args.hub_revision),
    )


def make_unmeasured_repository(args: TrainingArguments) -> str:
    """Create a run's repository if missing, and return its id; raise `FileExistsError` if it has a results file."""
    return make_repository(destination_of(args), _UNMEASURED)


def push_folder(
    folder: Path,
    args: TrainingArguments,
    message: str = "End of training",
    *,
    files: list[Path] | None = None,
    card: str | None = None,
    **where: Any,
) -> str:
    """Upload a folder, or only `files` of it, in one commit; return the commit's URL. `card` is added if missing."""
    paths = _files(folder) if files is None else files
    content: dict[str, Path | bytes] = {file.relative_to(folder).as_posix(): file for file in paths}
    existing = _UNMEASURED
    if card is not None and CARD not in content:
        content[CARD], existing = card.encode(), replace(_UNMEASURED, keep=(CARD,))
    return upload(content, destination_of(args, **where), message, existing=existing)


def newest_checkpoint(folder: str | Path) -> str | None:
    """Return the newest complete checkpoint in `folder`, or `None`; `trainer_state.json` shows that it is complete."""
    complete = [path.parent for path in Path(folder).glob(f"checkpoint-*/{TRAINER_STATE_NAME}")]
    return str(max(complete, key=lambda path: int(path.name.split("-")[1]))) if complete else None


def check_resumable(folder: str | Path, facts: dict[str, str]) -> None:
    """Raise `ValueError` if `folder` has a checkpoint with other `facts` (input -> hash); else store `facts` there."""
    file = Path(folder) / "run.json"
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else facts
    changed = [name for name, value in facts.items() if before.get(name) != value]
    if changed and (checkpoint := newest_checkpoint(folder)):
        raise ValueError(
            f"{checkpoint} was trained with other {', '.join(changed)} than now. "
            "Pass another `output_dir`, or the same inputs as that run."
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_suffix(".tmp")
    new.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    new.replace(file)  # after a kill or with a full disk, the old file remains


class InterruptionCallback(TrainerCallback):
    """After a signal to any process, saves a checkpoint and stops all processes at the same multiple of `steps`."""

    def __init__(self, trainer: Trainer, steps: int) -> None:
        self.received: int | None = None
        self._trainer, self._steps = trainer, steps

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        if state.global_step % self._steps == 0:
            accelerator = self._trainer.accelerator
            if accelerator.num_processes > 1:
                received = torch.tensor([self.received or 0], device=accelerator.device)
                self.received = int(accelerator.gather(received).max()) or None
            if self.received is not None:
                control.should_save = control.should_training_stop = True


@contextmanager
def interruptible(trainer: Trainer, steps: int = 1) -> Iterator[None]:
    """On a SIGINT or SIGTERM in the `with` block, save a checkpoint and stop at the next multiple of `steps` steps.

    Then raise `KeyboardInterrupt` or, for SIGTERM, `SystemExit` with status 143. A second signal stops immediately.
    Outside Python's main thread this has no effect.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    callback = InterruptionCallback(trainer, steps)
    handlers = {int(number): signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    handlers = {number: handler for number, handler in handlers.items() if handler is not None}

    def request(number: int, frame: FrameType | None) -> None:
        callback.received = number
        signal.signal(number, handlers[number])

    trainer.add_callback(callback)
    for number in handlers:
        signal.signal(number, request)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        trainer.remove_callback(callback)
    if callback.received is None:
        return
    logger.warning(
        f"{signal.Signals(callback.received).name} stopped the run at step {trainer.state.global_step} of "
        f"{trainer.state.max_steps}, and a checkpoint was saved. Start the run again with the same settings and "
        "`resume_from_checkpoint=True` to go on."
    )
    if callback.received == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + callback.received)


def fit_schedule(args: TrainingArguments, steps: int) -> None:
    """If warmup and decay in `args` together exceed the run's `steps`, shorten both in proportion, and warn."""
    # otherwise Transformers would start the run in the middle of the decay
    asked: dict[str, Any] = dict(args.lr_scheduler_kwargs or {})  # type: ignore[arg-type]  # a string is parsed before
    warmup, decay = args.get_warmup_steps(steps), asked.get("num_decay_steps", 0)
    if not isinstance(decay, int) or warmup + decay <= steps:
        return
    args.warmup_steps = fitted = warmup * steps // (warmup + decay)
    if decay:
        args.lr_scheduler_kwargs = asked | {"num_decay_steps": steps - fitted}
    logger.warning(
        f"The run has {steps} steps, fewer than the schedule's {warmup} of warmup and {decay} of decay: it warms up "
        f"for {fitted} and decays for {steps - fitted if decay else 0}."
    )


_SECONDS = "seconds.json"


class TimingCallback(TrainerCallback):
    """Counts the seconds of training and saves them with every checkpoint, so that a resumed run goes on counting."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds: float | None = 0.0  # `None` after resuming from a checkpoint that does not store the seconds
        self._clock, self._last = clock, clock()

    def resume(self, checkpoint: str | Path) -> None:
        file = Path(checkpoint) / _SECONDS
        self.seconds = float(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._last = self._clock()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: Any, **_: Any) -> None:
        self._advance()
        if state.is_world_process_zero and self.seconds is not None:
            folder = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            (folder / _SECONDS).write_text(json.dumps(self.seconds), encoding="utf-8")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._advance()

    def _advance(self) -> None:
        now = self._clock()
        if self.seconds is not None:
            self.seconds += now - self._last
        self._last = now


InitKwargs = dict[str, Any] | str | None  # keywords for loading a model; on a command line a string of JSON


def option(default: Value, help: str) -> Value:
    """Make a dataclass field of a trainer's settings; the scripts show `help` in their `--help`."""
    return field(default=default, metadata={"help": help})


def check_type(name: str, value: Any, *kinds: type[Any]) -> None:
    """Raise `ValueError` if `value`, passed as the argument `name`, has none of the types `kinds`."""
    if not isinstance(value, kinds):
        needed = " or ".join(f"`{kind.__name__}`" for kind in kinds)
        raise ValueError(
            f"`{name}` is a {type(value).__name__}, but must be a {needed}. Pass an object of that class."
        )


def check_setting(config: TrainingArguments, name: str, is_valid: bool, needed: str) -> None:
    """Raise `ValueError` unless `is_valid`; the message states the setting `name`, its value, and `needed`."""
    if not is_valid:
        raise ValueError(
            f"`{name}` is {getattr(config, name)!r}, but it must be {needed}. See `{type(config).__name__}`."
        )


def check_count(config: TrainingArguments, name: str, least: int, otherwise: str = "") -> None:
    """Raise `ValueError` unless the setting `name` is an int, `least` or more; `otherwise` says what else is valid."""
    value = getattr(config, name)
    check_setting(config, name, isinstance(value, int) and value >= least, f"a whole number from {least}{otherwise}")


def check_mapping(config: TrainingArguments, name: str) -> None:
    """Raise `ValueError` if the setting `name` is neither a dict nor `None`."""
    value = getattr(config, name)
    check_setting(config, name, value is None or isinstance(value, dict), "a dict or None, in a recipe a mapping")
