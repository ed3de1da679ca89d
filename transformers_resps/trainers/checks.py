"""Check what a trainer is given before it starts to work."""

from collections.abc import Mapping
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


def check_dataset(dataset: Any, name: str, *, may_stream: bool) -> None:
    """Check that a dataset is of a class that can be prepared.

    Args:
        dataset: as given to a trainer.
        name: of the argument.
        may_stream: whether an `IterableDataset` will do.

    Raises:
        ValueError: names its class, or its splits.
    """
    import datasets

    if isinstance(dataset, Mapping):
        splits = [str(split) for split in dataset]
        raise ValueError(
            f"`{name}` is a {type(dataset).__name__} of the splits {splits}, but must be one of them. Pass, for "
            f"instance, `dataset[{splits[0] if splits else 'train'!r}]`."
        )
    if isinstance(dataset, datasets.IterableDataset) and not may_stream:
        raise ValueError(
            f"`{name}` is an `IterableDataset`, but its prompts are read many times. Take the first n: "
            "`Dataset.from_list(list(dataset.take(200)))`."
        )
    if not isinstance(dataset, datasets.Dataset | datasets.IterableDataset):
        raise ValueError(
            f"`{name}` is a {type(dataset).__name__}, but must be a `Dataset`{' or `IterableDataset`' * may_stream} "
            "of the package `datasets`. Make one with `Dataset.from_list(rows)` or `load_dataset`."
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
