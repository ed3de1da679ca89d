"""Ends a training command that refuses its input with the message alone."""

import sys
from collections.abc import Callable


def run(main: Callable[[], None]) -> None:
    """Run a command; what it refuses ends it with status 2 and one line instead of a traceback."""
    try:
        main()
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
