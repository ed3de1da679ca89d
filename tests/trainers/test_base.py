"""Which checkpoint a run resumes from, what is shown of a run, and schedules that fit into it."""

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments, get_scheduler

from transformers_resps.trainers.base import TrainingProgress, check_resumable, fit_schedule, newest_checkpoint


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


def test_a_log_is_one_line_with_step_epoch_metrics_and_time_left(tmp_path, capsys):
    clock = SimpleNamespace(seconds=100.0)
    progress = TrainingProgress(lambda: clock.seconds)
    args, control = TrainingArguments(str(tmp_path), use_cpu=True, disable_tqdm=True), TrainerControl()
    state = TrainerState(global_step=20, max_steps=60, epoch=0.25)
    progress.on_train_begin(args, state, control)
    progress.on_step_begin(args, state, control)
    clock.seconds, state.global_step = 130.0, 30
    progress.on_step_end(args, state, control)
    progress.on_log(args, state, control, logs={"loss": 3.14159265, "epoch": 0.25, "total_flos": 0.0})
    assert capsys.readouterr().out == "step 30/60  epoch 0.25  loss 3.142  ETA 0:01:30\n"


def test_the_bar_begins_where_a_resumed_run_does_and_shows_the_newest_metrics(tmp_path, capsys):
    progress = TrainingProgress()
    args, control = TrainingArguments(str(tmp_path), use_cpu=True, disable_tqdm=False), TrainerControl()
    state = TrainerState(global_step=20, max_steps=60, epoch=0.25)
    progress.on_train_begin(args, state, control)
    progress.on_log(args, state, control, logs={"loss": 2.5, "tokens_per_second": 812.0})
    bar = progress.training_bar
    assert (bar.n, bar.total, bar.postfix) == (20, 60, "loss=2.5, tokens_per_second=812")
    progress.on_train_end(args, state, control)
    assert progress.training_bar is None


def test_other_processes_show_nothing(tmp_path, capsys):
    progress = TrainingProgress()
    args, control = TrainingArguments(str(tmp_path), use_cpu=True), TrainerControl()
    state = TrainerState(global_step=1, max_steps=2, is_world_process_zero=False)
    progress.on_train_begin(args, state, control)
    progress.on_log(args, state, control, logs={"loss": 1.0})
    progress.on_train_end(args, state, control)
    shown = capsys.readouterr()
    assert not shown.out + shown.err


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
