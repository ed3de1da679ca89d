"""Which checkpoint a killed run resumes from, and whether it may. Knows what Transformers' Trainer writes."""

import json
from pathlib import Path


_BEGAN_WITH = "run.json"


def newest_checkpoint(folder: str | Path) -> str | None:
    """The newest whole checkpoint in an output folder: `trainer_state.json` is the last file of one."""
    whole = [path.parent for path in Path(folder).glob("checkpoint-*/trainer_state.json")]
    return str(max(whole, key=lambda path: int(path.name.split("-")[1]))) if whole else None


def check_resumable(folder: str | Path, facts: dict[str, str]) -> None:
    """Refuse to resume from checkpoints that were trained on something else.

    Args:
        folder: the output folder, where a new run writes its facts.
        facts: name of each input of the run -> a hash of it.

    Raises:
        ValueError: names the inputs that differ.
    """
    file = Path(folder) / _BEGAN_WITH
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else facts
    changed = [name for name, value in facts.items() if before.get(name) != value]
    if changed and (checkpoint := newest_checkpoint(folder)):
        raise ValueError(
            f"{checkpoint} was trained with other {', '.join(changed)} than now. "
            "Pass another --output_dir, or the same inputs as that run."
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
