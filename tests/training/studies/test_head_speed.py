import json
from pathlib import Path

import pytest

from training.studies.head_speed import Setting, batches_of, shares


def setting(folder: Path, **changes: int) -> Setting:
    sizes = {"turns": 2, "tokens": 24, "levels": 2, "draft_vocab_size": 8, "steps": 1, **changes}
    texts = str(folder / "prompts.jsonl")
    return Setting(str(folder / "target"), texts, "float32", "float32", cached=False, **sizes)


def test_batches_hold_whole_dialogues_and_predict_their_answers(folder: Path) -> None:
    rows = [{"question": "fghi", "answer": "jk"}, {"question": "g", "answer": "lmn"}]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, 4 * rows)))
    (batch,) = batches_of(setting(folder, tokens=200))
    whole, part = batch["input_ids"][0], batch["labels"][0] != -100
    assert len(batch["input_ids"]) == 1 and len(whole) == len("fghi\njk\ng\nlmn\n")
    assert part.tolist() == [False] * 5 + [True] * 3 + [False] * 2 + [True] * 4


def test_too_few_texts_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="fills 1 batches, 9 are needed. Pass fewer steps"):
        batches_of(setting(folder, steps=9, tokens=1000))


def test_every_operation_is_of_one_kind() -> None:
    text = shares({"aten::mm": 6000.0, "aten::addmm": 1000.0, "aten::copy_": 2000.0, "aten::topk": 1000.0})
    assert text.splitlines()[0] == "10"
    assert "matrix products: 7 (70%; aten::mm 6, aten::addmm 1)" in text
    assert "copies and casts: 2 (20%; aten::copy_ 2)" in text and "rest: 1 (10%; aten::topk 1)" in text
