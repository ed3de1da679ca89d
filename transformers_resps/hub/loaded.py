"""Files of a head, policy or target beside those that loading it reads."""

from pathlib import Path

from huggingface_hub import snapshot_download

from .download import RepositoryFiles


def folder_of(id_or_folder: str | Path) -> Path | None:
    """Find the files of a head, policy or target: a folder, or what the Hub's cache holds of a repository."""
    if Path(id_or_folder).is_dir():
        return Path(id_or_folder)
    try:
        return Path(str(snapshot_download(str(id_or_folder), local_files_only=True)))
    except (OSError, ValueError):  # neither a folder nor whole in the cache: loading it says what is wrong
        return None


def file_of(id_or_folder: str | Path, name: str) -> Path | None:
    """Fetch a file of a head or policy that loading it did not: from its folder, or the commit that was loaded.

    Raises:
        OSError, ConnectionError, ValueError: as `RepositoryFiles.fetch`.
    """
    folder = folder_of(id_or_folder)
    if folder is None:
        return None
    if Path(id_or_folder).is_dir():
        return folder / name if (folder / name).is_file() else None
    return RepositoryFiles(str(id_or_folder), revision=folder.name).fetch(name)  # a snapshot is named after its commit
