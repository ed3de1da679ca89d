"""The protocol's prompts are whole and held out, and those of others are read as they lie on a machine."""

import json
from collections import Counter
from pathlib import Path

import pytest

from tests.tools.conversations import save_rows
from training.evidence.prompts import CATEGORIES, EAGLE_SETS, quickest, read_prompts
from transformers_resps.data import prompt_fingerprint
from transformers_resps.tools.session import read_dialogues


ROOT = Path(__file__).parents[3]


def test_ours_are_ten_in_each_of_the_eleven_categories() -> None:
    found = read_prompts(None, 100)
    assert Counter(one.name.partition("/")[0] for one in found) == dict.fromkeys(CATEGORIES, 10)
    assert len({one.fingerprint for one in found}) == len(found)


def test_none_of_ours_was_learned_from_or_stands_in_another_file_of_prompts() -> None:
    ours = {one.fingerprint for one in read_prompts(None, 100)}
    for file in (ROOT / "model_cards").glob("*/training_prompts.json"):
        assert not ours & set(json.loads(file.read_text())["sha256_16"]), file
    for file in (*(ROOT / "examples").rglob("*.jsonl"), *(ROOT / "training" / "recipes").glob("*.jsonl")):
        assert not ours & {one.fingerprint for one in read_dialogues(str(file))}, file


def test_a_limit_takes_as_many_of_each_category_and_five_quick_ones_are_of_five() -> None:
    assert Counter(one.name.partition("/")[0] for one in read_prompts(None, 2)) == dict.fromkeys(CATEGORIES, 2)
    quick = quickest(read_prompts(None, 10), 5)
    assert len({one.name.partition("/")[0] for one in quick}) == 5


def test_eagles_sets_and_speed_benchs_files_are_read_from_folders(tmp_path: Path) -> None:
    for name in EAGLE_SETS:
        save_rows(tmp_path / f"{name}.jsonl", [["one"], ["two"], ["three"]])
    assert [one.name for one in read_prompts(str(tmp_path), 1)] == [f"{name}/0" for name in EAGLE_SETS]
    other = tmp_path / "speed"
    other.mkdir()
    rows = [
        {"category": "qa", "turns": ["a", "b"]},
        {"category": "rag", "messages": [{"role": "user", "content": "c"}]},
    ]
    (other / "qualitative.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = read_prompts(str(other), 5)
    assert [(one.name, one.turns) for one in found] == [("qa/0", ("a", "b")), ("rag/0", ("c",))]
    assert found[0].fingerprint == prompt_fingerprint("a")


def test_placeholders_of_speed_bench_are_refused(tmp_path: Path) -> None:
    text = "FULL BENCHMARK DATA SHOULD BE FETCHED FROM THE SOURCE USING SPECDEC_BENCH"
    (tmp_path / "qualitative.jsonl").write_text(json.dumps({"category": "qa", "turns": [text]}))
    with pytest.raises(ValueError, match="placeholders in place of texts"):
        read_prompts(str(tmp_path), 1)


def test_a_name_that_is_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no file or folder nowhere"):
        read_prompts("nowhere", 1)
