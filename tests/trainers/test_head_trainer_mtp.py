"""MTP layers, fresh or loaded, are trained, saved and resumed as heads are."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.assistants.mtp_cases import CASES
from tests.conftest import build_target
from tests.trainers.heads import bits, check_resumes, config, texts
from transformers_resps import MtpHead
from transformers_resps.heads.unrolled import unroll
from transformers_resps.trainers import DraftHeadTrainer
from transformers_resps.trainers.features import FrozenTarget


def test_a_fresh_layer_learns_and_leaves_alone_what_it_borrows(tmp_path: Path) -> None:
    target = build_target(initializer_range=0.3)
    before, rows = bits(target), texts(12)
    args = config(tmp_path, new_head="mtp", draft_vocab_size=40, max_steps=30, save_strategy="no", tau_texts=1)
    trainer = DraftHeadTrainer(None, args, rows, rows, target=target)
    losses = [trainer.evaluate()["eval_loss_1"]]
    trainer.train()
    losses.append(trainer.evaluate()["eval_loss_1"])
    assert losses[1] < 0.95 * losses[0]
    assert all(torch.equal(weight, before[name]) for name, weight in target.state_dict().items())
    metrics = json.loads((tmp_path / "head" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["draft_vocab_size"] == 40 and metrics["simulated_tau"].keys() == {"16/4/4"}
    saved: Any = MtpHead.from_pretrained(tmp_path / "head", target)
    torch.testing.assert_close(bits(saved), bits(trainer.head), atol=0.01, rtol=0.01)  # in bfloat16
    assert saved.draft_token_ids.tolist() == trainer.draft_vocabulary().token_ids.tolist()
    names, layer = load_file(tmp_path / "head" / "model.safetensors").keys(), target.config.num_hidden_layers
    ours = {f"model.layers.{layer}.{part}.weight" for part in ("eh_proj", "shared_head.norm", "self_attn.q_proj")}
    assert ours < names and not any("embed_tokens" in name or "shared_head.head" in name for name in names)


@pytest.mark.parametrize("settings", [{}, {"depths": 2}], ids=str)
def test_a_resumed_run_ends_bit_for_bit_like_one_that_was_not_stopped(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    target = build_target(initializer_range=0.3)
    MtpHead.fresh(target, **settings).save_pretrained(tmp_path / "start")
    whole = check_resumes(tmp_path, target, ttt_steps=settings.get("depths", 3))
    start = bits(MtpHead.from_pretrained(tmp_path / "start", target))
    assert not any(torch.equal(start[name], weight) for name, weight in whole.items() if "proj" in name)


@pytest.mark.parametrize("name", ["Qwen3.5", "DeepSeek-V3", "GLM-4.6"])
def test_published_layers_are_tuned_and_keep_their_names(name: str, tmp_path: Path) -> None:
    """A hybrid target's, with latent attention, and with experts."""
    case = next(case for case in CASES if case.name == name)
    target, raw = case.build(), case.raw()
    case.write(tmp_path / "published", target, raw)
    before = bits(target)
    rows, args = texts(12, vocabulary=40), config(tmp_path, ttt_steps=2, max_steps=2, tau_texts=0)
    DraftHeadTrainer("mtp", args, rows, target=target).train()
    saved = load_file(tmp_path / "head" / "model.safetensors")
    assert saved.keys() == raw.keys() and all(saved[name].shape == raw[name].shape for name in raw)
    assert not any(torch.equal(saved[name], raw[name].bfloat16()) for name in raw if "self_attn" in name)
    assert all(torch.equal(weight, before[name]) for name, weight in target.state_dict().items())


def test_the_best_checkpoint_is_the_one_that_is_kept(tmp_path: Path) -> None:
    """Here the one with the highest loss."""
    target, rows = build_target(initializer_range=0.3), texts(12)
    best: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    best |= {"metric_for_best_model": "loss", "greater_is_better": True}
    args = config(tmp_path, max_steps=3, save_steps=1, tau_texts=0, **best)
    trainer = DraftHeadTrainer(MtpHead.fresh(target), args, rows, rows, target=target)
    trainer.train()
    assert trainer.state.best_global_step == 1
    kept = bits(MtpHead.from_pretrained(tmp_path / "checkpoint-1", target))
    assert all(torch.equal(weight, kept[name]) for name, weight in bits(trainer.head).items())


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    target = build_target(initializer_range=0.3)
    MtpHead.fresh(target, fed="before").save_pretrained(tmp_path)
    trainer = DraftHeadTrainer(MtpHead.fresh(target), config(tmp_path), texts(12), target=target)
    with pytest.raises(ValueError, match="MTP layers with other settings"):
        trainer._load_from_checkpoint(str(tmp_path))


def test_layers_that_cannot_be_trained_are_refused_by_name(tmp_path: Path) -> None:
    target = build_target()
    with pytest.raises(ValueError, match="does not know where it was loaded from"):
        DraftHeadTrainer("mtp", config(tmp_path), texts(12), target=target)
    target.save_pretrained(tmp_path)
    target.config.name_or_path = str(tmp_path)
    with pytest.raises(ValueError, match="is a llama model without MTP layers: neither its config"):
        DraftHeadTrainer("mtp", config(tmp_path), texts(12), target=target)
    with pytest.raises(ValueError, match="each of these 2 MTP layers drafts one level. Pass `ttt_steps=2`"):
        DraftHeadTrainer(MtpHead.fresh(target, depths=2), config(tmp_path), texts(12), target=target)
    with pytest.raises(ValueError, match="`freeze_output_head` is false, but the head borrows"):
        args = config(tmp_path, freeze_output_head=False)
        DraftHeadTrainer(MtpHead.fresh(target), args, texts(12), target=target)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
@pytest.mark.parametrize("settings", [{}, {"hidden_first": True}, {"depths": 2}], ids=str)
def test_a_fresh_layer_says_what_the_state_that_it_reads_says(model_type: str, settings: dict[str, Any]) -> None:
    """Whether the norms multiply by their weight or by one more, and however uneven they are."""
    target: Any = build_target(model_type, initializer_range=0.3, head_dim=8, num_hidden_layers=6)
    target.model.norm.weight.copy_(torch.linspace(0.4, 2, 32))
    head = MtpHead.fresh(target, **settings)
    tokens = torch.randint(3, 64, (2, 9))
    read = FrozenTarget(target, head.feature_layers).run(tokens)
    model = head.bind(target, head)
    for level in unroll(model, read.features, tokens, head.settings.depths):
        torch.testing.assert_close(model.normed_logits(level), target(tokens).logits, atol=2e-3, rtol=2e-3)
