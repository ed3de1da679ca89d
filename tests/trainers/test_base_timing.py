"""How long a training took in all."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import TrainerControl

from transformers_resps.trainers.base import TimingCallback


def tell(timing: TimingCallback, event: str, folder: Path, step: int) -> None:
    (folder / f"checkpoint-{step}").mkdir(exist_ok=True)
    args: Any = SimpleNamespace(output_dir=str(folder))
    state: Any = SimpleNamespace(global_step=step, is_world_process_zero=True)
    getattr(timing, event)(args, state, TrainerControl())


def test_the_seconds_of_a_resumed_run_are_those_of_all_its_kept_steps(tmp_path: Path) -> None:
    now = [100.0]
    first = TimingCallback(clock=lambda: now[0])
    now[0] = 103  # preparing is not training
    tell(first, "on_train_begin", tmp_path, 0)
    now[0] = 110
    tell(first, "on_save", tmp_path, 5)
    now[0] = 9000  # killed here, and started again on another day
    second = TimingCallback(clock=lambda: now[0])
    second.resume(tmp_path / "checkpoint-5")
    tell(second, "on_train_begin", tmp_path, 5)
    now[0] = 9004
    tell(second, "on_train_end", tmp_path, 8)
    assert second.seconds == 7 + 4


def test_a_checkpoint_that_does_not_tell_its_seconds_leaves_them_unknown(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-5").mkdir()
    timing = TimingCallback(clock=lambda: 1.0)
    timing.resume(tmp_path / "checkpoint-5")
    tell(timing, "on_train_begin", tmp_path, 5)
    tell(timing, "on_save", tmp_path, 8)
    assert timing.seconds is None and not list(tmp_path.glob("*/seconds.json"))
