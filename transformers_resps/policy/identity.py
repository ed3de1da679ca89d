"""Identity of the target and the head that a policy was trained with: JSON values."""

from collections.abc import Mapping
from typing import Any


Identity = Mapping[str, Any]

_LABELS = {"name_or_path"}  # a model's path differs between machines and does not identify it


def check_identity_values(what: str, value: Any) -> None:
    """Refuse a value that cannot be an identity; `None` stands for an unknown one.

    Raises:
        ValueError: the value is no mapping.
    """
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(
            f"The {what} that a policy was trained with must be a mapping, got {value!r}. Pass what "
            "`trainers.pair_identity(target, head)` returns, or leave it out."
        )


def check_same(what: str, trained: Identity | None, given: Identity | None) -> None:
    """Refuse an identity that contradicts the one a policy was trained with. Keys that one side lacks are skipped.

    Raises:
        ValueError: a value differs; the message names both sides.
    """
    if trained is None or given is None:
        return
    shared = [key for key in trained if key in given and key not in _LABELS]
    wrong = [f"{key} {trained[key]!r} (here {given[key]!r})" for key in shared if trained[key] != given[key]]
    if wrong:
        raise ValueError(
            f"This policy was trained with the {what} {_name(trained)}, but is used with {_name(given)}: it needs "
            f"{', '.join(wrong)}. Load the policy of this {what}, or train one with training/train_policy.py."
        )


def _name(identity: Identity) -> str:
    return str(identity.get("name_or_path") or "without a name")
