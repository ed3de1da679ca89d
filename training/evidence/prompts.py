"""The prompts of the protocol: ours, EAGLE's five sets, and SPEED-Bench where a machine has it."""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers_resps.tools.session import Dialogue, read_dialogues, spread


OURS = Path(__file__).with_name("prompts.jsonl")
CATEGORIES = (  # of SPEED-Bench (arXiv 2604.09557), section "qualitative"
    "coding", "humanities", "math", "multilingual", "qa", "rag", "reasoning", "roleplay", "stem", "summarization",
    "writing",
)  # fmt: skip
EAGLE_SETS = ("mt_bench", "humaneval", "gsm8k", "alpaca", "cnn_dm")
_PLACEHOLDER = "FULL BENCHMARK DATA SHOULD BE FETCHED FROM THE SOURCE"  # for texts that its licence keeps out


def read_prompts(source: str | None, each: int) -> list[Dialogue]:
    """Read prompts of every category, spread evenly over it, named `category/row`.

    Args:
        source: `None` for ours; a `.jsonl` file whose rows may have a `category`; a folder with EAGLE's five sets, or
            one of SPEED-Bench's files.
        each: of a category, at most.

    Raises:
        ValueError: there is nothing of that name, or a row has no user turn, or a placeholder for one.
    """
    path = OURS if source is None else Path(source)
    if path.is_dir() and all((path / f"{name}.jsonl").is_file() for name in EAGLE_SETS):
        return [one for name in EAGLE_SETS for one in spread(read_dialogues(str(path / f"{name}.jsonl")), each)]
    categories: dict[str, list[Dialogue]] = defaultdict(list)
    for row in _rows(path, source):
        own = categories[str(row.get("category") or path.stem)]
        own.append(Dialogue.of(f"{row.get('category') or path.stem}/{len(own)}", _messages(row)))
    return [one for own in categories.values() for one in spread(own, each)]


def quickest(dialogues: Sequence[Dialogue], count: int) -> list[Dialogue]:
    """Choose the `count` prompts with the shortest first turns, each of another category."""
    by_category = {one.name.rpartition("/")[0]: one for one in sorted(dialogues, key=_length, reverse=True)}
    return sorted(by_category.values(), key=_length)[:count]


def _length(dialogue: Dialogue) -> int:
    return len(dialogue.turns[0])


def _rows(path: Path, source: str | None) -> Iterator[dict[str, Any]]:
    if path.is_file():
        yield from read_rows(path)
    elif path.is_dir() and (files := sorted(path.rglob("*.jsonl"))):
        for file in files:
            yield from read_rows(file)
    else:
        raise ValueError(
            f"There is no file or folder {source} of prompts. Pass a .jsonl file, a folder with "
            f"{', '.join(EAGLE_SETS)} as .jsonl, or a folder of SPEED-Bench's files as .jsonl."
        )


def read_rows(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a `.jsonl` file. A text may hold characters at which `splitlines` would cut it."""
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            if line.strip():
                yield json.loads(line)


def _messages(row: dict[str, Any]) -> list[dict[str, str]]:
    told = row["messages"] if "messages" in row else row.get("turns", [])
    messages = [{"role": "user", "content": one} if isinstance(one, str) else one for one in told]
    if any(_PLACEHOLDER in message["content"] for message in messages):
        raise ValueError(
            "SPEED-Bench's rows hold placeholders in place of texts. Prepare it with its own script, and pass the "
            "folder of the .jsonl files that this writes."
        )
    return messages
