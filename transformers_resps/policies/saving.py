"""Save, upload and load policies as a `config.json` and, for policies with weights, a safetensors file."""

import json
from collections.abc import Collection, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Self

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..hub.download import RepositoryFiles
from ..hub.upload import Destination, plain_card, push_saved, shareable
from .base import Policy


_TYPES = ("fixed", "guard", "resps", "throughput")  # modules of this folder with policies that can be saved
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


class SavedPolicy(Policy):
    """A policy with `save_pretrained`, `from_pretrained` and `push_to_hub`.

    A subclass sets `policy_type` and implements `to_config` and `from_saved`; with weights also `state_tensors`.
    """

    policy_type: ClassVar[str]

    def to_config(self) -> dict[str, Any]:
        """Return the content of `config.json` without `policy_type`, as JSON values."""
        raise NotImplementedError

    def state_tensors(self) -> dict[str, Tensor]:
        return {}

    @classmethod
    def from_saved(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> Self:
        """Make a policy from the results of `to_config` and `state_tensors`."""
        raise NotImplementedError

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write `config.json` and, if there are weights, `model.safetensors` into a folder; creates the folder.

        If the target or head was loaded from a local folder, only the folder's name is written, not its path.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        config = shareable({"policy_type": self.policy_type, **self.to_config()})
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_tensors().items()}
        if tensors:
            save_file(tensors, folder / WEIGHTS_FILE)

    @classmethod
    def from_pretrained(cls, id_or_folder: str | Path, *, revision: str | None = None, **hub: Any) -> Self:
        """Load a policy like `AutoPolicy.from_pretrained`; raises `ValueError` if it is not of this class."""
        policy = AutoPolicy.from_pretrained(id_or_folder, revision=revision, **hub)
        if not isinstance(policy, cls):
            raise ValueError(
                f"{id_or_folder} holds a policy of type {policy.policy_type!r}, but {cls.__name__} loads "
                f"{cls.policy_type!r}. Load it with `AutoPolicy.from_pretrained`."
            )
        return policy

    def push_to_hub(self, repo_id: str, *, commit_message: str | None = None, **where: Any) -> str:
        """Upload the policy to the Hub in one commit and return the commit's URL.

        A repository without a model card gets a minimal one. `where` has fields of `Destination`: `private`, `token`,
        `revision` and `create_pr`. Raises the errors of `upload`, such as an `OSError` if the Hub refuses.
        """
        message = commit_message or f"Upload {type(self).__name__}"
        return push_saved(self.save_pretrained, self.plain_card(repo_id), Destination(repo_id, **where), message)

    def plain_card(self, repo_id: str) -> str:
        """Return a minimal model card, with the target and the line of code that loads the policy."""
        config = self.to_config()
        trained = config.get("policy", config)  # a guard holds the config of the guarded policy
        target = (trained.get("target") or {}).get("name_or_path")
        return plain_card("policy", "draft-policy", target, f'policy = AutoPolicy.from_pretrained("{repo_id}")')


class AutoPolicy:
    """Loads a saved policy of any class, as the Auto classes of Transformers do for models."""

    def __init__(self) -> None:
        raise TypeError(
            "`AutoPolicy` only loads saved policies. Call `AutoPolicy.from_pretrained(id_or_folder)`, or create a "
            "policy, for example `FixedPolicy(TreeShape(8, 3, 2))`."
        )

    @classmethod
    def from_pretrained(cls, id_or_folder: str | Path, *, revision: str | None = None, **hub: Any) -> SavedPolicy:
        """Load a policy from a folder or the Hub; its `policy_type` determines the class of the result.

        `hub` has arguments of `huggingface_hub.hf_hub_download`, for example `token` or `cache_dir`. Raises
        `ValueError` if no policy is found, or its type is unknown to this release.
        """
        if not isinstance(id_or_folder, str | Path):
            raise ValueError(f"A policy's folder or id must be a string or a path, got {id_or_folder!r}.")
        folder = Path(id_or_folder) if Path(id_or_folder).is_dir() else _downloaded(str(id_or_folder), revision, **hub)
        file = folder / CONFIG_FILE
        try:
            config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        except (ValueError, RecursionError) as error:  # of JSON, or of UTF-8
            raise ValueError(f"{file} is not JSON ({error}). Download or save the policy again.") from error
        if not isinstance(config, dict) or not isinstance(config.get("policy_type"), str):
            missing = "`config.json` has no `policy_type`" if config else "no `config.json`"
            raise ValueError(f"{folder} holds no policy: {missing}. Check the path or the repository.")
        kind, weights = class_of(config.pop("policy_type")), folder / WEIGHTS_FILE
        try:
            return kind.from_saved(config, load_file(weights) if weights.is_file() else {})
        except (KeyError, TypeError, RuntimeError, SafetensorError) as error:  # the last two come from weights
            raise ValueError(
                f"{folder} holds a policy of type {kind.policy_type!r} that this release cannot read ({error}). "
                f"Download or save {CONFIG_FILE} and {WEIGHTS_FILE} again, both from one policy."
            ) from error


def check_known(policy_type: str, config: dict[str, Any], known: Collection[str]) -> None:
    """Raise `ValueError` if a saved config has fields that are not in `known`: a newer release wrote it."""
    unknown = sorted(config.keys() - set(known))
    if unknown:
        raise ValueError(
            f"The config of a policy of type {policy_type!r} holds {', '.join(map(repr, unknown))}, but this release "
            f"reads only {', '.join(known)}. Update transformers-resps, or download or save the policy again."
        )


def class_of(policy_type: str) -> type[SavedPolicy]:
    """Return the class with this `policy_type`; raises `ValueError` if there is none."""
    for module in _TYPES:
        import_module(f".{module}", __package__)
    known = {cls.policy_type: cls for cls in _descendants(SavedPolicy) if "policy_type" in vars(cls)}
    if policy_type not in known:
        raise ValueError(
            f"The policy is of type {policy_type!r}, but this release knows {sorted(known)}. Update "
            "transformers-resps, check the repository, or import the package that defines the type."
        )
    return known[policy_type]


def _descendants(cls: type[Any]) -> Iterator[type[SavedPolicy]]:
    for child in cls.__subclasses__():
        yield child
        yield from _descendants(child)


def _downloaded(repo_id: str, revision: str | None, **hub: Any) -> Path:
    """Download the config and the weights, if any, of one commit, and return their folder."""
    repository = RepositoryFiles(repo_id, revision=revision, **hub)
    try:
        config = repository.fetch(CONFIG_FILE)
        repository.fetch(WEIGHTS_FILE)
        if config is None:
            raise FileNotFoundError(f"no {CONFIG_FILE} there, or offline and not in the cache")
    except OSError as error:
        raise ValueError(
            f"{repo_id} is neither a local folder nor a repository that could be read ({error}). Check the path, the "
            "id and the connection."
        ) from error
    return config.parent
