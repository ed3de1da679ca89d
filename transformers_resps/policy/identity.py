"""What a policy remembers of the target and the head it was trained with. Knows JSON values only."""

from collections.abc import Mapping
from typing import Any


Identity = Mapping[str, Any]

_LABELS = {"name_or_path"}  # where a model lies differs from machine to machine and says nothing of what it is


def check_identity_values(what: str, value: Any) -> None:
    """Refuse what cannot be an identity; `None` is an unknown one.

    Raises:
        ValueError: it is no mapping.
    """
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(
            f"Got the {what} {value!r} as the one that a policy was trained with, but it is known by a mapping of "
            "names to values. Pass what `trainers.pair_identity(target, head)` gives, or leave it out."
        )


def check_same(what: str, trained: Identity | None, given: Identity | None) -> None:
    """Refuse an identity that contradicts the one a policy was trained with; what either side leaves out is free.

    Raises:
        ValueError: a value differs; the message names both sides.
    """
    if trained is None or given is None:
        return
    shared = [key for key in trained if key in given and key not in _LABELS]
    wrong = [f"{key} {trained[key]!r} (here {given[key]!r})" for key in shared if trained[key] != given[key]]
    if wrong:
        raise ValueError(
            f"This policy was trained with the {what} {_name(trained)}, but it is used with {_name(given)}: it needs "
            f"{', '.join(wrong)}. Load the policy trained with this {what}, or train one with "
            "training/train_policy.py."
        )


def _name(identity: Identity) -> str:
    return str(identity.get("name_or_path") or "without a name")
