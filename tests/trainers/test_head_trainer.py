import math
import signal
from types import SimpleNamespace

import pytest
import torch
from transformers import PhiConfig, PhiForCausalLM, TrainerCallback

from tests.conftest import build_target
from transformers_resps import DraftHead
from transformers_resps.trainers import (
    CachedFeatures,
    DraftHeadTrainer,
    DraftHeadTrainingConfig,
    Example,
    ExampleDataset,
    FrozenTarget,
    save_head,
)
from transformers_resps.trainers.interruption import Interruption


def texts(count=12, vocabulary=64):
    generator = torch.Generator().manual_seed(0)
    examples = []
    for _ in range(count):
        length = int(torch.randint(9, 24, (1,), generator=generator))
        mask = torch.arange(length) >= 5
        examples.append(Example(torch.randint(3, vocabulary, (length,), generator=generator), mask))
    return examples


def config(folder, **overrides):
    return DraftHeadTrainingConfig(
        **{
            "output_dir": str(folder),
            "steps": 3,
            "tokens_per_batch": 64,
            "max_steps": 6,
            "save_steps": 3,
            "logging_steps": 1,
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            **overrides,
        }
    )


def fresh(draft_vocab_size=48):
    target = build_target(initializer_range=0.3)
    torch.manual_seed(1)
    return target, DraftHead.from_target(target, draft_vocab_size=draft_vocab_size)


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


def bits(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("freeze_output_head", [True, False])
def test_every_trained_parameter_moves_and_none_of_the_target(tmp_path, optimizer, freeze_output_head):
    target, head = fresh()
    target_before, before = bits(target), bits(head)
    args = config(tmp_path, max_steps=2, optimizer=optimizer, freeze_output_head=freeze_output_head)
    DraftHeadTrainer(head, target, args, ExampleDataset(texts())).train()
    for name, parameter in head.named_parameters():
        is_frozen = freeze_output_head and name == "lm_head.weight"
        assert torch.equal(parameter, before[name]) == is_frozen, name
    assert all(torch.equal(value, target_before[name]) for name, value in bits(target).items())


def test_a_killed_and_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path):
    target, head = fresh()
    whole = DraftHeadTrainer(head, target, config(tmp_path / "whole", max_steps=7), ExampleDataset(texts()))
    whole.train()

    for callbacks, resume in (([Stop(3)], None), ([], True)):
        target, resumed_head = fresh()
        args = config(tmp_path / "killed", max_steps=7)
        resumed = DraftHeadTrainer(resumed_head, target, args, ExampleDataset(texts()), callbacks=callbacks)
        resumed.train(resume_from_checkpoint=resume)
    assert resumed.state.global_step == whole.state.global_step == 7
    expected = bits(head)
    assert all(torch.equal(value, expected[name]) for name, value in bits(resumed_head).items())


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
        trainer = DraftHeadTrainer(head, target, args, ExampleDataset(texts()), callbacks=[clock, *callbacks])
        trainer.train(resume_from_checkpoint=resume)
        told = [entry["minutes_left"] for entry in trainer.state.log_history if "minutes_left" in entry]
        assert told[-2 if resume else 0] == first


def test_ctrl_c_writes_a_checkpoint_from_which_the_run_goes_on_bit_for_bit(tmp_path):
    target, head = fresh()
    DraftHeadTrainer(head, target, config(tmp_path / "whole", max_steps=5), ExampleDataset(texts())).train()

    target, stopped_head = fresh()
    args = config(tmp_path / "stopped", max_steps=5, save_strategy="no")
    stopped = DraftHeadTrainer(stopped_head, target, args, ExampleDataset(texts()), callbacks=[PressCtrlC(1)])
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    assert stopped.state.global_step == 2 and signal.getsignal(signal.SIGINT) is before
    target, resumed_head = fresh()
    DraftHeadTrainer(resumed_head, target, args, ExampleDataset(texts())).train(resume_from_checkpoint=True)
    expected = bits(head)
    assert all(torch.equal(value, expected[name]) for name, value in bits(resumed_head).items())


@pytest.fixture
def default_ctrl_c():
    """A shell's background job ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("default_ctrl_c")
def test_a_second_ctrl_c_ends_at_once():
    with pytest.raises(KeyboardInterrupt), Interruption() as interruption:
        signal.raise_signal(signal.SIGINT)
        assert interruption.is_requested
        signal.raise_signal(signal.SIGINT)


def test_cached_features_train_the_same_head_as_the_target_itself(tmp_path):
    losses = []
    for cached in (False, True):
        target, head = fresh()
        examples = sorted(texts(), key=lambda example: len(example.input_ids))
        dataset = ExampleDataset(examples)
        if cached:
            frozen = FrozenTarget(target, head.config.feature_layers)
            dataset = CachedFeatures(examples, tmp_path / "features", frozen, dtype=torch.float32)
        trainer = DraftHeadTrainer(head, target, config(tmp_path / str(cached), max_steps=3), dataset)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_fine_tune_with_the_same_output_head_does_not_meet_the_features_of_its_base(tmp_path):
    """As a merged LoRA; nor does the same target in another dtype, which rounds otherwise."""
    target, head = fresh()
    frozen = FrozenTarget(target, head.config.feature_layers)
    base = CachedFeatures(texts(2), tmp_path, frozen)[0]["features"]
    with torch.no_grad():
        target.model.layers[0].mlp.down_proj.weight += 0.1
    tuned = CachedFeatures(texts(2), tmp_path, frozen)[0]["features"]
    assert not torch.equal(base, tuned) and len(list(tmp_path.iterdir())) == 2
    target.bfloat16()
    CachedFeatures(texts(2), tmp_path, frozen)
    assert len(list(tmp_path.iterdir())) == 3


def test_accumulated_small_batches_give_the_gradient_of_one_large_batch(tmp_path):
    same = [Example(torch.arange(3, 19), torch.arange(16) >= 4) for _ in range(4)]
    heads = []
    for tokens, accumulation in ((64, 1), (32, 2)):
        target, head = fresh()
        args = config(tmp_path, tokens_per_batch=tokens, gradient_accumulation_steps=accumulation, max_steps=1)
        DraftHeadTrainer(head, target, args, ExampleDataset(same)).train()
        heads.append(bits(head))
    for name, value in heads[0].items():
        torch.testing.assert_close(value, heads[1][name], atol=1e-5, rtol=1e-3)


def test_loss_falls_and_agreement_rises_on_one_memorised_text(tmp_path):
    target, head = fresh(draft_vocab_size=64)
    args = config(tmp_path, max_steps=60, learning_rate=1e-2, lr_scheduler_type="constant")
    trainer = DraftHeadTrainer(head, target, args, ExampleDataset(texts(1)), ExampleDataset(texts(1)))
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss_1"] < before["eval_loss_1"]
    assert after["eval_top1_1"] > before["eval_top1_1"] and after["eval_top1_1"] > 0.4
    assert {"top1_3", "tokens_per_second", "minutes_left"} <= set(trainer.state.log_history[-4]) | set(
        trainer.state.log_history[-3]
    )
    assert all(math.isfinite(value) for value in after.values())


def test_checkpoints_and_exports_load_as_heads(tmp_path):
    target, head = fresh()
    trainer = DraftHeadTrainer(head, target, config(tmp_path, max_steps=3), ExampleDataset(texts()))
    trainer.train()
    checkpoint = DraftHead.from_pretrained(tmp_path / "checkpoint-3", target=target)
    assert all(torch.equal(value, bits(head)[name]) for name, value in bits(checkpoint).items())
    save_head(head, tmp_path / "bf16")
    exported = DraftHead.from_pretrained(tmp_path / "bf16")
    assert exported.fc.weight.dtype == torch.bfloat16 and head.fc.weight.dtype == torch.float32
    assert torch.equal(exported.fc.weight, head.fc.weight.bfloat16())
    assert torch.equal(exported.d2t, head.d2t)


def test_the_cache_goes_on_from_whole_files_and_says_what_a_full_disk_needs(tmp_path, monkeypatch):
    target, head = fresh()
    frozen = FrozenTarget(target, head.config.feature_layers)
    examples = texts(130)

    def full(tensors, path):
        if len(list(tmp_path.glob("*.safetensors"))) == 2:
            raise OSError(28, "No space left on device")
        return save(tensors, path)

    from transformers_resps.trainers import feature_cache

    save = feature_cache.save_file
    monkeypatch.setattr(feature_cache, "save_file", full)
    with pytest.raises(OSError, match="bytes per token"):
        CachedFeatures(examples, tmp_path, frozen)
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors"}
    monkeypatch.setattr(feature_cache, "save_file", save)
    assert len(CachedFeatures(examples, tmp_path, frozen)) == 130
    assert len(list(tmp_path.iterdir())) == 3


def test_processes_that_fill_one_cache_write_different_files(tmp_path, monkeypatch):
    from transformers_resps.trainers import feature_cache

    target, head = fresh()
    frozen, save, names = FrozenTarget(target, head.config.feature_layers), feature_cache.save_file, set()

    def note(tensors, path):
        names.add(path.name)
        save(tensors, path)

    monkeypatch.setattr(feature_cache, "save_file", note)
    for process in (7, 8):
        monkeypatch.setattr(feature_cache.os, "getpid", lambda process=process: process)
        CachedFeatures(texts(2), tmp_path / str(process), frozen)
    assert len(names) == 2


@pytest.mark.parametrize(("held_out", "asked", "measured"), [(100, 8, 8), (15, 8, 8), (5, 8, 5), (5, 0, 0)])
def test_tau_is_measured_on_as_many_texts_as_asked(tmp_path, monkeypatch, held_out, asked, measured):
    monkeypatch.setattr(
        "transformers_resps.trainers.head_trainer.simulated_tau", lambda bound, rows, shape: len(list(rows))
    )
    target, head = fresh()
    sets = ExampleDataset(texts()), ExampleDataset(texts(held_out))
    assert DraftHeadTrainer(head, target, config(tmp_path, tau_texts=asked), *sets).measure_tau() == measured


@pytest.mark.parametrize("field", [{"steps": 0}, {"step_decay": 0.0}, {"optimizer": "sgd"}, {"tokens_per_batch": 1}])
def test_settings_out_of_range_are_refused(tmp_path, field):
    with pytest.raises(ValueError, match=next(iter(field))):
        config(tmp_path, **field)


def test_adapters_train_alone_and_are_merged_into_the_export(tmp_path):
    from peft import LoraConfig

    target, head = fresh()
    before = bits(head)
    lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    trainer = DraftHeadTrainer(head, target, config(tmp_path, max_steps=3), ExampleDataset(texts()), peft_config=lora)
    trainer.train()
    assert all("lora" in name for name, p in trainer.model.named_parameters() if p.requires_grad)
    exported = DraftHead.from_pretrained(tmp_path / "head", target=target)
    assert torch.equal(exported.fc.weight, before["fc.weight"].bfloat16().float())
    moved = exported.layers[0].self_attn.q_proj.weight - before["layers.0.self_attn.q_proj.weight"]
    assert moved.abs().max() > 1e-3


def test_tokens_of_another_tokenizer_are_refused(tmp_path):
    target, head = fresh()
    with pytest.raises(ValueError, match="another model's tokenizer"):
        DraftHeadTrainer(head, target, config(tmp_path), ExampleDataset(texts(vocabulary=99)))


def test_features_are_not_cached_of_texts_of_another_tokenizer(tmp_path):
    target, head = fresh()
    with pytest.raises(ValueError, match="another model's tokenizer"):
        CachedFeatures(texts(vocabulary=99), tmp_path, FrozenTarget(target, head.config.feature_layers))


def test_a_borrowed_output_head_is_not_trained_and_asking_for_it_is_refused(tmp_path):
    target, head = fresh(draft_vocab_size=None)
    with pytest.raises(ValueError, match="borrows its output head from the target, which is never trained. Leave"):
        DraftHeadTrainer(head, target, config(tmp_path, freeze_output_head=False), ExampleDataset(texts()))


def test_the_bias_of_a_targets_output_head_is_part_of_what_a_head_learns():
    """Phi's output head has a bias; here one that decides every pick."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4}
    target = PhiForCausalLM(PhiConfig(**sizes, num_attention_heads=2))
    target.lm_head.bias.data.normal_(std=9.0)
    tokens = torch.arange(3, 40)[None]
    frozen = FrozenTarget(target, [1, 2, 3])
    read, logits = frozen.read(tokens), target(tokens).logits
    assert torch.equal(read.picks, logits.argmax(-1))
    ids = torch.arange(5, 30)
    expected = logits[0, :, ids].softmax(-1)
    torch.testing.assert_close(frozen.teacher(read.hidden[0], ids).probabilities(slice(0, 99)), expected)


def test_a_head_of_another_target_is_refused(tmp_path):
    _, head = fresh()
    other = build_target(vocab_size=80)
    with pytest.raises(ValueError, match="This head was made for"):
        DraftHeadTrainer(head, other, config(tmp_path), ExampleDataset(texts()))
