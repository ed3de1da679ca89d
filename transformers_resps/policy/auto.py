"""Load any saved policy by what its `config.json` says it is."""

from pathlib import Path
from typing import Any

from .saving import SavedPolicy, class_of, policy_folder, read_config


class AutoPolicy:
    """Loads any saved policy, as the Auto classes of Transformers load models."""

    def __init__(self) -> None:
        raise TypeError(
            "`AutoPolicy` only loads saved policies. Call `AutoPolicy.from_pretrained(id_or_folder)`, or create a "
            "policy, for example `FixedPolicy(TreeShape(8, 3, 2))`."
        )

    @classmethod
    def from_pretrained(cls, id_or_folder: str | Path, *, revision: str | None = None, **hub: Any) -> SavedPolicy:
        """Load a policy from a folder or a Hub repository, as the class that its `policy_type` names.

        Args:
            id_or_folder: a folder that `save_pretrained` wrote, or a Hub id.
            revision: branch, tag or commit of the repository.
            hub: passed to `huggingface_hub.hf_hub_download`, for example `token` or `cache_dir`.

        Returns:
            The policy.

        Raises:
            ValueError: no policy is found, or its type is unknown to this release.
        """
        folder = policy_folder(id_or_folder, revision, **hub)
        config = read_config(folder)
        return class_of(config["policy_type"]).load_folder(folder, config)
