import json
from pathlib import Path

import pytest

from tests.bench.conversations import dialogue, save_rows
from transformers_resps.bench.prompts import Dialogue, read_dialogues, spread
from transformers_resps.data import prompt_fingerprint, read_training_prompts, to_tokens, write_training_prompts


def test_every_user_turn_follows_the_answers_that_are_given() -> None:
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "an answer of the dataset"},
        {"role": "user", "content": "two"},
    ]
    found = Dialogue.of("d/0", messages)
    assert found.asked([]) == messages[:2]
    assert found.asked(["mine"]) == [
        *messages[:2],
        {"role": "assistant", "content": "mine"},
        {"role": "user", "content": "two"},
    ]


def letters(text: str) -> dict[str, list[int]]:
    """A tokenizer without a chat template."""
    return {"input_ids": [ord(letter) for letter in text]}


letters.chat_template = None  # type: ignore[attr-defined]


def test_without_a_chat_template_every_message_is_a_line() -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "one"}]
    assert to_tokens(messages, letters).tolist() == [ord(letter) for letter in "be brief\none\n"]


def test_prompts_are_spread_evenly_over_the_file() -> None:
    rows = [dialogue(f"d/{number}", "x") for number in range(10)]
    assert [one.name for one in spread(rows, 3)] == ["d/0", "d/3", "d/6"]
    assert len(spread(rows, 99)) == 10


@pytest.mark.parametrize(
    "row", [{"turns": ["a", "b"]}, {"prompt": "a"}, {"messages": [{"role": "user", "content": "a"}]}]
)
def test_each_layout_of_a_dataset_is_read(tmp_path: Path, row: dict[str, object]) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps(row))
    (found,) = read_dialogues(str(file))
    assert found.name == "mine/0" and found.turns[0] == "a"


def test_a_dataset_without_questions_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps({"messages": [{"role": "assistant", "content": "a"}]}))
    with pytest.raises(ValueError, match="mine/0 has no user turn"):
        read_dialogues(str(file))
    with pytest.raises(ValueError, match="has no rows"):
        read_dialogues(save_rows(tmp_path / "empty.jsonl", []))


def test_training_prompts_are_kept_as_hashes_in_a_folder(tmp_path: Path) -> None:
    assert read_training_prompts(tmp_path) is None
    write_training_prompts(tmp_path, ["a  b", "c", "c"])
    assert read_training_prompts(tmp_path) == {prompt_fingerprint("a b"), prompt_fingerprint("c")}
    assert "a b" not in (tmp_path / "training_prompts.json").read_text()
    (tmp_path / "training_prompts.json").write_text("[]")
    with pytest.raises(ValueError, match="is not what `write_training_prompts` writes"):
        read_training_prompts(tmp_path)
