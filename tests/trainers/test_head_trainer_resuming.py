"""Runs that were stopped go on as if nothing had happened; for killed ones see test_head_trainer_datasets.py."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback

from tests.trainers import two_processes
from tests.trainers.heads import bits, config, fresh, texts
from transformers_resps import MtpHead
from transformers_resps.trainers import DraftHeadTrainer


class Stop(TrainerCallback):
    """As a kill after a checkpoint would."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


class PressCtrlC(TrainerCallback):
    """In the middle of a step, as a user would."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            signal.raise_signal(signal.SIGINT)


class Minute(TrainerCallback):
    """A clock on which every step takes one."""

    seconds = 0.0

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds += 60.0


def test_a_resumed_run_tells_the_time_left_by_its_own_steps(tmp_path, monkeypatch):
    for callbacks, resume, first in (([Stop(3)], None, 4.0), ([], True, 1.0)):
        clock = Minute()
        monkeypatch.setattr(
            "transformers_resps.trainers.head_trainer.time",
            SimpleNamespace(monotonic=lambda clock=clock: clock.seconds),
        )
        target, head = fresh()
        args = config(tmp_path, max_steps=5)
        trainer = DraftHeadTrainer(head, args, texts(), callbacks=[clock, *callbacks], target=target)
        trainer.train(resume_from_checkpoint=resume)
        told = [entry["minutes_left"] for entry in trainer.state.log_history if "minutes_left" in entry]
        assert told[-2 if resume else 0] == first


def test_ctrl_c_writes_a_checkpoint_from_which_the_run_goes_on_bit_for_bit(tmp_path):
    target, head = fresh()
    DraftHeadTrainer(head, config(tmp_path / "whole", max_steps=5), texts(), target=target).train()

    target, stopped_head = fresh()
    args = config(tmp_path / "stopped", max_steps=5, save_strategy="no")
    stopped = DraftHeadTrainer(stopped_head, args, texts(), callbacks=[PressCtrlC(1)], target=target)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    assert stopped.state.global_step == 2 and signal.getsignal(signal.SIGINT) is before
    target, resumed_head = fresh()
    DraftHeadTrainer(resumed_head, args, texts(), target=target).train(resume_from_checkpoint=True)
    expected = bits(head)
    assert all(torch.equal(value, expected[name]) for name, value in bits(resumed_head).items())


# Training in several processes, as `accelerate launch` starts them on GPUs; here with gloo on two processors.
def test_two_processes_train_what_one_does_with_twice_the_accumulation(tmp_path: Path) -> None:
    two_processes.train(tmp_path, accumulation=2)
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "-m", "tests.trainers.two_processes", str(tmp_path)],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    target, head = two_processes.fresh()
    torch.manual_seed(2)
    for start in (head, MtpHead.fresh(target)):
        kind, before = type(start), bits(start)
        folders = [tmp_path / f"{kind.__name__}-of-{count}" for count in (1, 2)]
        alone, together = (bits(kind.from_pretrained(folder, target=target)) for folder in folders)
        for name, weight in alone.items():
            torch.testing.assert_close(together[name], weight, atol=1e-5, rtol=1e-3, msg=name)
        assert not any(torch.equal(weight, before[name]) for name, weight in alone.items() if "proj" in name)
