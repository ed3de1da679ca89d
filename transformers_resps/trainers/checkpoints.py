"""Which checkpoint a run that was killed goes on from, and whether it may. Knows what Transformers' Trainer writes."""

import json
from pathlib import Path


_BEGAN_WITH = "run.json"


def newest_checkpoint(folder: str | Path) -> str | None:
    """The newest whole checkpoint in an output folder: `trainer_state.json` is the last file of one."""
    whole = [path.parent for path in Path(folder).glob("checkpoint-*/trainer_state.json")]
    return str(max(whole, key=lambda path: int(path.name.split("-")[1]))) if whole else None


def check_resumable(folder: str | Path, facts: dict[str, str]) -> None:
    """Refuse to go on from checkpoints that learned from something else.

    Args:
        folder: the output folder; a run that begins leaves its facts there.
        facts: what the run learns from -> a hash of it.

    Raises:
        ValueError: names what is another now.
    """
    file = Path(folder) / _BEGAN_WITH
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else facts
    changed = [name for name, value in facts.items() if before.get(name) != value]
    if changed and (checkpoint := newest_checkpoint(folder)):
        raise ValueError(
            f"{checkpoint} was trained with other {', '.join(changed)} than now. A run goes on with what it began "
            "with. Pass another --output_dir, or what that run began with."
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
