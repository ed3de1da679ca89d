"""Check what a trainer is given before it starts to work."""

from typing import Any


def check_kinds(trainer: str, **given: tuple[Any, type[Any]]) -> None:
    """Check the types of arguments; `given` maps each name to its value and the type it must have.

    Raises:
        ValueError: names the first of a wrong type.
    """
    for name, (value, kind) in given.items():
        if not isinstance(value, kind):
            raise ValueError(
                f"{trainer} got a {type(value).__name__} as `{name}`, but it needs a `{kind.__name__}`. Make one as "
                "docs/train-a-head.md and docs/tune-a-policy.md show."
            )


def check_setting(config: Any, name: str, is_valid: bool, needed: str) -> None:
    """Check a setting of a trainer's `config`.

    Raises:
        ValueError: it is not valid; `needed` says what would be.
    """
    if not is_valid:
        raise ValueError(
            f"`{name}` is {getattr(config, name)!r}, but it must be {needed}. See `{type(config).__name__}`."
        )
