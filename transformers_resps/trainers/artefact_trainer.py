"""Trainers whose product is a folder beside the checkpoints, which is also what they push."""

import logging
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import nn
from transformers import EarlyStoppingCallback, ProgressCallback, Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.trainer_utils import HubStrategy, TrainOutput

from ..hub import CARD, RESULTS, Destination, Existing, make_repository, upload
from .checkpoints import newest_checkpoint
from .interruption import interruptible
from .progress import TrainingProgress
from .schedules import fit_schedule
from .writing import written


logger = logging.getLogger(f"transformers.{__name__}")

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
