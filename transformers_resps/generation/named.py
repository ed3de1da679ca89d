"""Heads and policies that a call names by a folder or a Hub id, each loaded once for a target."""

import os
from collections.abc import Hashable
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from ..head import DraftHead


AUTO = "auto"  # our default policy, which learns while it decodes
PLAIN = "plain"  # stock decoding, whatever `attach` was given
_KINDS = {"policy": str, "lockstep": bool}  # what a `generation_config.json` may hold


class NamedHeads:
    """The heads of one target that calls named, kept as long as the target lives.

    An attached model owns one as `named_heads`.
    """

    def __init__(self) -> None:
        self._heads: dict[Hashable, DraftHead] = {}

    def load(self, name: str | os.PathLike[str], target: PreTrainedModel) -> DraftHead:
        """The head of a folder or a Hub id, on the target's device and in its dtype.

        Raises:
            ValueError, OSError: as `DraftHead.from_pretrained`.
        """
        key = os.fspath(name), target.device, target.dtype
        if key not in self._heads:
            self._heads[key] = DraftHead.from_pretrained(name, target=target)
        return self._heads[key]

    def __reduce__(self) -> tuple[type["NamedHeads"], tuple[()]]:
        """A copied or pickled target loads them anew."""
        return NamedHeads, ()


def is_name(value: Any) -> bool:
    """Whether a keyword of `generate` is a folder or a Hub id, and no word of ours such as "auto"."""
    return isinstance(value, str | os.PathLike) and value not in (AUTO, PLAIN)


def check_policy_name(name: str | os.PathLike[str]) -> None:
    """Refuse a word that is neither a folder nor `owner/name`, such as a mistyped "auto", without asking the Hub.

    Raises:
        ValueError: says what `policy` takes.
    """
    if "/" not in os.fspath(name) and not Path(name).is_dir():
        raise ValueError(
            f"`policy` must be 'auto', 'plain', a folder, a Hub id (`owner/name`) or an object of a subclass of "
            f"`Policy`, got {name!r}. Check the word, or the path."
        )


def configured(policy: Any, lockstep: Any, *configs: GenerationConfig | None) -> tuple[Any, Any]:
    """A call's `policy` and `lockstep`, each as a `generation_config` says where it is `None`.

    Transformers itself refuses an `assistant_model` there.

    Args:
        policy: of the call.
        lockstep: of the call.
        configs: the call's, then the model's; the first that says something holds.

    Raises:
        ValueError: a config holds what its JSON file could not.
    """
    for config in configs:
        if isinstance(policy, str) and policy == PLAIN:  # whatever the next config says
            break
        policy = _said(config, "policy") if policy is None else policy
        lockstep = _said(config, "lockstep") if lockstep is None else lockstep
    return policy, lockstep


def _said(config: GenerationConfig | None, name: str) -> Any:
    value, kind = getattr(config, name, None), _KINDS[name]
    if not isinstance(value, kind | None):
        raise ValueError(
            f"`generation_config.{name}` is saved as JSON, so it must be a {kind.__name__}, got a "
            f"{type(value).__name__}. Pass the object to `generate` or `attach` instead."
        )
    return value
