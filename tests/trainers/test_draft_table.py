"""The table of sample drafts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from tests.targets import Architecture
from tests.tokenizers import templated, turns
from tests.trainers.heads import config
from transformers_resps import DraftHead, TreeShape
from transformers_resps.heads import BoundHead
from transformers_resps.trainers import DraftHeadTrainer, FrozenTarget, simulated_tau
from transformers_resps.trainers.head_trainer import drafted_steps


def pair() -> tuple[Any, DraftHead]:
    target = Architecture("llama").build("sdpa").float()
    torch.manual_seed(3)
    return target, DraftHead.from_target(target).eval()


def test_accepted_tokens_follow_the_text_and_rejected_ones_leave_it() -> None:
    target, head = pair()
    tokens = target.generate(torch.tensor([[3, 4, 5, 6]]), max_new_tokens=30, do_sample=False)[0]
    features = FrozenTarget(target, head.config.feature_layers or []).read(tokens[None]).features[0]
    text = {"input_ids": tokens, "loss_mask": torch.arange(len(tokens)) >= 4, "features": features}
    shape = TreeShape(8, 3, 3)
    steps = drafted_steps(BoundHead(head, target), text, shape)
    place = 5
    for step in steps:
        assert tokens[place : place + len(step.accepted)].tolist() == step.accepted
        place += len(step.accepted) + 1
        assert step.rejected is None or step.rejected != tokens[place - 1]
    assert place == len(tokens) and any(step.accepted for step in steps) and any(step.rejected for step in steps)
    tau = simulated_tau(BoundHead(head, target), [text], shape)
    assert sum(len(step.accepted) + 1 for step in steps) / len(steps) == pytest.approx(tau)


def test_a_table_is_printed_with_every_line_of_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target, head = pair()
    rows = Dataset.from_list([{"messages": turns(one, "ghijklm")} for one in ("de", "ef", "fg", "gh")])
    args = config(tmp_path, max_steps=2, log_drafts=True, num_drafts_to_print=3)
    trainer = DraftHeadTrainer(head, args, rows, processing_class=templated(), target=target)
    trainer.train()
    printed = capsys.readouterr().out
    assert "Step 1: accepted and rejected tokens" in printed and "Step 2" in printed
    assert printed.count("hijklm") == 2 * 3 and "hdec" in printed
    assert head.training


def test_the_table_needs_rich_and_a_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, head = pair()
    rows = Dataset.from_list([{"input_ids": [3, 4, 5, 6]}])
    with pytest.raises(ValueError, match="`log_drafts` is set, but there is no tokenizer"):
        DraftHeadTrainer(head, config(tmp_path, log_drafts=True), rows, target=target)
    monkeypatch.setattr("transformers_resps.trainers.head_trainer.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package `rich`. Run `pip install 'transformers-resps\[train\]'`"):
        DraftHeadTrainer(head, config(tmp_path, log_drafts=True), rows, target=target)
