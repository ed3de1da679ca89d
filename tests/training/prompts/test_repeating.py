"""Conversations from templates are the same on any machine, and read back as they were made."""

import sys
from pathlib import Path

import pytest

from training.prompts import repeating
from transformers_resps.tools.session import read_dialogues


def test_files_hold_the_conversations_of_their_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["repeating", str(tmp_path), "--count", "9"])
    repeating.main()
    for name, make in repeating.SETS.items():
        assert read_dialogues(str(tmp_path / f"{name}.jsonl")) == make(9) == make(12)[:9]
        assert len({dialogue.fingerprint for dialogue in make(9)}) > 6
    assert all("NAME" not in turn for dialogue in repeating.edits(9) for turn in dialogue.turns)
