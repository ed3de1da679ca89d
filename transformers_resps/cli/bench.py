"""`resps bench`: every method in turn, on your prompts."""

import argparse
from typing import Any

from ..bench.options import add_options


def add_command(commands: Any) -> None:
    """`resps bench TARGET HEAD --dataset FILE`."""
    parser = commands.add_parser("bench", help="draft trees, plain decoding and prompt lookup, in turn")
    add_options(parser)
    parser.set_defaults(run=bench)


def bench(args: argparse.Namespace) -> int:
    """0 when rounding explains every difference from plain decoding, otherwise 1."""
    from ..bench.__main__ import run  # needs the extra `bench`

    return run(args)
