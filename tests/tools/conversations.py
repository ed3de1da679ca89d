"""What the benchmark's tests share: a folder with a tiny target, its tokenizer and head, and datasets in letters."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from tests.tokenizers import letter_tokenizer
from transformers_resps import DraftHead
from transformers_resps.compilation import compiled as compiled_function
from transformers_resps.tools.methods import Bench
from transformers_resps.tools.session import Dialogue


def interrupted_at_the_sixth_answer(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Press Ctrl-C once; the list grows with each answer that is not for warming up."""
    decode, calls = Bench.decode, list[Any]()

    def counted(self: Bench, *args: Any, **kwargs: Any) -> Any:
        if "max_new_tokens" not in kwargs:
            calls.append(args)
            if len(calls) == 6:
                raise KeyboardInterrupt
        return decode(self, *args, **kwargs)

    monkeypatch.setattr(Bench, "decode", counted)
    return calls


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


@pytest.fixture
def named(
    tmp_path: Path, tiny_target: PreTrainedModel, tiny_head: DraftHead, monkeypatch: pytest.MonkeyPatch
) -> tuple[str, str, list[str]]:
    """A target, a head, and the options that measure two of five rows. What is compiled runs as it is."""
    monkeypatch.setattr(compiled_function.torch, "compile", lambda function, **_: function)  # saves half a minute
    file = save_rows(tmp_path / "mine.jsonl", [["defg", "hi"], ["klkl"], ["mnop"], ["qrst"], ["uvwx"]])
    options = f"--repeats 1 --accept-noise --limit 2 --max-new-tokens 8 --dataset {file} --output {tmp_path / 'out'}"
    return *save_models(tmp_path, tiny_target, tiny_head), options.split()


def results(folder: Path) -> dict[str, Any]:
    """What a benchmark wrote."""
    found: dict[str, Any] = json.loads((folder / "out" / "results.json").read_text())
    return found
