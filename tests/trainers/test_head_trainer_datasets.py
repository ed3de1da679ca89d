"""A trainer of heads reads datasets as TRL's trainers do: streamed, several for evaluation, with a mask."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig

from tests.targets import Architecture
from tests.tokenizers import templated, turns
from tests.trainers.heads import bits, config, fresh, texts
from tests.trainers.test_head_trainer_resuming import Stop
from transformers_resps import DraftHead
from transformers_resps.data import prompt_fingerprint, read_training_prompts, write_training_prompts
from transformers_resps.trainers import DraftHeadTrainer


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
