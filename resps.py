"""The command `resps`: says what it does, then loads the libraries that it needs.

It stands beside the package because importing the package imports PyTorch and Transformers, which takes seconds.
"""

import sys


def main() -> int:
    """Run a subcommand; returns the exit status."""
    command = " ".join(["resps", *sys.argv[1:2]])
    print(f"{command}: loading PyTorch and Transformers ...", file=sys.stderr, flush=True)
    from transformers_resps.tools.cli import main as run  # takes seconds

    return run()


if __name__ == "__main__":
    sys.exit(main())
