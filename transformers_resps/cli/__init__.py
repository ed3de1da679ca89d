"""The command `resps`: parses and prints what other rooms work out. One file per subcommand."""

import argparse
import sys
from collections.abc import Sequence

from . import bench, calibrate, doctor, inspect, verify


COMMANDS = (doctor, inspect, calibrate, verify, bench)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Returns:
        0; 1 when what was examined is not as it should be; 2 when it could not be examined; 130 after Ctrl-C.
    """
    args = make_parser().parse_args(arguments)
    try:
        status: int = args.run(args)
    except (ValueError, OSError) as error:
        print(f"resps {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"resps {args.command}: stopped.", file=sys.stderr)
        return 130
    return status


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all subcommands."""
    parser = argparse.ArgumentParser("resps", description="Lossless draft trees for Transformers.")
    commands = parser.add_subparsers(dest="command", required=True)
    for command in COMMANDS:
        command.add_command(commands)
    return parser
