"""What the scripts that make policies start from."""

import json
from pathlib import Path

import pytest
import torch

from tests.targets import Architecture
from tests.tokenizers import BARE, templated
from transformers_resps import DraftHead


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny target, its head, and six prompts."""
    monkeypatch.setattr("transformers_resps.calibration.HF_HOME", str(tmp_path / "cache"))
    target = Architecture("llama").build("sdpa").float()
    torch.manual_seed(1)
    target.save_pretrained(tmp_path / "target")
    DraftHead.from_target(target, draft_vocab_size=12).save_pretrained(tmp_path / "head")
    templated(BARE).save_pretrained(tmp_path / "target")
    rows = [{"question": word, "answer": "b"} for word in ("fghi", "gh", "hifgh", "ifgf", "jklm", "nopqr")]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path
