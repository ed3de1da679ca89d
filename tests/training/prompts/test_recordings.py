"""The script that records what drafters would have proposed."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from training.prompts import recordings
from transformers_resps import DraftHead, attach
from transformers_resps.replay import RecordedText


PROMPT = torch.tensor([5, 6, 7, 3])


def test_a_recording_cut_off_by_a_kill_is_made_anew(
    tiny_target: PreTrainedModel, tiny_head: DraftHead, tmp_path: Path
) -> None:
    given = (attach(tiny_target), tiny_head, [PROMPT], 0.0, tmp_path, 16)
    recordings.record(*given)
    (file,) = tmp_path.glob("*.safetensors")
    file.rename(file.with_suffix(".123"))
    recordings.record(*given)
    assert len(RecordedText.load(file)) > 0 and (tmp_path / "made_with.json").is_file()


def test_recordings_of_two_targets_do_not_share_a_folder(
    tiny_target: PreTrainedModel, tiny_head: DraftHead, tmp_path: Path
) -> None:
    target = attach(tiny_target)
    recordings.record(target, tiny_head, [PROMPT], 0.0, tmp_path, 16)
    recordings.record(target, tiny_head, [PROMPT], 1.0, tmp_path, 16)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    with torch.no_grad():
        target.get_decoder().layers[0].mlp.down_proj.weight += 0.1
    with pytest.raises(ValueError, match="holds recordings of another target.*Pass another --output"):
        recordings.record(target, tiny_head, [PROMPT], 0.0, tmp_path, 16)
