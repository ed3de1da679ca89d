"""Make prompts that chat logs hold few of: summarise this text, complete this function.

Question: how does a head learn tasks that chat logs hold few of?
Answer: from prompts made out of the logs' own texts and answered by the target. 256 summaries and a wider tree raised
the tau of Qwen's head on CNN/DM from 1.41 to 1.47 (`LOG.md`).

    python -m training.studies.task_prompts --target work/smollm2 --texts sharegpt.json --output work/tasks.jsonl

Prompts have few different lengths in tokens, so that batches of `generate_dataset.py` need little padding.
"""

import argparse
import ast
import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from transformers_resps.data import read_conversations


SUMMARISE = (
    "Summarize: {}",
    "Summarize the following text.\n\n{}",
    "{}\n\nSummarize this in a few sentences.",
    "Give me a short summary of this:\n{}",
    "What are the main points of the following text?\n\n{}",
)
COMPLETE = (
    "Complete the code I provided.\n{}",
    "Complete this function:\n\n{}",
    "Finish the following Python function.\n\n{}",
    "Please write the rest of this code.\n{}",
    "Here is the beginning of a Python function. Write the rest of it, and nothing else.\n\n{}",
    "Implement this:\n{}",
    "Can you complete the code below, please?\n\n{}",
    "```python\n{}\n```\nComplete it.",
)
CODE_BLOCK = re.compile(r"```(?:python|py)?\n(.*?)```", re.DOTALL)
MIN_WORDS = 100  # of a text that is worth a summary
COUNT_STEP = 8  # tokens: prompts with a function have a multiple of it


def texts_of(paths: list[Path]) -> Iterator[str]:
    """Yield every message once, whoever wrote it."""
    seen: set[int] = set()
    for path in paths:
        for conversation in read_conversations(path):
            for message in conversation:
                if (key := hash(message["content"])) not in seen:
                    seen.add(key)
                    yield message["content"]


def function_heads(text: str) -> Iterator[str]:
    """The first lines of each documented or commented function in a code block of `text`, without its body."""
    for block in CODE_BLOCK.findall(text):
        try:
            module = ast.parse(block)
        except (SyntaxError, ValueError):
            continue
        lines = block.split("\n")
        for node in module.body:
            if isinstance(node, ast.FunctionDef) and len(node.body) > 1:
                documented = ast.get_docstring(node) is not None
                last = node.body[0].end_lineno if documented else node.body[0].lineno - 1
                yield "\n".join(lines[node.lineno - 1 : last])


def summary_prompt(text: str, count: int, phrase: str, count_tokens: Callable[[str], int]) -> str | None:
    """A prompt of exactly `count` tokens around the first words of `text`; `None` where no cut gives that."""
    words = text.split(" ")
    low, high = 1, len(words)
    while low < high:
        middle = (low + high) // 2
        if count_tokens(phrase.format(" ".join(words[:middle]))) < count:
            low = middle + 1
        else:
            high = middle
    prompt = phrase.format(" ".join(words[:low]))
    return prompt if low >= MIN_WORDS and count_tokens(prompt) == count else None


def completion_prompt(head: str, phrases: list[str], count_tokens: Callable[[str], int]) -> str | None:
    """The first phrase around `head` that makes a multiple of `COUNT_STEP` tokens; `None` where none does."""
    prompts = (phrase.format(head) for phrase in phrases)
    return next((prompt for prompt in prompts if count_tokens(prompt) % COUNT_STEP == 0), None)


def make_prompts(args: argparse.Namespace, count_tokens: Callable[[str], int]) -> Iterator[str]:
    chance = random.Random(args.seed)
    texts = list(texts_of(args.texts))
    chance.shuffle(texts)
    left = {"summaries": args.summaries, "completions": args.completions}
    for text in texts:
        if left["summaries"] and "```" not in text and text.count(" ") >= MIN_WORDS:
            length = chance.choice([length for length in args.lengths if length < len(text) / 3] or [0])
            prompt = length and summary_prompt(text, length, chance.choice(SUMMARISE), count_tokens)
            if prompt:
                left["summaries"] -= 1
                yield prompt
        for head in function_heads(text):
            prompt = completion_prompt(head, chance.sample(COMPLETE, len(COMPLETE)), count_tokens)
            if prompt and left["completions"]:
                left["completions"] -= 1
                yield prompt
        if not any(left.values()):
            return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True, help="model id or folder; its tokenizer counts")
    parser.add_argument("--texts", required=True, nargs="+", type=Path, help="conversations, .json or .jsonl")
    parser.add_argument("--output", required=True, type=Path, help="a .jsonl file")
    parser.add_argument("--summaries", type=int, default=600, help="texts to summarise")
    parser.add_argument("--completions", type=int, default=600, help="functions to complete")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 768, 1024], help="of summaries' prompts")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tokenizer: Any = AutoTokenizer.from_pretrained(args.target)

    def count_tokens(prompt: str) -> int:
        messages = [{"role": "user", "content": prompt}]
        return len(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))

    args.output.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"messages": [{"role": "user", "content": prompt}]} for prompt in make_prompts(args, count_tokens)]
    args.output.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{args.output}: {len(rows)} prompts")


if __name__ == "__main__":
    main()
