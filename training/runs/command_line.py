"""The command line and the YAML recipe of a training script, as TRL reads them."""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers_resps.compat import check_extra


def parse(*kinds: Any, renamed: Mapping[str, str] | None = None) -> tuple[Any, ...]:
    """One object of each dataclass in `kinds`; ends with one line where the extra `train` is not installed.

    Args:
        kinds: dataclasses of options.
        renamed: earlier name of an option -> what to write instead, for command lines and recipes of earlier releases.

    Raises:
        ValueError: an option had this name in an earlier release, or is out of its range.
    """
    try:
        check_extra("train")
    except ValueError as error:
        sys.exit(str(error))
    from trl import TrlParser  # type: ignore[attr-defined]  # TRL loads its names lazily

    from transformers_resps.trainers.renamed import check_renamed

    check_renamed(Path(sys.argv[0]).name, _names(sys.argv[1:]), renamed or {})
    return tuple(TrlParser(kinds).parse_args_and_config())  # type: ignore[no-untyped-call]


def _names(arguments: list[str]) -> Iterator[str]:
    """Names of all options of a command line, and of its recipe."""
    import yaml

    for place, argument in enumerate(arguments):
        if argument.startswith("--"):
            yield argument.removeprefix("--").partition("=")[0].replace("-", "_")
        if argument == "--config":
            for recipe in map(Path, arguments[place + 1 : place + 2]):
                read = yaml.safe_load(recipe.read_text(encoding="utf-8")) if recipe.is_file() else None
                yield from read if isinstance(read, dict) else ()
