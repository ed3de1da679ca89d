"""Which checkpoint a run resumes from, and whether it may."""

from pathlib import Path

import pytest

from transformers_resps.trainers.base import check_resumable, newest_checkpoint


def checkpoint(folder: Path, step: int) -> Path:
    made = folder / f"checkpoint-{step}"
    made.mkdir()
    (made / "trainer_state.json").write_text("{}")
    return made


def test_the_newest_complete_checkpoint_is_resumed(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    for step in (90, 100):
        checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-110").mkdir()  # as a kill leaves it
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-100")


def test_a_run_goes_on_only_with_what_it_began_with(tmp_path: Path) -> None:
    facts = {"prompts": "a", "costs": "b"}
    check_resumable(tmp_path / "run", facts | {"costs": "of a run that wrote no checkpoint"})
    check_resumable(tmp_path / "run", facts)
    checkpoint(tmp_path / "run", 9)
    check_resumable(tmp_path / "run", facts)
    with pytest.raises(ValueError, match=r"checkpoint-9 was trained with other costs than now.*another --output_dir"):
        check_resumable(tmp_path / "run", facts | {"costs": "c"})
    check_resumable(tmp_path / "run", facts)
