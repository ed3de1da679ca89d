"""Answers are recorded once, by whoever needs them, for exactly what made them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.targets import Architecture
from transformers_resps import DraftHead, attach
from transformers_resps.policies.action_grid import ActionGrid
from transformers_resps.trainers import data
from transformers_resps.trainers.data import Form, Recorder, outcomes_for, pools_of


GENERATION = {"max_new_tokens": 8, "do_sample": False}
PROMPTS = [torch.tensor([5, 6, 7, 3]), torch.tensor([7, 3])]


def test_processes_share_the_recording_and_read_what_all_have_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered: list[int] = []
    waited: list[int] = []

    class Scripted(Recorder[Any]):
        def _answer(self, prompt: torch.Tensor) -> Any:
            answered.append(int(prompt))
            return None if prompt == 4 else SimpleNamespace(save=lambda file: save_file({"prompt": prompt}, file))

        def _file(self, prompt: torch.Tensor) -> Path:
            return tmp_path / f"prompt-{int(prompt)}.safetensors"

    form: Any = Form(SimpleNamespace(load=load_file), None, [])  # type: ignore[arg-type,type-var]
    prompts = [torch.tensor([number]) for number in range(5)]
    for index in (1, 0):
        state = SimpleNamespace(process_index=index, num_processes=2, wait_for_everyone=lambda: waited.append(1))
        monkeypatch.setattr("accelerate.PartialState", lambda state=state: state)
        recorded = Scripted(None, None, form, tmp_path, GENERATION).record(prompts)  # type: ignore[arg-type]
    assert answered == [1, 3, 0, 2, 4] and len(waited) == 2
    assert [int(text["prompt"]) for text in recorded] == [0, 1, 2, 3]  # the last answer was too short
    assert {file.suffix for file in tmp_path.iterdir()} == {".safetensors"}


def test_a_recording_belongs_to_the_weights_the_shapes_the_settings_and_the_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target: Any = attach(Architecture("llama").build("sdpa").float())
    head = DraftHead.from_target(target, draft_vocab_size=12).eval()

    def record(form: Form[Any], **changes: Any) -> set[Path]:
        before = set(tmp_path.iterdir())
        assert len(Recorder(target, head, form, tmp_path, GENERATION | changes).record(PROMPTS)) == 2
        return set(tmp_path.iterdir()) - before

    small = outcomes_for(ActionGrid.small())
    assert len(record(small)) == 2 and record(small) == set()
    target.config.name_or_path = "elsewhere"
    assert record(small) == set()
    assert len(record(small, max_new_tokens=9)) == len(record(pools_of({2: 3}))) == 2
    monkeypatch.setattr(data, "FORMAT", data.FORMAT + 1)
    for file in tmp_path.iterdir():
        file.write_bytes(b"as another release wrote them")
    assert len(record(outcomes_for(ActionGrid.small()))) == 2
    with torch.no_grad():
        target.get_decoder().layers[0].mlp.down_proj.weight += 0.1
    assert len(record(outcomes_for(ActionGrid.small()))) == 2


def test_prompts_without_an_answer_are_told(tmp_path: Path) -> None:
    target: Any = attach(Architecture("llama").build("sdpa").float())
    head = DraftHead.from_target(target, draft_vocab_size=12).eval()
    recorder = Recorder(target, head, pools_of({1: 1}), tmp_path, GENERATION | {"max_new_tokens": 1})
    with pytest.raises(ValueError, match="None of 2 prompts has an answer of at least two tokens. .*raise"):
        recorder.record(PROMPTS)
