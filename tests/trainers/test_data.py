"""Answers are recorded once, by whoever needs them, for exactly what made them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.targets import Architecture
from transformers_resps import DraftHead, attach
from transformers_resps.replay import RankedText, RecordedText
from transformers_resps.trainers.data import AnswerRecorder


GENERATION = {"max_new_tokens": 8, "do_sample": False}
PROMPTS = [torch.tensor([5, 6, 7, 3]), torch.tensor([7, 3])]


def test_processes_share_the_recording_and_read_what_all_have_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered: list[int] = []
    waited: list[int] = []

    class Scripted(AnswerRecorder[Any]):
        def _answer(self, prompt: torch.Tensor) -> Any:
            answered.append(int(prompt))
            return None if prompt == 4 else SimpleNamespace(save=lambda file: save_file({"prompt": prompt}, file))

        def _file(self, prompt: torch.Tensor) -> Path:
            return tmp_path / f"prompt-{int(prompt)}.safetensors"

    kind: Any = SimpleNamespace(load=load_file)
    prompts = [torch.tensor([number]) for number in range(5)]
    for index in (1, 0):
        state = SimpleNamespace(process_index=index, num_processes=2, wait_for_everyone=lambda: waited.append(1))
        monkeypatch.setattr("accelerate.PartialState", lambda state=state: state)
        recorded = Scripted(None, None, kind, {}, tmp_path, GENERATION).record(prompts)  # type: ignore[arg-type]
    assert answered == [1, 3, 0, 2, 4] and len(waited) == 2
    assert [int(text["prompt"]) for text in recorded] == [0, 1, 2, 3]  # the last answer was too short
    assert {file.suffix for file in tmp_path.iterdir()} == {".safetensors"}


def test_a_recording_belongs_to_the_weights_the_shapes_the_settings_and_the_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target: Any = attach(Architecture("llama").build("sdpa").float())
    head = DraftHead.from_target(target, draft_vocab_size=12).eval()

    def record(kind: Any = RankedText, levels: int = 2, **changes: Any) -> int:
        """How many files were made."""
        before = set(tmp_path.iterdir())
        recorder = AnswerRecorder(target, head, kind, {2: levels}, tmp_path, GENERATION | changes)
        assert len(recorder.record(PROMPTS)) == 2
        return len(set(tmp_path.iterdir()) - before)

    assert record() == 2 and record() == 0
    target.config.name_or_path = "elsewhere"
    assert record() == 0
    assert record(max_new_tokens=9) == record(levels=3) == record(RecordedText) == 2
    monkeypatch.setattr(RankedText, "FORMAT", RankedText.FORMAT + 1)
    for file in tmp_path.iterdir():
        file.write_bytes(b"as another release wrote them")
    assert record() == 2
    with torch.no_grad():
        target.get_decoder().layers[0].mlp.down_proj.weight += 0.1
    assert record() == 2


def test_prompts_without_an_answer_are_told(tmp_path: Path) -> None:
    target: Any = attach(Architecture("llama").build("sdpa").float())
    head = DraftHead.from_target(target, draft_vocab_size=12).eval()
    recorder = AnswerRecorder(target, head, RecordedText, {1: 1}, tmp_path, GENERATION | {"max_new_tokens": 1})
    with pytest.raises(ValueError, match="None of 2 prompts has an answer of at least two tokens. .*raise"):
        recorder.record(PROMPTS)
