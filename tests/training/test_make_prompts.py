import json
import sys
from pathlib import Path
from typing import Any

import make_prompts
import pytest


CODE = "```python\n" + "total = total + price  # of one apple\n" * 5 + "```"
ANSWERS = ("An apple is a fruit. " * 20, "First.\n\n" + "A tree needs light and water. " * 5, f"Like this:\n\n{CODE}")


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`made(*options)` runs the command on sixty conversations, and returns the file that it wrote."""
    talks = [
        [{"role": "user", "content": f"Question {number}?"}, {"role": "assistant", "content": ANSWERS[number % 3]}]
        for number in range(60)
    ]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))

    def run(*options: Any) -> str:
        given = ["--conversations", tmp_path / "talks.jsonl", "--output", tmp_path / "prompts.jsonl", *options]
        monkeypatch.setattr(sys, "argv", ["make_prompts.py", *map(str, given)])
        make_prompts.main()
        return (tmp_path / "prompts.jsonl").read_text()

    return run


def test_every_kind_of_prompt_is_made_of_the_conversations(made: Any) -> None:
    rows = [json.loads(line) for line in made("--count", 80).splitlines()]
    texts = [(row["kind"], row["messages"][0]["content"]) for row in rows]
    asked = {kind: [text for its, text in texts if its == kind] for kind in make_prompts.MAKERS}
    assert all(asked.values()) and all(row["messages"][0]["role"] == "user" for row in rows)
    assert all(text.startswith("Question ") for text in asked["opening"])
    assert all(ANSWERS[0] in text or ANSWERS[1] in text for text in asked["summary"])
    assert all("[1] " in text and text.rpartition("\n")[2].startswith("Question: Q") for text in asked["passages"])
    assert all("total = total + price" in text for text in asked["code"])


def test_a_seed_makes_the_same_prompts_and_none_of_them_twice(made: Any) -> None:
    first, again, other = made("--count", 70), made("--count", 70), made("--count", 70, "--seed", 1)
    assert first == again != other
    assert len(set(first.splitlines())) == len(first.splitlines()) == 70
