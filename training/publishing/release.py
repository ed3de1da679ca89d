"""Write into a folder what it is published with, check it, and upload it in one commit."""

import shlex
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from transformers_resps.hub.upload import CARD, RECIPE, RESULTS, Destination, Existing, upload

from .artefact import check_card, read_artefact
from .card import render_card
from .checks import KINDS, find_faults
from .custom_code import CUSTOM_GENERATE, custom_generate_files
from .publishable import target_faults


def local_name(folder: Path) -> str:
    """The name in the card of a folder that is not published: its path in the checkout."""
    folder = folder.resolve()
    return f"model_cards/{folder.name}" if folder.parent.name == "model_cards" else folder.name


def write_card(folder: Path, name: str | None = None) -> Path:
    """Render the card of `folder` into it; its example loads `name`, by default the folder.

    Raises:
        ValueError: a file is missing or invalid.
    """
    file = folder / CARD
    file.write_text(render_card(read_artefact(folder), name or local_name(folder)), encoding="utf-8")
    return file


def write_custom_generate(folder: Path, name: str | None = None) -> None:
    """Write `custom_generate/` into `folder`; its code loads `name`, by default the folder.

    Raises:
        ValueError: a file is missing or invalid.
    """
    for path, content in custom_generate_files(read_artefact(folder), name or local_name(folder)).items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)


def recipe_of(command: list[str], settings: dict[str, Any]) -> str:
    """Make `recipe.yaml` when a run starts, so that later edits of its config do not matter.

    Args:
        command: as typed. The recipe is the file after its `--config`, with the command above it.
        settings: the recipe of a run without `--config`.

    Raises:
        ValueError: its `card` is invalid.
    """
    if "--config" in command[:-1]:
        told = Path(command[command.index("--config") + 1]).read_text(encoding="utf-8")
    else:
        told = yaml.safe_dump(settings, sort_keys=False)
    typed = ["python", f"training/{Path(command[0]).name}", *command[1:]]  # wherever the checkout lies
    recipe = f"# {shlex.join(typed)}\n{told}"
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


def files_of(folder: Path, repo_id: str) -> dict[str, Path | bytes]:
    """What publishing `folder` uploads: path in the repository -> a local file, or its content."""
    artefact = read_artefact(folder)
    plain = {file.name: file for file in sorted(folder.iterdir()) if file.is_file() and file.name != CARD}
    measured = {file.name: file for file in (artefact.measured / RESULTS, *artefact.plots) if file.is_file()}
    card = render_card(artefact, repo_id, with_plots=True).encode()
    return {CARD: card, **plain, **measured, **custom_generate_files(artefact, repo_id)}


def publish(folder: Path, destination: Destination) -> str:
    """Check `folder` and publish it; returns the address of the commit. The folder is not changed.

    The example in the published card loads the repository. Files of earlier publications that this one lacks, such as
    plots, are deleted, because they belong to other weights.

    Raises:
        ValueError: lists every fault.
        OSError: the Hub refused, or the connection broke; see `transformers_resps.hub.upload`.
    """
    check_folder(folder, destination.repo_id)
    message = f"Publish {folder.resolve().name}"
    return upload(files_of(folder, destination.repo_id), destination, message, existing=Existing(remove=is_published))


def is_published(name: str) -> bool:
    """Whether publishing manages this file of a repository, by its place and kind; other files are left alone."""
    path = PurePosixPath(name)
    return path.parts[0] == CUSTOM_GENERATE or (len(path.parts) == 1 and path.suffix in KINDS)


def check_folder(folder: Path, repo_id: str) -> None:
    """Check a folder before it is published.

    Raises:
        ValueError: lists every fault.
    """
    faults = find_faults(folder, local_name(folder), repo_id)
    if faults:
        listed = "\n".join(f"- {fault}" for fault in faults)
        raise ValueError(f"{folder} cannot be published:\n{listed}\nFix these, then publish again.")
