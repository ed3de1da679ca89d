"""Trainers whose product is a folder beside the checkpoints, which is also what they push."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, cast

from torch import nn
from transformers import Trainer
from transformers.trainer_utils import HubStrategy

from ..hub import RESULTS, Destination, Existing, make_repository, upload
from .graceful_stop import graceful_stop


logger = logging.getLogger(f"transformers.{__name__}")

_UNMEASURED = Existing(refuse=(RESULTS,))


def _is_saved_with_weights(file: Path) -> bool:
    """Not a recipe, card or metrics that an earlier run left in the folder."""
    return file.name == "config.json" or file.suffix == ".safetensors"


class ArtefactTrainer(Trainer):
    """Trainer that keeps the newest head or policy in `OUTPUT_DIR/artefact_name` and pushes that folder to the Hub.

    Transformers' own trainer would push the whole output folder: weights in training precision, and
    `training_args.bin`, which is a pickle. With `hub_strategy="end"` there is one push, at the end; otherwise there is
    one at each checkpoint, too.
    """

    artefact_name: ClassVar[str]

    @property
    def artefact_folder(self) -> Path:
        return Path(cast(str, self.args.output_dir)) / self.artefact_name

    @property
    def steps_per_update(self) -> int:
        """Optimiser steps that belong together: Ctrl-C stops the run after the last of them."""
        return 1

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in Transformers. At Ctrl-C, the step is finished and a checkpoint saved first.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed.
        """
        with graceful_stop(self, self.steps_per_update):
            return super().train(*args, **kwargs)

    def save_artefact(self) -> None:
        """Write the current head or policy into `artefact_folder`."""
        raise NotImplementedError

    def push_to_hub(  # type: ignore[override]  # only those of Trainer's parameters that apply to a folder
        self, commit_message: str | None = "End of training", **where: Any
    ) -> Any:
        """Push the head's or policy's folder to `args.hub_model_id`, in one commit.

        Args:
            commit_message: subject of the commit.
            where: `token`, `revision` and `private`, if other than those of `args`.

        Returns:
            The address of the commit; `None` in all but one of several processes.

        Raises:
            OSError: the Hub refused, the connection broke, or the repository was published with measurements.
                Nothing was committed.
        """
        return self._push(commit_message or "End of training", lambda file: True, **where)

    def _push(self, message: str, belongs: Callable[[Path], bool], **where: Any) -> str | None:
        """Upload the files of the folder that belong to the commit; one of several processes does."""
        if not self.is_world_process_zero():
            return None
        self.save_artefact()
        folder = self.artefact_folder
        files: dict[str, Path | bytes] = {
            file.relative_to(folder).as_posix(): file
            for file in sorted(folder.rglob("*"))
            if file.is_file() and belongs(file)
        }
        return upload(files, self._destination(**where), message, existing=_UNMEASURED)

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
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            self.save_artefact()
        if self.args.push_to_hub and self.args.hub_strategy != HubStrategy.END:
            try:
                self._push(f"Training in progress, step {self.state.global_step}", _is_saved_with_weights)
            except OSError as error:  # the next checkpoint is pushed again; hours of training must not end here
                logger.warning("Step %d was not pushed: %s", self.state.global_step, error)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Does nothing: `_save_checkpoint` pushes in place of Transformers."""
