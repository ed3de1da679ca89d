"""Publish a folder: check it, then upload it in one commit."""

from pathlib import Path, PurePosixPath

from transformers_resps.hub.upload import CARD, RESULTS, Destination, Existing, upload

from .artefact import read_artefact
from .card import render_card
from .checks import KINDS, find_faults
from .custom_code import CUSTOM_GENERATE, custom_generate_files


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
