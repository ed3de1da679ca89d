"""The command `resps` as a script of a clone; `tools/cli.py` says how it starts."""

import sys

from transformers_resps.tools.cli import main


if __name__ == "__main__":
    sys.exit(main())
