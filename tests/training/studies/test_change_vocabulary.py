"""A head's draft vocabulary, changed without training."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from tests.tokenizers import letter_tokenizer
from training.studies import change_vocabulary
from transformers_resps import DraftHead
from transformers_resps.data import prompt_fingerprint, read_training_prompts, write_training_prompts
from transformers_resps.heads import BoundHead


SCRIPT = vars(change_vocabulary)


def test_the_new_rows_are_the_targets_and_the_hidden_states_stay(tiny_target: PreTrainedModel) -> None:
    head = DraftHead.from_target(tiny_target, draft_token_ids=torch.arange(0, 40, 2))
    hidden = torch.randn(1, 3, 32)
    wanted = torch.tensor([1, 5, 7, 33, 60])
    SCRIPT["change_vocabulary"](head, tiny_target, wanted.flip(0))
    assert head.draft_token_ids.tolist() == wanted.tolist()
    with torch.no_grad():
        everything = tiny_target.get_output_embeddings()(head.norm(hidden))
        torch.testing.assert_close(BoundHead(head, tiny_target).logits(hidden), everything[..., wanted])


def test_rows_that_were_trained_keep_their_vocabulary(tiny_target: PreTrainedModel) -> None:
    head = DraftHead.from_target(tiny_target, draft_vocab_size=20)
    head.lm_head.weight.data[3] += 1
    with pytest.raises(ValueError, match="freeze_output_head"):
        SCRIPT["change_vocabulary"](head, tiny_target, torch.arange(5))


def test_every_file_weighs_the_same_and_special_tokens_are_forced_in(
    tiny_target: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand: "d" and "e" lead the long file, "f" and "g" the short one; "a" pads and "c" ends."""
    tiny_target.save_pretrained(tmp_path / "target")
    letter_tokenizer().save_pretrained(tmp_path / "target")
    DraftHead.from_target(tiny_target, draft_vocab_size=4).to(torch.bfloat16).save_pretrained(tmp_path / "head")
    write_training_prompts(tmp_path / "head", ["known"])
    for name, text in (("long", 50 * "ddeeh"), ("short", "ffgi")):
        row = {"prompt": "d", "completion": text}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    options = {"target": "target", "head": "head", "output": "new"}
    words = [word for key, name in options.items() for word in (f"--{key}", str(tmp_path / name))]
    texts = [str(tmp_path / "long.jsonl"), str(tmp_path / "short.jsonl")]
    monkeypatch.setattr(sys, "argv", ["change_vocabulary.py", *words, "--size", "5", "--texts", *texts])
    SCRIPT["main"]()
    ids = DraftHead.from_pretrained(tmp_path / "new").draft_token_ids.tolist()
    assert read_training_prompts(tmp_path / "new") == {prompt_fingerprint("known")}
    assert "".join(letter_tokenizer().convert_ids_to_tokens(ids)) == "acdef"
