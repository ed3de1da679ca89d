"""Which checkpoint a run goes on from, whether it may, and how long it took in all."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerControl

from transformers_resps.trainers.checkpoints import check_resumable, newest_checkpoint
from transformers_resps.trainers.timing import Stopwatch


def checkpoint(folder: Path, step: int) -> Path:
    made = folder / f"checkpoint-{step}"
    made.mkdir()
    (made / "trainer_state.json").write_text("{}")
    return made


def test_a_run_goes_on_only_with_what_it_began_with(tmp_path: Path) -> None:
    facts = {"prompts": "a", "costs": "b"}
    check_resumable(tmp_path / "run", facts | {"costs": "of a run that wrote no checkpoint"})
    check_resumable(tmp_path / "run", facts)
    checkpoint(tmp_path / "run", 9)
    check_resumable(tmp_path / "run", facts)
    with pytest.raises(ValueError, match=r"checkpoint-9 was trained with other costs than now.*another --output_dir"):
        check_resumable(tmp_path / "run", facts | {"costs": "c"})
    check_resumable(tmp_path / "run", facts)


def told(stopwatch: Stopwatch, event: str, folder: Path, step: int) -> None:
    args: Any = SimpleNamespace(output_dir=str(folder))
    state: Any = SimpleNamespace(global_step=step, is_world_process_zero=True)
    getattr(stopwatch, event)(args, state, TrainerControl())


def test_the_seconds_of_a_resumed_run_are_those_of_all_its_kept_steps(tmp_path: Path) -> None:
    now = [100.0]
    first = Stopwatch(clock=lambda: now[0])
    now[0] = 103  # preparing is not training
    told(first, "on_train_begin", tmp_path, 0)
    now[0] = 110
    checkpoint(tmp_path, 5)
    told(first, "on_save", tmp_path, 5)
    now[0] = 9000  # killed here, and started again on another day
    second = Stopwatch(newest_checkpoint(tmp_path), clock=lambda: now[0])
    told(second, "on_train_begin", tmp_path, 5)
    now[0] = 9004
    told(second, "on_train_end", tmp_path, 8)
    assert second.seconds == 7 + 4


def test_a_checkpoint_that_does_not_tell_its_seconds_leaves_them_unknown(tmp_path: Path) -> None:
    stopwatch = Stopwatch(checkpoint(tmp_path, 5), clock=lambda: 1.0)
    checkpoint(tmp_path, 8)
    told(stopwatch, "on_train_begin", tmp_path, 5)
    told(stopwatch, "on_save", tmp_path, 8)
    assert stopwatch.seconds is None and not list(tmp_path.glob("*/seconds.json"))
