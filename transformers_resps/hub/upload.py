"""Upload files to the Hub, all in one commit or none, and write the model cards of heads and policies."""

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCardData, ModelInfo
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

from ..compat import TransportError


LIBRARY = "transformers-resps"
GENERAL_TAGS = ("speculative-decoding", "transformers-resps")
# Files that publishing writes beside the weights.
CARD, RESULTS, METRICS, RECIPE = "README.md", "results.json", "metrics.json", "recipe.yaml"

Answer = TypeVar("Answer")

_CHANGED = "The repository was changed meanwhile: look at what is there now, then run the same command again."
_WAYS_OUT = {  # by HTTP status
    401: "Run `hf auth login`, or pass a valid `token=`.",
    403: "Check the owner's name and whether the token may write there.",
    409: _CHANGED,
    412: _CHANGED,
    429: "The Hub is busy: run the same command again later.",
}
_BUSY = (429, 503)  # HTTP statuses of a busy Hub: it has done nothing, and the call may be repeated later.
_MAX_TRIES, _MAX_WAIT_SECONDS = 5, 60.0


@dataclass(frozen=True, slots=True)
class Destination:
    """The repository and branch to upload to, as arguments of `huggingface_hub`; missing ones are created."""

    repo_id: str
    private: bool | None = None  # whether a new repository is private
    token: str | bool | None = None
    revision: str | None = None
    create_pr: bool = False


@dataclass(frozen=True, slots=True)
class Existing:
    """Rules for the repository's existing files. By default uploaded files overwrite them, and the others are kept."""

    keep: tuple[str, ...] = ()  # names of files that are not overwritten
    refuse: tuple[str, ...] = ()  # if one of these files exists, raise: it describes the replaced weights
    remove: Callable[[str], bool] = lambda name: False  # whether to delete a file, by its name, if it is not uploaded


def upload(
    files: Mapping[str, Path | bytes],
    destination: Destination,
    message: str,
    *,
    existing: Existing = Existing(),
    sleep: Callable[[float], None] = time.sleep,
) -> str:
    """Commit `files` on top of the repository's newest commit; return the URL of the new commit or pull request.

    `files` maps paths in the repository to local paths or contents. While the Hub is busy, the upload is retried.
    Raises an `OSError` if the Hub refuses or the repository was changed meanwhile, a `FileExistsError` if the
    repository has a file of `existing.refuse`, and a `ValueError` if `repo_id` is no Hub id; then nothing is
    committed. Raises a `ConnectionError` if the connection breaks; then either all files are committed or none.
    """
    with _explained(destination.repo_id):
        before = _prepared(destination, existing, sleep)
        held, kept = _names(before), set(existing.keep)
        added = [CommitOperationAdd(name, file) for name, file in files.items() if name not in held & kept]
        removed = [CommitOperationDelete(name) for name in sorted(held - files.keys()) if existing.remove(name)]
        api, parent = HfApi(token=destination.token), None if destination.create_pr else before.sha
        where: Any = {"revision": destination.revision, "create_pr": destination.create_pr, "parent_commit": parent}
        changes: Any = [*added, *removed]
        commit = _patiently(lambda: api.create_commit(before.id, changes, commit_message=message, **where), sleep)
        return commit.pr_url or commit.commit_url


def make_repository(destination: Destination, existing: Existing = Existing()) -> str:
    """Create the repository and branch if missing; return the repository's full id. Raises the errors of `upload`."""
    with _explained(destination.repo_id):
        return _prepared(destination, existing, time.sleep).id


@contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    """Replace errors of `huggingface_hub` in the `with` block by errors that say whether anything was committed."""
    try:
        yield
    except HFValidationError as error:
        raise ValueError(
            f"{repo_id!r} is no Hub id. It must be `owner/name`, of letters, digits, `-`, `_` and `.`."
        ) from error
    except HfHubHTTPError as error:
        # Without a valid token the Hub may report that the repository is missing.
        status = 401 if isinstance(error, RepositoryNotFoundError) else error.response.status_code
        way_out = _WAYS_OUT.get(status, "Run the same command again; if it fails again, see status.huggingface.co.")
        raise OSError(
            f"The Hub refused the upload to {repo_id}, and nothing was committed: {str(error).strip()}. {way_out}"
        ) from error
    except (TransportError, RuntimeError) as error:  # RuntimeError: huggingface_hub's for a broken large upload
        raise ConnectionError(
            f"The connection broke while uploading to {repo_id}: {error.__cause__ or error}. Either all files were "
            "committed or none; run the same command again."
        ) from error


def _prepared(destination: Destination, existing: Existing, sleep: Callable[[float], None]) -> ModelInfo:
    """Create repository and branch if missing; return the repository's info. Raise if `existing` refuses a file."""
    api, revision = HfApi(token=destination.token), destination.revision
    made = _patiently(lambda: api.create_repo(destination.repo_id, private=destination.private, exist_ok=True), sleep)
    if revision is not None and not revision.startswith("refs/pr"):
        _patiently(lambda: api.create_branch(made.repo_id, branch=revision, exist_ok=True), sleep)
    before = _patiently(lambda: api.model_info(made.repo_id, revision=revision), sleep)
    if refused := sorted(_names(before).intersection(existing.refuse)):
        named = " and ".join(refused)
        raise FileExistsError(
            f"{made.repo_id} holds {named} of other weights, which would seem to describe the new ones. Push to "
            f"another repository, or first delete {named} there and what its card says of them."
        )
    return before


def _names(repository: ModelInfo) -> set[str]:
    return {file.rfilename for file in repository.siblings or ()}


def _patiently(call: Callable[[], Answer], sleep: Callable[[float], None]) -> Answer:
    wait = 1.0
    for _ in range(_MAX_TRIES - 1):
        try:
            return call()
        except HfHubHTTPError as error:
            if error.response.status_code not in _BUSY:
                raise
            asked = error.response.headers.get("Retry-After", "")
        sleep(min(float(asked) if asked.isdigit() else wait, _MAX_WAIT_SECONDS))
        wait *= 2
    return call()


def push_saved(save: Callable[[Path], Any], card: str, destination: Destination, message: str) -> str:
    """Upload the files that `save` writes into a folder, and `card` if the repository has no card; see `upload`.
    Raises a `FileExistsError` if the repository has a results or metrics file: it describes the weights that this
    upload would replace, and may be the only copy.
    """
    with TemporaryDirectory() as name:
        folder = Path(name)
        save(folder)
        files: dict[str, Path | bytes] = {file.name: file for file in sorted(folder.iterdir())}
        existing = Existing(keep=(CARD,), refuse=(RESULTS, METRICS))
        return upload({CARD: card.encode(), **files}, destination, message, existing=existing)


def as_hub_id(name: str | None) -> str | None:
    """Return `name` if it looks like a Hub id and no local path of that name exists; else `None`."""
    is_id = name is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists()
    return name if is_id else None


def shareable(config: Any) -> Any:
    """Copy `config`; where a `name_or_path` (also a nested one) is a local folder, keep only the folder's name."""
    if not isinstance(config, Mapping):
        return config
    told = {key: shareable(value) for key, value in config.items()}
    name = str(told.get("name_or_path") or "")
    return {**told, "name_or_path": Path(name).resolve().name} if name and Path(name).is_dir() else told


def card_data(target: str | None, tags: Sequence[str], **details: Any) -> ModelCardData:
    """Make a model card's metadata; `target` is a Hub id, `details` are further fields of `ModelCardData`."""
    return ModelCardData(
        library_name=LIBRARY,
        pipeline_tag="text-generation",
        base_model=target,
        # The weights are used together with the unchanged target. The Hub's default is `finetune`.
        base_model_relation="adapter" if target else None,
        tags=list(tags),
        **details,
    )


def plain_card(weights: str, tag: str, target: str | None, use: str) -> str:
    """Return a model card without results; `weights` is a kind ("draft head"), `use` is the code that loads them."""
    hub_id = as_hub_id(target)
    title = f"A {weights} for {hub_id}" if hub_id else f"A {weights}"
    return (
        f"---\n{card_data(hub_id, ['eagle3', tag, *GENERAL_TAGS]).to_yaml()}\n---\n\n# {title}\n\n"
        f"```python\n{use}\n```\n\nNothing was measured for this card.\n"
    )
