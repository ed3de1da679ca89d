"""Write the recipe, card and code of a training command beside the files of its trainer."""

import shlex
from pathlib import Path
from typing import Any

import yaml

from transformers_resps.hub.upload import RECIPE

from .artefact import check_card, read_artefact
from .publishable import target_faults
from .release import write_card, write_custom_generate


def recipe_of(command: list[str], settings: dict[str, Any]) -> str:
    """Make `recipe.yaml` when a run starts, so that later edits of its config do not matter.

    Args:
        command: as typed. The recipe is the file after its `--config`, with the command above it.
        settings: the recipe of a run without `--config`.

    Raises:
        ValueError: its `card` is invalid.
    """
    recipe = _recipe(command, settings)
    check_card((yaml.safe_load(recipe) or {}).get("card"), "the recipe")
    return recipe


def write_run(folder: Path, recipe: str, *, name: str | None = None) -> None:
    """Write the recipe with its command, the card and `custom_generate/` into the `folder` of a trainer.

    Args:
        folder: of the head or policy.
        recipe: from `recipe_of`, made before the run.
        name: what the card's example loads: the repository, by default the folder.
    """
    (folder / RECIPE).write_text(recipe, encoding="utf-8")
    write_custom_generate(folder, name)
    write_card(folder, name)
    for fault in target_faults(read_artefact(folder).target, RECIPE):
        print(f"{folder}: the card cannot say what to load. {fault}")


def _recipe(command: list[str], settings: dict[str, Any]) -> str:
    if "--config" in command[:-1]:
        told = Path(command[command.index("--config") + 1]).read_text(encoding="utf-8")
    else:
        told = yaml.safe_dump(settings, sort_keys=False)
    typed = ["python", f"training/{Path(command[0]).name}", *command[1:]]  # wherever the checkout lies
    return f"# {shlex.join(typed)}\n{told}"
