"""Make prompts of many kinds for `generate_dataset.py`, out of conversations, questions and the texts in them.

    python training/make_prompts.py --conversations work/ShareGPT_V3_unfiltered_cleaned_split.json \
        --conversations ../shared/data/train/gsm8k.jsonl --output work/prompts.jsonl

Most are the opening turns of conversations. The others ask for a summary of an answer, for the answer to a question
from passages, for something to do with code that stands in an answer, and for a text that goes on from one. The same
files and seed give the same prompts.
"""

from runs.announcement import announce


if __name__ == "__main__":
    announce(__doc__)

import argparse
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from runs.command_line import run
from transformers_resps.data import Conversation, load_conversations


Maker = Callable[[random.Random, "Texts"], str | None]
_CODE = re.compile(r"```\w*\n(.{120,1500}?)```", re.DOTALL)
_LENGTHS = 300, 2400  # characters of a text to summarise
_SUMMARIES = (
    "Summarise in three sentences:", "Summarise the following text in one paragraph.", "TL;DR:",
    "Give the main points as a list:", "Summarise for a child of ten:",
    "Write a headline and two sentences about this text:",
)  # fmt: skip
_CODE_TASKS = (
    "Explain what this code does.", "Write unit tests for this code.", "Find possible bugs in this code and fix them.",
    "Add comments and a docstring to this code.", "Rewrite this code so that it is easier to read.",
)  # fmt: skip
_WRITING = (
    "Write a short story that begins like this:", "Continue this text:", "Rewrite this text in a friendlier tone:",
    "Turn this text into an e-mail to a colleague:", "Write a poem about this:",
)  # fmt: skip


class Texts:
    """The opening questions of conversations, and the answers to them."""

    def __init__(self, conversations: list[Conversation]) -> None:
        self.opened = [pair for pair in map(_opening, conversations) if pair is not None]

    def pair(self, chance: random.Random) -> tuple[str, str]:
        """Draw an opening question and its answer, which may be empty."""
        return chance.choice(self.opened)


def _opening(conversation: Conversation) -> tuple[str, str] | None:
    roles = [message["role"] for message in conversation[:2]]
    if roles[:1] != ["user"] or not conversation[0]["content"].strip():
        return None
    return conversation[0]["content"], conversation[1]["content"] if roles == ["user", "assistant"] else ""


def opening(chance: random.Random, texts: Texts) -> str | None:
    return texts.pair(chance)[0]


def summary(chance: random.Random, texts: Texts) -> str | None:
    _, answer = texts.pair(chance)
    return f"{chance.choice(_SUMMARIES)}\n\n{answer}" if _LENGTHS[0] <= len(answer) <= _LENGTHS[1] else None


def passages(chance: random.Random, texts: Texts) -> str | None:
    question, answer = texts.pair(chance)
    own = [part for part in answer.split("\n\n") if 80 <= len(part) <= 700][:2]
    if len(question) > 300 or not own:
        return None
    others = [part for _ in range(2) for part in texts.pair(chance)[1].split("\n\n")[:1] if 80 <= len(part) <= 500]
    shown = own + others
    chance.shuffle(shown)
    numbered = "\n".join(f"[{number}] {part}" for number, part in enumerate(shown, start=1))
    return f"Answer with the help of the passages only.\n\n{numbered}\n\nQuestion: {question}"


def code(chance: random.Random, texts: Texts) -> str | None:
    found = _CODE.search(texts.pair(chance)[1])
    return None if found is None else f"{chance.choice(_CODE_TASKS)}\n\n```\n{found[1]}```"


def writing(chance: random.Random, texts: Texts) -> str | None:
    _, answer = texts.pair(chance)
    first = answer.split("\n\n")[0]
    return f"{chance.choice(_WRITING)}\n\n{first}" if 60 <= len(first) <= 500 else None


MAKERS: dict[str, tuple[float, Maker]] = {  # share of all prompts
    "opening": (0.62, opening), "summary": (0.12, summary), "passages": (0.12, passages), "code": (0.07, code),
    "writing": (0.07, writing),
}  # fmt: skip


def prompts_of(texts: Texts, count: int, seed: int) -> Iterator[dict[str, object]]:
    """Yield `count` different prompts, in random order, fewer where the texts do not give as many."""
    chance, seen = random.Random(seed), set[str]()
    names, shares = list(MAKERS), [share for share, _ in MAKERS.values()]
    for _ in range(20 * count):
        (name,) = chance.choices(names, shares)
        asked = MAKERS[name][1](chance, texts)
        if asked is None or asked in seen:
            continue
        seen.add(asked)
        yield {"kind": name, "messages": [{"role": "user", "content": asked}]}
        if len(seen) == count:
            return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", required=True, action="append", type=Path, help="may be repeated")
    parser.add_argument("--output", required=True, type=Path, help="a .jsonl file")
    parser.add_argument("--count", type=int, default=24000, help="number of prompts")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    opened = [one for path in args.conversations for one in load_conversations(path)]
    made = list(prompts_of(Texts(opened), args.count, args.seed))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in made), encoding="utf-8")
    kinds = Counter(str(one["kind"]) for one in made)
    print(f"{len(made)} prompts: " + ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()))


if __name__ == "__main__":
    run(main)
