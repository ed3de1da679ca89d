"""What the benchmark's tests share: a folder with a tiny target, its tokenizer and head, and datasets in letters."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.tokenizers import letter_tokenizer
from transformers_resps import DraftHead
from transformers_resps.tools.session import Dialogue


class Ticking:
    """One second passes at every reading."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def dialogue(name: str, *turns: str) -> Dialogue:
    return Dialogue(name, [], turns)


def save_models(folder: Path, target: Any, head: DraftHead) -> tuple[str, str]:
    """The folders of both, as a command takes them."""
    target.save_pretrained(folder / "target")
    letter_tokenizer().save_pretrained(folder / "target")
    head.save_pretrained(folder / "head")
    return str(folder / "target"), str(folder / "head")


def save_rows(file: Path, rows: Sequence[Sequence[str]]) -> str:
    """A dataset with `turns`."""
    file.write_text("".join(json.dumps({"turns": list(turns)}) + "\n" for turns in rows), encoding="utf-8")
    return str(file)
