"""The command line of a training script: read with its YAML recipe by TRL, and ended without a traceback."""

import sys
from collections.abc import Callable
from typing import Any

from transformers_resps.compat import check_extra


def parse(*kinds: Any) -> tuple[Any, ...]:
    """Parse one object of each dataclass in `kinds`; exits with one line where the extra `train` is not installed.

    Raises:
        ValueError: an option is out of its range.
    """
    try:
        check_extra("train")
    except ValueError as error:
        sys.exit(str(error))
    from trl import TrlParser  # type: ignore[attr-defined]  # TRL loads its names lazily

    return tuple(TrlParser(kinds).parse_args_and_config())  # type: ignore[no-untyped-call]


def run(main: Callable[[], None]) -> None:
    """Run a command that its user can repeat; what it refuses ends it with status 2, and Ctrl-C with 130."""
    try:
        main()
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("Stopped. Run the same command to continue.", file=sys.stderr)
        sys.exit(130)
