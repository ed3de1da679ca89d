"""Simulated tau, and the table of sample drafts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from tests.conftest import build_target
from tests.targets import Architecture
from tests.tokenizers import templated, turns
from tests.trainers.heads import config
from transformers_resps import DraftHead, FixedPolicy, TreeShape, attach
from transformers_resps.heads import BoundHead
from transformers_resps.trainers import DraftHeadTrainer, FrozenTarget, simulated_tau
from transformers_resps.trainers.tau import drafted_steps


def test_simulated_tau_is_that_of_decoding(prompt):
    """The engine writes a text with the head; the simulation, given the text, must count the same steps."""
    target = attach(build_target(initializer_range=0.3, eos_token_id=None))
    torch.manual_seed(0)
    head = DraftHead.from_target(target, draft_vocab_size=64).eval()
    shape = TreeShape(8, 3, 3)
    out = target.generate(
        **prompt,
        assistant_model=head,
        policy=FixedPolicy(shape),
        max_new_tokens=60,
        do_sample=False,
        return_dict_in_generate=True,
    )
    read = FrozenTarget(target, head.config.feature_layers).read(out.sequences)
    tokens = out.sequences[0]
    is_answer = torch.arange(len(tokens)) >= prompt["input_ids"].shape[1]
    text = {"input_ids": tokens, "loss_mask": is_answer, "features": read.features[0]}
    steps = [int(step.emitted) for step in out.speculation.steps]
    assert max(steps) > 1, "the head must guess something for this to mean anything"
    tau = simulated_tau(BoundHead(head, target), [text], shape)
    assert tau == pytest.approx(sum(steps) / len(steps), rel=0.05), steps


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
