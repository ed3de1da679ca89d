"""Which checkpoint a run that was killed goes on from. Knows what Transformers' Trainer writes."""

from pathlib import Path


def newest_checkpoint(folder: str | Path) -> str | None:
    """The newest whole checkpoint in an output folder: `trainer_state.json` is the last file of one."""
    whole = [path.parent for path in Path(folder).glob("checkpoint-*/trainer_state.json")]
    return str(max(whole, key=lambda path: int(path.name.split("-")[1]))) if whole else None
