"""Which checkpoint a run resumes from, and schedules that fit into it."""

import logging
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments, get_scheduler

from transformers_resps.trainers.base import check_resumable, fit_schedule, newest_checkpoint


def checkpoint(folder: Path, step: int) -> Path:
    made = folder / f"checkpoint-{step}"
    made.mkdir()
    (made / "trainer_state.json").write_text("{}")
    return made


def test_the_newest_complete_checkpoint_is_resumed(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    for step in (90, 100):
        checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-110").mkdir()  # as a kill leaves it
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-100")


def test_a_run_goes_on_only_with_what_it_began_with(tmp_path: Path) -> None:
    facts = {"prompts": "a", "costs": "b"}
    check_resumable(tmp_path / "run", facts | {"costs": "of a run that wrote no checkpoint"})
    check_resumable(tmp_path / "run", facts)
    checkpoint(tmp_path / "run", 9)
    check_resumable(tmp_path / "run", facts)
    with pytest.raises(ValueError, match=r"checkpoint-9 was trained with other costs than now.*another `output_dir`"):
        check_resumable(tmp_path / "run", facts | {"costs": "c"})
    check_resumable(tmp_path / "run", facts)


def schedule(tmp_path, **settings) -> TrainingArguments:
    return TrainingArguments(str(tmp_path), use_cpu=True, learning_rate=1.0, **settings)


def rates(args: TrainingArguments, steps: int) -> list[float]:
    """The learning rate before each step, and after the last."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    warmup, special = args.get_warmup_steps(steps), args.lr_scheduler_kwargs
    scheduler = get_scheduler(args.lr_scheduler_type, optimizer, warmup, steps, special)
    found = []
    for _ in range(steps + 1):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return found


def decaying(tmp_path, decay: int) -> TrainingArguments:
    special = {"num_decay_steps": decay, "min_lr_ratio": 0.05, "decay_type": "linear"}
    return schedule(tmp_path, lr_scheduler_type="warmup_stable_decay", warmup_steps=20, lr_scheduler_kwargs=special)


def test_a_decay_longer_than_the_run_is_shortened_in_one_line(tmp_path, caplog):
    args = decaying(tmp_path, 200)
    assert max(rates(args, 40)) < 1.0  # the reason why
    with caplog.at_level(logging.WARNING):
        fit_schedule(args, 40)
    [said] = caplog.messages
    assert "warms up for 3 and decays for 37" in said
    found = rates(args, 40)
    assert max(found) == found[3] == 1.0 and found[-1] == pytest.approx(0.05)


def test_a_warmup_longer_than_the_run_takes_all_of_it(tmp_path, caplog):
    args = schedule(tmp_path, warmup_steps=100)
    fit_schedule(args, 10)
    assert args.get_warmup_steps(10) == 10 and "10 steps" in caplog.text


def test_a_schedule_that_fits_stays_as_it_is(tmp_path, caplog):
    args = decaying(tmp_path, 200)
    fit_schedule(args, 220)
    assert args.lr_scheduler_kwargs["num_decay_steps"] == 200 and args.warmup_steps == 20 and not caplog.messages
