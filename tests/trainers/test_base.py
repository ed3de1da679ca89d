"""Which checkpoint a run resumes from, and schedules that fit into it."""

import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import EarlyStoppingCallback, TrainerControl, TrainingArguments, get_scheduler

from tests.trainers.toy import Decision, Signal, trainer, weights
from transformers_resps.trainers.base import (
    TimingCallback,
    check_resumable,
    fit_schedule,
    interruptible,
    newest_checkpoint,
)


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


# How long a training took in all.
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


# Runs that are stopped in any way save what they have, say so, and go on as if nothing had happened.
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, torch.Tensor]:
    """What an uninterrupted run ends with."""
    folder = tmp_path_factory.mktemp("whole")
    trainer(folder).train()
    return weights(folder)


def check_resumes(folder: Path, whole: dict[str, torch.Tensor], **settings) -> None:
    trainer(folder, **settings).train(resume_from_checkpoint=True)
    found = weights(folder)
    assert all(torch.equal(value, whole[name]) for name, value in found.items())
    assert not (folder / "toy-unfinished").exists()


@pytest.fixture
def default_handlers():
    """A shell's background job ignores Ctrl-C."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("default_handlers")
@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_ends_the_step_saves_a_checkpoint_and_leaves_unfinished(tmp_path, whole, number, error, caplog):
    stopped = trainer(tmp_path, Signal(7, number), save_strategy="no")
    handlers = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(error) as raised:
        stopped.train()
    assert error is KeyboardInterrupt or raised.value.code == 143
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-8")
    assert f"{signal.Signals(number).name} stopped the run at step 8 of 12" in caplog.text
    assert (tmp_path / "toy-unfinished").is_dir() and not (tmp_path / "toy").exists()
    for refused in (stopped.push_to_hub, stopped.save_model):
        with pytest.raises(ValueError, match=r"stopped at step 8 of 12.*resume_from_checkpoint=True"):
            refused()
    stopped.save_model(str(tmp_path / "as-it-is"))
    assert (tmp_path / "as-it-is" / "toy.safetensors").is_file()
    check_resumes(tmp_path, whole, save_strategy="no")


@pytest.mark.usefixtures("default_handlers")
def test_just_in_time_checkpoints_of_transformers_are_whole_steps_too(tmp_path, whole):
    stopped = trainer(tmp_path, Signal(7, signal.SIGTERM), enable_jit_checkpoint=True)
    with pytest.raises(SystemExit) as raised:
        stopped.train()
    assert raised.value.code == 143 and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-8") and not (tmp_path / "toy").exists()
    check_resumes(tmp_path, whole)


@pytest.mark.usefixtures("default_handlers")
def test_a_second_signal_ends_at_once(tmp_path):
    came_to = []
    with pytest.raises(KeyboardInterrupt), interruptible(trainer(tmp_path)):
        signal.raise_signal(signal.SIGINT)
        came_to.append("after the first")
        signal.raise_signal(signal.SIGINT)
        came_to.append("after the second")
    assert came_to == ["after the first"]


def test_signals_stay_as_they_are_outside_the_main_thread(tmp_path):
    ended = []
    thread = threading.Thread(target=lambda: ended.append(trainer(tmp_path, max_steps=1).train()))
    thread.start()
    thread.join()
    assert ended and (tmp_path / "toy").is_dir()


def test_a_run_that_a_callback_ends_is_unfinished_unless_it_is_early_stopping(tmp_path, whole):
    stopped = trainer(tmp_path, Decision(6))
    stopped.train()
    assert not stopped.is_finished and not (tmp_path / "toy").exists()
    check_resumes(tmp_path, whole)

    early = EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=1e9)
    best = {"eval_strategy": "steps", "eval_steps": 5, "metric_for_best_model": "loss", "load_best_model_at_end": True}
    stopped = trainer(tmp_path / "early", early, **best)
    stopped.train()
    assert stopped.state.global_step == 10 and (tmp_path / "early" / "toy").is_dir()


def run(folder: Path, event: str, *launcher: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, "-m", "tests.trainers.toy", str(folder), event]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)


def test_a_finished_run_that_is_started_again_trains_nothing(tmp_path, whole):
    for _ in range(2):
        again = trainer(tmp_path, lr_scheduler_type="linear")
        again.train(resume_from_checkpoint=newest_checkpoint(tmp_path))
    assert again.state.global_step == 12 and not (tmp_path / "checkpoint-13").exists()
    assert all(torch.equal(value, whole[name]) for name, value in weights(tmp_path).items())
    assert all(torch.equal(value, whole[name]) for name, value in again.model.state_dict().items())
    longer = trainer(tmp_path, max_steps=14)
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == 14


@pytest.mark.parametrize("event", ["kill", "full disk"])
def test_a_sudden_end_loses_at_most_the_steps_since_the_last_checkpoint(tmp_path, whole, event):
    ended = run(tmp_path, event)
    assert ended.returncode != 0 and not (tmp_path / "toy").exists()
    assert event == "kill" or "Free disk space and start the run again" in ended.stderr.splitlines()[-1]
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-5")
    check_resumes(tmp_path, whole)


def test_all_processes_stop_at_the_step_at_which_one_got_the_signal(tmp_path):
    ended = run(tmp_path, "one of two", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    assert ended.returncode != 0 and "SIGTERM stopped the run at step 4 of 12" in ended.stderr, ended.stderr[-3000:]
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4") and not (tmp_path / "toy").exists()
