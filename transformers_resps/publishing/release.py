"""Publish a folder: look for faults, then put all of it on the Hub in one commit."""

from pathlib import Path, PurePosixPath

from ..hub import CARD, Destination, Existing, upload
from .artefact import read_artefact
from .card import render_card
from .checks import KINDS, find_faults
from .custom_code import CUSTOM_GENERATE, custom_generate_files


def local_name(folder: Path) -> str:
    """What the card of a folder that is not published calls it, from the root of the checkout."""
    folder = folder.resolve()
    return f"model_cards/{folder.name}" if folder.parent.name == "model_cards" else folder.name


def write_card(folder: Path, name: str | None = None) -> Path:
    """Render the card of `folder` into it, with `name` in its example: the folder's own when left out.

    Raises:
        ValueError: a file that it is rendered from is missing or damaged.
    """
    file = folder / CARD
    file.write_text(render_card(read_artefact(folder), name or local_name(folder)), encoding="utf-8")
    return file


def write_custom_generate(folder: Path) -> None:
    """Put the `custom_generate/` folder into `folder`, so that it works from there as from the Hub."""
    for name, content in custom_generate_files().items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)


def files_of(folder: Path, repo_id: str) -> dict[str, Path | bytes]:
    """What publishing `folder` puts on the Hub: path in the repository -> a local file, or its content."""
    plain = {file.name: file for file in sorted(folder.iterdir()) if file.is_file() and file.name != CARD}
    card = render_card(read_artefact(folder), repo_id).encode()
    return {CARD: card, **plain, **custom_generate_files()}


def publish(folder: Path, destination: Destination) -> str:
    """Publish `folder` if nothing is wrong with it; returns the address of the commit. The folder is only read.

    The published card names the repository in its example; the local one names the folder. Files that earlier
    publications left and this one lacks, such as plots, are deleted: they would tell of other weights.

    Raises:
        ValueError: lists everything that is wrong.
        OSError: the Hub refused, or the connection broke; see `transformers_resps.hub.upload`.
    """
    check(folder, destination.repo_id)
    message = f"Publish {folder.resolve().name}"
    return upload(files_of(folder, destination.repo_id), destination, message, existing=Existing(remove=is_published))


def is_published(name: str) -> bool:
    """Whether a file of a repository is one that publishing puts there, by its place and kind; others are let be."""
    path = PurePosixPath(name)
    return path.parts[0] == CUSTOM_GENERATE or (len(path.parts) == 1 and path.suffix in KINDS)


def check(folder: Path, repo_id: str) -> None:
    """Refuse a folder with faults.

    Raises:
        ValueError: lists them all.
    """
    faults = find_faults(folder, local_name(folder), repo_id)
    if faults:
        listed = "\n".join(f"- {fault}" for fault in faults)
        raise ValueError(
            f"{folder} cannot be published:\n{listed}\nA published artefact is complete and says nothing that its "
            "files do not. Mend these, then publish again."
        )
