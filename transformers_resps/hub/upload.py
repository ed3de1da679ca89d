"""Put files into a repository, in one commit: all of them or none."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

from .transport import TransportError


Answer = TypeVar("Answer")

_BUSY = (429, 503)  # the Hub did nothing and asks to come back
_TRIES, _LONGEST_WAIT_SECONDS = 5, 60.0


@dataclass(frozen=True, slots=True)
class Destination:
    """Where to put files.

    Attributes:
        repo_id: made if missing.
        private: of a repository that is made; the account's default when `None`.
        token: otherwise the one of `hf auth login`.
        revision: branch, made if missing; the main one when `None`.
        create_pr: propose the commit instead of making it.
    """

    repo_id: str
    private: bool | None = None
    token: str | bool | None = None
    revision: str | None = None
    create_pr: bool = False


def upload(
    files: Mapping[str, Path | bytes],
    destination: Destination,
    message: str,
    *,
    keep: tuple[str, ...] = (),
    sleep: Callable[[float], None] = time.sleep,
) -> str:
    """Commit `files` on top of what the repository holds now; returns the address of the commit.

    Waits and asks again while the Hub says that it is busy.

    Args:
        files: path in the repository -> a local file, or its content.
        destination: see there.
        message: subject of the commit.
        keep: of `files`, those that are left as they are where the repository has them.
        sleep: waits that many seconds.

    Raises:
        OSError: the Hub refused, or somebody else committed meanwhile. Nothing was committed.
        ConnectionError: the connection broke. Either all was committed or nothing.
        ValueError: `repo_id` is no id.
    """
    with _explained(destination.repo_id):
        return _commit(files, destination, message, keep, sleep)


def make_repository(destination: Destination, sleep: Callable[[float], None] = time.sleep) -> str:
    """Make the repository if it is missing; returns its full id. Refused where an upload would be.

    Raises:
        OSError, ConnectionError, ValueError: as `upload`.
    """
    api = HfApi(token=destination.token)
    with _explained(destination.repo_id):
        made = _patiently(
            lambda: api.create_repo(destination.repo_id, private=destination.private, exist_ok=True), sleep
        )
    return made.repo_id


@contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    """Errors of `huggingface_hub` as ours, which say what became of the files."""
    try:
        yield
    except HFValidationError as error:
        raise ValueError(
            f"{repo_id!r} is no Hub id. It must read `owner/name`, of letters, digits, `-`, `_` and `.`. "
            "Check the name."
        ) from error
    except HfHubHTTPError as error:
        raise OSError(_refusal(repo_id, error)) from error
    except (TransportError, RuntimeError) as error:  # huggingface_hub wraps a broken upload of a large file
        raise ConnectionError(
            f"The connection broke while uploading to {repo_id}: {error.__cause__ or error}. Files are committed "
            "together or not at all, and the local ones are as they were. Run the same again."
        ) from error


def _commit(
    files: Mapping[str, Path | bytes],
    destination: Destination,
    message: str,
    keep: tuple[str, ...],
    sleep: Callable[[float], None],
) -> str:
    repo_id = make_repository(destination, sleep)
    api, revision = HfApi(token=destination.token), destination.revision
    if revision is not None and not revision.startswith("refs/pr"):
        _patiently(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True), sleep)
    before = _patiently(lambda: api.model_info(repo_id, revision=revision), sleep)
    kept = {file.rfilename for file in before.siblings or ()} & set(keep)
    commit = _patiently(
        lambda: api.create_commit(
            repo_id,
            [CommitOperationAdd(name, file) for name, file in files.items() if name not in kept],
            commit_message=message,
            revision=revision,
            create_pr=destination.create_pr,
            parent_commit=None if destination.create_pr else before.sha,
        ),
        sleep,
    )
    return commit.pr_url or commit.commit_url


def _patiently(call: Callable[[], Answer], sleep: Callable[[float], None]) -> Answer:
    wait = 1.0
    for _ in range(_TRIES - 1):
        try:
            return call()
        except HfHubHTTPError as error:
            if error.response.status_code not in _BUSY:
                raise
            asked = error.response.headers.get("Retry-After", "")
        sleep(min(float(asked) if asked.isdigit() else wait, _LONGEST_WAIT_SECONDS))
        wait *= 2
    return call()


def _refusal(repo_id: str, error: HfHubHTTPError) -> str:
    status = error.response.status_code
    way_out = {
        401: "The token is missing or not valid. Run `hf auth login`, or pass `token=`.",
        403: "The token may not write there. Check the owner's name and the token's permissions.",
        409: "Somebody changed the repository meanwhile. Look at what is there now, then run the same again.",
        412: "Somebody changed the repository meanwhile. Look at what is there now, then run the same again.",
        429: "The Hub is still asking to wait. Run the same again later.",
    }
    if isinstance(error, RepositoryNotFoundError):  # the Hub's answer to a missing token too
        status = 401
    return (
        f"The Hub refuses the upload to {repo_id}: {str(error).strip()}. Nothing was committed, and the local files "
        f"are as they were. {way_out.get(status, 'Run the same again; if it stays so, see status.huggingface.co.')}"
    )
