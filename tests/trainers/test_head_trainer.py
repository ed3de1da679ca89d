"""A head learns from its target, and its run is measured."""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from transformers import PhiConfig, PhiForCausalLM

from tests.conftest import build_target
from tests.trainers.heads import bits, config, fresh, texts
from transformers_resps import DraftHead
from transformers_resps.trainers import DraftHeadTrainer, FrozenTarget, save_head
from transformers_resps.trainers.head_trainer import MIN_USEFUL_TOKENS, warn_if_small


@pytest.mark.parametrize("optim", ["muon", "adamw_torch", "adafactor"])
@pytest.mark.parametrize("freeze_output_head", [True, False])
def test_every_trained_parameter_moves_and_none_of_the_target(tmp_path, optim, freeze_output_head):
    target, head = fresh()
    target_before, before = bits(target), bits(head)
    args = config(tmp_path, max_steps=2, optim=optim, freeze_output_head=freeze_output_head)
    DraftHeadTrainer(head, args, texts(), target=target).train()
    for name, parameter in head.named_parameters():
        is_frozen = freeze_output_head and name == "lm_head.weight"
        assert torch.equal(parameter, before[name]) == is_frozen, name
    assert all(torch.equal(value, target_before[name]) for name, value in bits(target).items())


def test_accumulated_small_batches_give_the_gradient_of_one_large_batch(tmp_path):
    same = Dataset.from_list([{"input_ids": list(range(3, 19)), "completion_mask": [0] * 4 + [1] * 12}] * 4)
    heads = []
    for tokens, accumulation in ((64, 1), (32, 2)):
        target, head = fresh()
        args = config(tmp_path, tokens_per_batch=tokens, gradient_accumulation_steps=accumulation, max_steps=1)
        DraftHeadTrainer(head, args, same, target=target).train()
        heads.append(bits(head))
    for name, value in heads[0].items():
        torch.testing.assert_close(value, heads[1][name], atol=1e-5, rtol=1e-3)


def test_loss_falls_and_agreement_rises_on_one_memorised_text(tmp_path):
    target, head = fresh(draft_vocab_size=64)
    args = config(tmp_path, max_steps=60, learning_rate=1e-2, lr_scheduler_type="constant")
    trainer = DraftHeadTrainer(head, args, texts(1), texts(1), target=target)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss_1"] < before["eval_loss_1"]
    assert after["eval_accuracy_1"] > before["eval_accuracy_1"] and after["eval_accuracy_1"] > 0.4
    assert {"accuracy_3", "tokens_per_second", "minutes_left"} <= set(trainer.state.log_history[-4]) | set(
        trainer.state.log_history[-3]
    )
    assert all(math.isfinite(value) for value in after.values())


def test_settings_and_measurements_of_a_run_stand_beside_its_head(tmp_path):
    """Where a run was started makes no difference: a script adds the card alone."""
    target, head = fresh()
    trainer = DraftHeadTrainer(head, config(tmp_path, max_steps=2), texts(), texts(1), target=target)
    trainer.evaluate()
    assert not trainer.artefact_folder.exists(), "nothing was trained yet"
    trainer.train()
    folder = trainer.artefact_folder
    told = json.loads((folder / "metrics.json").read_text())
    assert told["training"]["steps"] == 2 and told["training"]["texts"] == len(texts()) and "agreement" not in told
    found = trainer.evaluate()
    more = json.loads((folder / "metrics.json").read_text())
    assert more["agreement"]["1"] == found["eval_accuracy_1"] and more["held_out_texts"] == 1
    assert more["training"] == told["training"] and more["coverage"] <= 1
    recipe = (folder / "recipe.yaml").read_text()
    assert yaml.safe_load(recipe)["max_steps"] == 2 and str(tmp_path) not in recipe


def test_checkpoints_and_exports_load_as_heads(tmp_path):
    target, head = fresh()
    trainer = DraftHeadTrainer(head, config(tmp_path, max_steps=3), texts(), target=target)
    trainer.train()
    checkpoint = DraftHead.from_pretrained(tmp_path / "checkpoint-3", target=target)
    assert all(torch.equal(value, bits(head)[name]) for name, value in bits(checkpoint).items())
    save_head(head, tmp_path / "bf16")
    exported = DraftHead.from_pretrained(tmp_path / "bf16")
    assert exported.fc.weight.dtype == torch.bfloat16 and head.fc.weight.dtype == torch.float32
    assert torch.equal(exported.fc.weight, head.fc.weight.bfloat16())
    assert torch.equal(exported.d2t, head.d2t)


@pytest.mark.parametrize(("held_out", "asked", "measured"), [(100, 8, 8), (15, 8, 8), (5, 8, 5), (5, 0, 0)])
def test_tau_is_measured_on_as_many_texts_as_asked(tmp_path, monkeypatch, held_out, asked, measured):
    monkeypatch.setattr(
        "transformers_resps.trainers.head_trainer.simulated_tau", lambda head, target, rows, shape: len(list(rows))
    )
    target, head = fresh()
    sets = texts(), texts(held_out)
    assert (
        DraftHeadTrainer(head, config(tmp_path, tau_texts=asked), *sets, target=target).evaluate().get("eval_tau", 0)
        == measured
    )


def test_adapters_train_alone_and_are_merged_into_the_export(tmp_path):
    from peft import LoraConfig

    target, head = fresh()
    before = bits(head)
    lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    trainer = DraftHeadTrainer(head, config(tmp_path, max_steps=3), texts(), peft_config=lora, target=target)
    trainer.train()
    assert all("lora" in name for name, p in trainer.model.named_parameters() if p.requires_grad)
    exported = DraftHead.from_pretrained(tmp_path / "head", target=target)
    assert torch.equal(exported.fc.weight, before["fc.weight"].bfloat16().float())
    moved = exported.layers[0].self_attn.q_proj.weight - before["layers.0.self_attn.q_proj.weight"]
    assert moved.abs().max() > 1e-3


def test_tokens_of_another_tokenizer_are_refused(tmp_path):
    target, head = fresh()
    with pytest.raises(ValueError, match="another model's tokenizer"):
        DraftHeadTrainer(head, config(tmp_path), texts(vocabulary=99), target=target)


def test_a_borrowed_output_head_is_not_trained_and_asking_for_it_is_refused(tmp_path):
    target, head = fresh(draft_vocab_size=None)
    with pytest.raises(ValueError, match="borrows its output head from the target, which is never trained. Leave"):
        DraftHeadTrainer(head, config(tmp_path, freeze_output_head=False), texts(), target=target)


def test_output_rows_that_are_not_the_targets_have_to_be_trained(tmp_path):
    target, _ = fresh()
    head = DraftHead.from_target(target, 48, hidden_size=48, owns_embedding=True)
    with pytest.raises(ValueError, match="rows are 48 wide, the target's 32,.*freeze_output_head=False"):
        DraftHeadTrainer(head, config(tmp_path), texts(), target=target)
    DraftHeadTrainer(head, config(tmp_path, freeze_output_head=False), texts(), target=target)
    assert head.lm_head.weight.requires_grad


def test_the_bias_of_a_targets_output_head_is_part_of_what_a_head_learns():
    """Phi's output head has a bias; here one that decides every pick."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4}
    target = PhiForCausalLM(PhiConfig(**sizes, num_attention_heads=2))
    target.lm_head.bias.data.normal_(std=9.0)
    tokens = torch.arange(3, 40)[None]
    frozen = FrozenTarget(target, [1, 2, 3])
    read, logits = frozen.run(tokens), target(tokens).logits
    assert torch.equal(read.picks, logits.argmax(-1))
    ids = torch.arange(5, 30)
    expected = logits[0, :, ids].softmax(-1)
    torch.testing.assert_close(frozen.teacher(read.hidden[0], ids).probabilities(slice(0, 99)), expected)


def test_a_head_of_another_target_is_refused(tmp_path):
    _, head = fresh()
    other = build_target(vocab_size=80)
    with pytest.raises(ValueError, match="This head was made for"):
        DraftHeadTrainer(head, config(tmp_path), texts(), target=other)


def test_a_run_too_small_to_be_useful_is_announced(caplog):
    assert not warn_if_small(MIN_USEFUL_TOKENS)
    assert not caplog.records
    assert warn_if_small(1000)
    assert "1,000 positions" in caplog.text
    assert "answers that the target itself generates" in caplog.text and "training/" not in caplog.text


def test_our_recipe_of_a_first_head_is_not_too_small():
    recipe = Path(__file__).parents[2] / "training" / "recipes" / "head.yaml"
    told = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    assert not warn_if_small(told["max_steps"] * told["tokens_per_batch"])
    assert told["warmup_steps"] + told["lr_scheduler_kwargs"]["num_decay_steps"] < told["max_steps"]
