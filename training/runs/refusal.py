"""Ends a training command with a message instead of a traceback."""

import sys
from collections.abc import Callable


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
