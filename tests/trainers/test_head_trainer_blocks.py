"""Block heads are trained, saved and resumed as other heads are, and learn from what they will see."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from tests.conftest import build_target
from tests.drafting.test_block_drafter import block_head
from tests.heads.blocks import CASES, LAYERS, random_tensors
from tests.trainers.heads import bits, check_resumes, config, texts
from transformers_resps import BlockHead
from transformers_resps.assistants import load_head
from transformers_resps.trainers import DraftHeadTrainer


CORRECTIONS: dict[str, dict[str, Any]] = {
    "vanilla, confident": {"confidence": True, "confidence_with_markov": True},
    "rnn in place": {"correction": "rnn", "shifted": False, "causal": [False, False]},
    "selector": {"correction": "selector", "selector_top_k": 12, "correction_rank": 8, "confidence": True},
}


def written(target: Any, count: int = 4, length: int = 40) -> Dataset:
    """Texts that the target wrote, greedily."""
    prompts = torch.randint(3, 64, (count, 5), generator=torch.Generator().manual_seed(0))
    ids = target.generate(prompts, max_new_tokens=length, do_sample=False, eos_token_id=None)
    rows = [{"input_ids": row.tolist(), "completion_mask": [0] * 5 + [1] * length} for row in ids]
    return Dataset.from_list(rows)


@pytest.mark.parametrize("kind", CORRECTIONS)
def test_a_fresh_block_head_learns_a_text_by_heart_and_leaves_the_target_alone(kind: str, tmp_path: Path) -> None:
    target = build_target(initializer_range=0.3)
    before, rows = bits(target), written(target)
    args = config(
        tmp_path,
        new_head="block",
        draft_vocab_size=0,
        model_init_kwargs=CORRECTIONS[kind],
        max_steps=30,
        save_strategy="no",
        tau_texts=2,
        tokens_per_batch=256,
        learning_rate=1e-2,
    )
    trainer = DraftHeadTrainer(None, args, rows, rows, target=target)
    fresh = bits(trainer.head)
    first = trainer.evaluate()
    trainer.train()
    last = trainer.evaluate()
    assert trainer.head.config.levels == args.ttt_steps
    assert last["eval_loss"] < 0.9 * first["eval_loss"]
    assert last["eval_tau"] > first["eval_tau"] + 0.2
    assert all(torch.equal(weight, before[name]) for name, weight in target.state_dict().items())
    still = [name for name, weight in bits(trainer.head).items() if torch.equal(weight, fresh[name])]
    assert not [name for name in still if "inv_freq" not in name]


def test_a_resumed_run_ends_bit_for_bit_like_one_that_was_not_stopped(tmp_path: Path) -> None:
    target = build_target(initializer_range=0.3)
    block_head(target, correction="rnn", correction_rank=4).save_pretrained(tmp_path / "start")

    whole = check_resumes(tmp_path, target)
    saved = load_head(str(tmp_path / "head"), target)
    assert isinstance(saved, BlockHead)
    torch.testing.assert_close(bits(saved), whole, atol=0.02, rtol=0.02)  # in bfloat16
    other = DraftHeadTrainer(block_head(target, shifted=True), config(tmp_path), texts(12), target=target)
    with pytest.raises(ValueError, match="holds a head with shifted False, but this run trains one with True"):
        other._load_from_checkpoint(str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("name", ["speculators DSpark rnn, in place", "DFlash 2, z-lab"])
def test_a_published_head_is_tuned(name: str, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == name)
    target = build_target(num_hidden_layers=LAYERS, initializer_range=0.3)
    case.write(tmp_path / "published", random_tensors(case), case)
    published = BlockHead.from_pretrained(tmp_path / "published", target=target)
    args = config(tmp_path, max_steps=2, tau_texts=0, optim="adamw_torch")
    trainer = DraftHeadTrainer(str(tmp_path / "published"), args, texts(12), texts(3), target=target)
    trainer.train()
    assert {"eval_accuracy_1", "eval_accuracy_3", "eval_loss"} <= trainer.evaluate().keys()
    before, after = bits(published), bits(trainer.head)
    assert not [
        part for part in before if torch.equal(before[part], after[part]) and part not in ("lm_head.weight", "d2t")
    ]
    assert BlockHead.from_pretrained(tmp_path / "head", target=target).config.source == published.config.source
    for folder in ("head", "published"):
        with pytest.raises(ValueError, match="which is a draft head. Pass the model"):
            DraftHeadTrainer(None, args, texts(12), target=str(tmp_path / folder))


def test_adapters_of_a_block_head_are_trained_and_merged(tmp_path: Path) -> None:
    target = build_target(initializer_range=0.3)
    head = block_head(target)
    before = bits(head)
    adapters = LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    args = config(tmp_path, tau_texts=0, learning_rate=0.1)
    trainer = DraftHeadTrainer(head, args, texts(12), peft_config=adapters, target=target)
    trainer.train()
    after = bits(BlockHead.from_pretrained(tmp_path / "head", target=target))
    moved = {name for name, weight in before.items() if not torch.equal(weight.bfloat16().float(), after[name])}
    assert after.keys() == before.keys() and moved and all("q_proj" in name or "down_proj" in name for name in moved)


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"ttt_steps": 5}, "`ttt_steps` is 5, but a block of this head drafts 4 tokens. Pass `ttt_steps=4`"),
    ({"final_logit_softcapping": 3.0}, {}, "caps its logits at 3.0, and such a head is not trained here"),
    ({}, {"freeze_output_head": False}, "`freeze_output_head` is false, but the head borrows"),
    ({}, {"anchor_share": 0.0}, "`anchor_share` is 0.0, but it must be above 0 and at most 1"),
    ({}, {"new_head": "blocks"}, '`new_head` is \'blocks\', but it must be "eagle3", "block" or "mtp"'),
]


@pytest.mark.parametrize(("fields", "settings", "message"), REFUSED, ids=lambda part: str(part)[:30])
def test_what_cannot_be_trained_is_refused(
    fields: dict[str, Any], settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    target = build_target()
    with pytest.raises(ValueError, match=message):
        DraftHeadTrainer(block_head(target, **fields), config(tmp_path, **settings), texts(12), target=target)


def test_a_fresh_block_head_begins_with_what_the_target_has() -> None:
    target: Any = build_target(num_hidden_layers=6, head_dim=8)
    head = BlockHead.from_target(target, draft_token_ids=[3, 9, 20], block_size=4)
    last = target.model.layers[-2:]
    assert torch.equal(head.lm_head.weight, target.lm_head.weight[[3, 9, 20]])
    assert all(
        torch.equal(own.mlp.up_proj.weight, it.mlp.up_proj.weight) for own, it in zip(head.layers, last, strict=True)
    )
    assert head.feature_layers == [2, 3, 4] and head.config.levels == 4 and all(head.config.causal)
    assert head.draft_token_ids.tolist() == [3, 9, 20] and not head.markov_head.markov_w2.weight.any()
    assert BlockHead.from_target(target, correction="none", num_hidden_layers=1).correction is None
    with pytest.raises(ValueError, match=r"BlockHead.from_target got \['block_sice'\], which it does not know"):
        BlockHead.from_target(target, block_sice=4)
