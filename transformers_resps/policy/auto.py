"""Load any saved policy by what its `config.json` says it is."""

from pathlib import Path
from typing import Any

from .saving import SavedPolicy, class_of, policy_folder, read_config


class AutoPolicy:
    """The door to every saved policy, in the manner of Transformers' Auto classes."""

    def __init__(self) -> None:
        raise TypeError(
            "AutoPolicy is not a policy, but the door to saved ones. Call `AutoPolicy.from_pretrained(id_or_folder)`, "
            "or make one yourself, for example `FixedPolicy(TreeShape(8, 3, 2))`."
        )

    @classmethod
    def from_pretrained(cls, id_or_folder: str | Path, *, revision: str | None = None, **hub: Any) -> SavedPolicy:
        """The policy of a folder or of a repository of the Hub, of the class that its `policy_type` names.

        Args:
            id_or_folder: what `save_pretrained` wrote, or `push_to_hub` published.
            revision: branch, tag or commit of the repository.
            hub: passed to `huggingface_hub.hf_hub_download`.

        Raises:
            ValueError: there is no policy, or one of a type this release does not know.
        """
        folder = policy_folder(id_or_folder, revision, **hub)
        config = read_config(folder)
        return class_of(config["policy_type"]).load_folder(folder, config)
