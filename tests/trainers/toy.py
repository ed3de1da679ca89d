"""The smallest trainer with an artefact; run as a process, it meets what its arguments say. Not a test by itself."""

import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

from transformers_resps.trainers.base import ArtefactTrainer


class Line(nn.Module):
    """A line through points, with dropout: its training needs the random state of a checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.dropout = nn.Linear(8, 1), nn.Dropout(0.5)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.linear(self.dropout(x)) - y).square().mean()}


class ToyTrainer(ArtefactTrainer):
    artefact_name = "toy"

    def write_artefact(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: value.contiguous() for name, value in self.model.state_dict().items()}, folder / "toy.safetensors"
        )


def trainer(folder: Path, *callbacks: TrainerCallback, **settings: Any) -> ToyTrainer:
    """Twelve steps, a checkpoint every five."""
    torch.manual_seed(1)
    points = [{"x": torch.randn(8), "y": torch.randn(1)} for _ in range(40)]
    given = {
        "max_steps": 12,
        "save_steps": 5,
        "logging_steps": 4,
        "learning_rate": 0.1,
        "use_cpu": True,
        "label_names": ["y"],
    }
    given |= {"report_to": [], "per_device_train_batch_size": 2, "disable_tqdm": True, **settings}
    args = TrainingArguments(str(folder), **given)
    return ToyTrainer(Line(), args, None, points, points[:4], callbacks=list(callbacks))


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "toy" / "toy.safetensors")


class At(TrainerCallback):
    """Something happens in the middle of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.happen(control)

    def happen(self, control: Any) -> None:
        raise NotImplementedError


class Signal(At):
    """The process gets a signal; with `rank`, only that one of several does."""

    def __init__(self, step: int, number: int, rank: int | None = None) -> None:
        super().__init__(step)
        self.number, self.rank = number, rank

    def happen(self, control: Any) -> None:
        if self.rank in (None, int(os.environ.get("RANK", 0))):
            signal.raise_signal(self.number)


class FullDisk(At):
    """From here on no file may grow beyond a few bytes."""

    def happen(self, control: Any) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))


class Decision(At):
    """A callback of the user's ends the run."""

    def happen(self, control: Any) -> None:
        control.should_training_stop = True


EVENTS: dict[str, list[TrainerCallback]] = {
    "kill": [Signal(8, signal.SIGKILL)],
    "full disk": [FullDisk(8)],
    "one of two": [Signal(3, signal.SIGTERM, rank=1)],
}


if __name__ == "__main__":
    place, event = sys.argv[1:]
    trainer(Path(place), *EVENTS[event]).train()
