"""Prompts made from the texts of conversations: whole, of few lengths, and without what is to be answered."""

import argparse
import json
import random
import sys
from pathlib import Path

import pytest

from tests.tokenizers import letter_tokenizer
from training.studies import task_prompts
from transformers_resps.data import read_conversations


CODE = '''Here you are:
```python
import math

def area(radius):
    """The area of a circle."""
    squared = radius**2
    return math.pi * squared

def broken(
```'''
WHOLE = CODE.replace("\ndef broken(\n", "")


def count_words(prompt: str) -> int:
    return len(prompt.split())


def test_a_function_is_given_up_to_its_documentation() -> None:
    assert list(task_prompts.function_heads(WHOLE)) == ['def area(radius):\n    """The area of a circle."""']
    assert list(task_prompts.function_heads(CODE)) == []  # does not parse


def test_a_completion_has_a_length_that_others_share() -> None:
    prompt = task_prompts.completion_prompt("def f(x):", list(task_prompts.COMPLETE), lambda text: len(text))
    assert prompt is None or len(prompt) % task_prompts.COUNT_STEP == 0
    assert task_prompts.completion_prompt("def f(x):", ["{}"], lambda text: 9) is None
    assert task_prompts.completion_prompt("def f(x):", ["a {}", "b {}"], lambda text: 8) == "a def f(x):"


@pytest.mark.parametrize("count", [120, 180])
def test_a_summary_is_asked_of_exactly_as_many_tokens(count: int) -> None:
    text = " ".join(f"w{i}" for i in range(400))
    prompt = task_prompts.summary_prompt(text, count, "Summarize: {}", count_words)
    assert prompt is not None and count_words(prompt) == count and prompt.startswith("Summarize: w0 w1 ")
    assert task_prompts.summary_prompt(text, 50, "Summarize: {}", count_words) is None  # too short to be worth it
    assert task_prompts.summary_prompt(text, 900, "Summarize: {}", count_words) is None  # too few words


def test_both_kinds_are_made_once_and_no_more_than_asked(tmp_path: Path) -> None:
    long = " ".join(random.Random(0).choices(["one", "two", "three"], k=500))
    rows = [{"messages": [{"role": "user", "content": text}]} for text in (long, long, WHOLE, WHOLE)]
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    args = argparse.Namespace(texts=[file], seed=0, summaries=5, completions=5, lengths=[150])
    prompts = list(task_prompts.make_prompts(args, count_words))
    assert sum("area(radius)" in prompt for prompt in prompts) <= 1
    assert sum("one" in prompt for prompt in prompts) == 1
    args.summaries = 0
    assert not any("two two" in prompt for prompt in task_prompts.make_prompts(args, count_words))


def test_the_command_writes_prompts_whose_tokens_were_counted_with_the_chat_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = letter_tokenizer()  # a token is a character
    tokenizer.chat_template = "{{ messages[0].content }}!"
    tokenizer.save_pretrained(tmp_path / "target")
    chance = random.Random(0)
    texts = [" ".join(chance.choices("abcd", k=600)) for _ in range(8)]
    file, output = tmp_path / "texts.jsonl", tmp_path / "made" / "tasks.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": text}) for text in texts), encoding="utf-8")
    paths = ["--target", str(tmp_path / "target"), "--texts", str(file), "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["task_prompts.py", *paths, "--lengths", "350", "371"])
    task_prompts.main()
    (made, *others) = list(read_conversations(output))
    assert all(len(message["content"]) + 1 in (350, 371) for (message,) in [made, *others])
