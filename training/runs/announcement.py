"""The first line of a training command. It imports nothing, since the libraries take seconds to load."""

import os
import sys
from pathlib import Path


def announce(documentation: str | None) -> None:
    """Say what a command does, before it loads its libraries; on the first of several ranks only.

    Args:
        documentation: its `__doc__`, of which the first line is shown.
    """
    if os.environ.get("RANK", "0") == "0":
        does = (documentation or "").strip().partition("\n")[0].rstrip(".:")
        name = Path(sys.argv[0]).name
        print(f"{name}: {does}. Loading PyTorch and Transformers ...", file=sys.stderr, flush=True)
