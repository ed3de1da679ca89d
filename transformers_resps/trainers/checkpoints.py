"""Find the checkpoint that a killed run resumes from, and check that the run may resume from it."""

import json
from pathlib import Path


_FACTS = "run.json"


def newest_checkpoint(folder: str | Path) -> str | None:
    """The newest complete checkpoint in an output folder: `trainer_state.json` is the last file that is written.

    Transformers' `get_last_checkpoint` would also return one that a kill left incomplete, which cannot be loaded.
    """
    complete = [path.parent for path in Path(folder).glob("checkpoint-*/trainer_state.json")]
    return str(max(complete, key=lambda path: int(path.name.split("-")[1]))) if complete else None


def check_resumable(folder: str | Path, facts: dict[str, str]) -> None:
    """Check that the checkpoints in an output folder were trained on what this run trains on.

    Args:
        folder: the output folder. Its `run.json` keeps the facts.
        facts: name of each input of the run -> a hash of it.

    Raises:
        ValueError: names the inputs that differ.
    """
    file = Path(folder) / _FACTS
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else facts
    changed = [name for name, value in facts.items() if before.get(name) != value]
    if changed and (checkpoint := newest_checkpoint(folder)):
        raise ValueError(
            f"{checkpoint} was trained with other {', '.join(changed)} than now. "
            "Pass another --output_dir, or the same inputs as that run."
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    written = file.with_suffix(".tmp")
    written.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    written.replace(file)  # a kill or a full disk leaves the old one
