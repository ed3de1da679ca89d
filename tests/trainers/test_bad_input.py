"""What the training scripts say to bad input that no test of a part sees; the parts are tested beside them."""

import json
from pathlib import Path
from typing import Any

import generate_dataset
import pytest

from tests.training import test_train_head
from tests.training.test_train_head import SCRIPT, run


folder = test_train_head.folder


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"messages": []}],
        [{"messages": [{"role": "user", "content": "def"}]}],
        [{"prompt": "def"}, {"turns": ["gh", "jk"]}],
    ],
    ids=["no rows", "empty", "one turn", "no assistant turns"],
)
def test_a_dataset_that_nobody_answered_is_refused(
    rows: list[Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "first.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match="has an assistant turn"):
        run(folder, monkeypatch)
    assert not (folder / "run" / "head").exists()


def test_texts_longer_than_the_context_are_refused_before_any_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "first.jsonl").unlink()
    with pytest.raises(ValueError, match="`max_length` is 99999, but the target reads at most .* Lower `max_length`"):
        run(folder, monkeypatch, max_length=99999)


def test_prompts_and_answers_longer_than_the_context_are_refused() -> None:
    script = generate_dataset
    target = test_train_head.Architecture("llama", {"max_position_embeddings": 64}).build("sdpa")
    script.check_context(target, 40, 24)
    with pytest.raises(ValueError, match="allow 65 tokens, but the target reads at most 64. Lower one"):
        script.check_context(target, 40, 25)


def test_ctrl_c_says_from_where_the_same_command_resumes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train = SCRIPT["DraftHeadTrainer"].train

    def stopped(trainer: Any, **options: Any) -> None:
        train(trainer, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(SCRIPT["DraftHeadTrainer"], "train", stopped)
    with pytest.raises(SystemExit, match="130"):
        run(folder, monkeypatch)
    assert f"Run the same command to resume from {folder / 'run' / 'checkpoint-2'}" in capsys.readouterr().out
