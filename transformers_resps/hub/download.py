"""Fetch files of a Hub repository, all from one commit, and check their hashes.

`huggingface_hub` 2.4 checks only the size of a download over HTTP (`http_get`). It names a cached file after its ETag,
a hash of the content. Here the content is hashed again and compared with that name.
"""

import hashlib
import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)

from ..compat import TransportError


class RepositoryFiles:
    """Fetches files of a repository, all from the commit of the first fetched file. `hub` holds keyword arguments of
    `huggingface_hub.hf_hub_download`, such as `revision`.
    """

    def __init__(self, repo_id: str, **hub: Any) -> None:
        self.repo_id = repo_id
        self.commit: str | None = None
        self._hub = hub

    def fetch(self, name: str) -> Path | None:
        """Download a file unless it is cached; return its local path, or `None` if the commit has no such file.

        A damaged file is downloaded once more. Raises a `ValueError` if it stays damaged or the id is no Hub id, an
        `OSError` if the Hub refuses, and a `ConnectionError` if the Hub cannot be reached or the connection breaks.
        """
        path = self._download(name, **self._hub)
        if path is None:
            return None
        if self.commit is None and "snapshots" in path.parts:
            self.commit = path.parts[len(path.parts) - path.parts[::-1].index("snapshots")]  # of the last `snapshots`
            self._hub["revision"] = self.commit
        if is_whole(path):
            return path
        is_offline = constants.HF_HUB_OFFLINE or self._hub.get("local_files_only")
        again = None if is_offline else self._download(name, **{**self._hub, "force_download": True})
        if again is None or not is_whole(again):
            raise ValueError(
                f"The downloaded {name} of {self.repo_id} is damaged: its hash differs from the Hub's. Try again "
                f"online, or delete {path.resolve()}."
            )
        return again

    def _download(self, name: str, **hub: Any) -> Path | None:
        try:
            return Path(hf_hub_download(self.repo_id, name, **hub))
        except LocalEntryNotFoundError as error:
            if error.__cause__ is None or isinstance(error.__cause__, OfflineModeIsEnabled):
                return None  # offline, and not in the cache
            raise self._unreachable(name, error.__cause__) from error
        except EntryNotFoundError:
            return None
        except HfHubHTTPError as error:
            raise OSError(
                f"The Hub refused {name} of {self.repo_id}: {error}. Check the name and `revision`; a private or "
                "gated repository needs `token=`."
            ) from error
        except HFValidationError as error:
            raise ValueError(
                f"{self.repo_id} is neither a folder nor a Hub id (`owner/name`). Check the path for typing mistakes."
            ) from error
        except TransportError as error:
            raise self._unreachable(name, error) from error

    def _unreachable(self, name: str, error: BaseException) -> ConnectionError:
        return ConnectionError(
            f"{name} of {self.repo_id} could not be downloaded: {error} Check the connection and try again; partial "
            "downloads are not used."
        )


def is_whole(path: Path) -> bool:
    """Return whether the hash of a cached file's content equals the file's name; true if the name is not a hash."""
    if not path.is_symlink():  # it is in a user's folder, or in a cache without links
        return True
    blob = Path(os.readlink(path))  # follow one link only: a blob shared by repositories is a link, too
    if blob.parent.name != "blobs":
        return True
    if re.fullmatch("[0-9a-f]{64}", blob.name):  # Git LFS
        hasher = hashlib.sha256()
    elif re.fullmatch("[0-9a-f]{40}", blob.name):  # Git
        hasher = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    else:
        return True
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hasher).hexdigest() == blob.name


def folder_of(id_or_folder: str | Path) -> Path | None:
    """Return the path of a local folder, or of a Hub id's snapshot in the cache; `None` if neither exists."""
    if Path(id_or_folder).is_dir():
        return Path(id_or_folder)
    try:
        return Path(str(snapshot_download(str(id_or_folder), local_files_only=True)))
    except (OSError, ValueError):  # not completely in the cache; loading will report why
        return None


def file_of(id_or_folder: str | Path, name: str) -> Path | None:
    """Return the path of file `name` in a local folder or in a Hub id's cached commit; `None` if it is missing."""
    folder = folder_of(id_or_folder)
    if folder is None:
        return None
    if Path(id_or_folder).is_dir():
        return folder / name if (folder / name).is_file() else None
    return RepositoryFiles(str(id_or_folder), revision=folder.name).fetch(name)  # a snapshot is named after its commit
