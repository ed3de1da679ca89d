"""The script that records what drafters would have proposed."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from training.prompts import recordings
from transformers_resps import DraftHead, attach


PROMPT = torch.tensor([5, 6, 7, 3])


def test_a_recording_cut_off_by_a_kill_is_made_anew(
    tiny_target: PreTrainedModel, tiny_head: DraftHead, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answers(target: Any, prompts: list[torch.Tensor], *_: Any) -> list[torch.Tensor]:
        return [torch.cat([prompt, torch.arange(3, 11)]) for prompt in prompts]

    monkeypatch.setattr(recordings, "answers", answers)
    given = (attach(tiny_target), tiny_head, [PROMPT], 0.0, tmp_path, 16)
    recordings.record(*given)
    (file,) = tmp_path.glob("*.safetensors")
    file.rename(file.with_suffix(".tmp"))
    recordings.record(*given)
    assert {path.name for path in tmp_path.iterdir()} == {file.name, "made_with.json"}
    assert len(recordings.load(tmp_path)) == 1


def test_recordings_of_two_targets_do_not_share_a_folder(
    tiny_target: PreTrainedModel, tiny_head: DraftHead, tmp_path: Path
) -> None:
    recordings.record(tiny_target, tiny_head, [], 0.0, tmp_path, 16)
    recordings.record(tiny_target, tiny_head, [], 1.0, tmp_path, 16)
    with torch.no_grad():
        tiny_target.get_decoder().layers[0].mlp.down_proj.weight += 0.1
    with pytest.raises(ValueError, match="holds recordings of another target.*Pass another --output"):
        recordings.record(tiny_target, tiny_head, [], 0.0, tmp_path, 16)


def test_answers_are_drawn_from_the_whole_distribution() -> None:
    class Target:
        generation_config = SimpleNamespace(eos_token_id=2)

        def generate(self, prompts: torch.Tensor, **settings: Any) -> torch.Tensor:
            self.settings = settings
            return torch.nn.functional.pad(prompts, (0, 5), value=4)

    target = Target()
    (answer,) = recordings.answers(target, [PROMPT], 1.0, 5)
    assert answer.tolist() == [*PROMPT.tolist(), 4, 4, 4, 4, 4]
    assert target.settings["do_sample"] and (target.settings["top_k"], target.settings["top_p"]) == (0, 1.0)
