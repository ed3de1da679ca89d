"""Runs that were stopped go on as if nothing had happened."""

import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig
from transformers import TrainerCallback

from tests.targets import Architecture
from tests.tokenizers import templated, turns
from tests.trainers import two_processes
from tests.trainers.heads import bits, config, fresh, texts
from transformers_resps import DraftHead, MtpHead
from transformers_resps.data import prompt_fingerprint, read_training_prompts, write_training_prompts
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


# A trainer of heads reads datasets as TRL's trainers do: streamed, several for evaluation, with a mask.
def streamed(count: int = 40) -> Any:
    return texts(count).to_iterable_dataset()


@pytest.mark.parametrize("kind", ["plain", "bf16", "streamed", "cached", "adapters"])
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers_resps.data.batches._STREAM_BUFFER", 16)
    given: dict[str, Any] = {"train_dataset": streamed() if kind == "streamed" else texts()}
    lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    found = []
    for folder, stops in (("whole", [None]), ("killed", [3, None])):
        for stop in stops:
            target, head = fresh()
            cache = {"feature_cache_dir": str(tmp_path / "features")} if kind == "cached" else {}
            args = config(tmp_path / folder, max_steps=7, bf16=kind == "bf16", **cache)
            callbacks = [Stop(stop)] if stop else None
            adapters = lora if kind == "adapters" else None
            trainer = DraftHeadTrainer(head, args, callbacks=callbacks, peft_config=adapters, target=target, **given)
            trainer.train(resume_from_checkpoint=len(stops) == 2 and stop is None)
        assert trainer.state.global_step == 7
        found.append(bits(trainer.model))
    whole, resumed = found
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_a_stream_is_evaluated_and_its_prompts_are_kept(tmp_path: Path) -> None:
    target = Architecture("llama").build("sdpa").float()
    rows = [{"messages": turns(question, "ghi")} for question in ("de", "ef", "fg", "gh")]
    stream = Dataset.from_list(rows).to_iterable_dataset()
    held_out = Dataset.from_list([{"messages": turns("hi", "def")}]).to_iterable_dataset()
    args = config(tmp_path, max_steps=2, draft_vocab_size=8)
    trainer = DraftHeadTrainer(None, args, stream, held_out, processing_class=templated(), target=target)
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_tau"] >= 1 and math.isfinite(metrics["eval_loss"])
    assert read_training_prompts(tmp_path / "head") == {prompt_fingerprint(one) for one in ("de", "ef", "fg", "gh")}


def test_each_of_several_held_out_sets_is_measured_under_its_name(tmp_path: Path) -> None:
    target, head = fresh()
    sets = DatasetDict({"easy": texts(3), "hard": texts(5)})
    args = config(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=2, metric_for_best_model="eval_hard_tau")
    trainer = DraftHeadTrainer(head, args, texts(), sets, target=target)
    trainer.train()
    logged = {name for entry in trainer.state.log_history for name in entry}
    for name in ("easy", "hard"):
        assert {f"eval_{name}_{what}" for what in ("loss", "loss_1", "accuracy_1", "accuracy_3", "tau")} <= logged
    assert trainer.state.best_metric is not None
    alone = trainer.evaluate(texts(5))  # another set, prepared as it comes
    assert alone["eval_tau"] == trainer.evaluate()["eval_hard_tau"]


def test_early_stopping_sees_tau(tmp_path: Path) -> None:
    """A metric that is logged after the callbacks were asked would stop nothing."""
    seen: list[dict[str, float]] = []

    class Listen(Stop):
        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **kwargs: Any) -> None:
            seen.append(dict(metrics))

    target, head = fresh()
    trainer = DraftHeadTrainer(head, config(tmp_path), texts(), texts(2), callbacks=[Listen(9)], target=target)
    trainer.evaluate()
    assert "eval_tau" in seen[0]


def test_the_prompts_of_all_texts_and_of_the_head_it_started_from_are_written_with_the_head(tmp_path: Path) -> None:
    target = Architecture("llama").build("sdpa").float()
    DraftHead.from_target(target).save_pretrained(tmp_path / "given")
    write_training_prompts(tmp_path / "given", ["before"])
    rows, held_out = ([{"messages": turns(question, "ghi")}] for question in ("de", "ef"))
    trainer = DraftHeadTrainer(
        str(tmp_path / "given"),
        config(tmp_path, max_steps=1),
        Dataset.from_list(rows),
        Dataset.from_list(held_out),
        processing_class=templated(),
        target=target,
    )
    trainer.train()
    assert read_training_prompts(tmp_path / "head") == {prompt_fingerprint(one) for one in ("before", "de", "ef")}


def test_only_a_new_head_needs_a_large_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    target, head = fresh()
    head.save_pretrained(tmp_path / "given")
    for model, is_warned in ((None, True), (head, True), (str(tmp_path / "given"), False)):
        caplog.clear()
        args = config(tmp_path, max_steps=1, draft_vocab_size=48)
        DraftHeadTrainer(model, args, texts(), target=target).get_train_dataloader()
        assert ("a useful head needs about" in caplog.text) is is_warned
