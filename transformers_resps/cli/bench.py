"""`resps bench`: compares methods on your prompts."""

import argparse
from typing import Any

from ..bench.options import add_options, read_options


def add_command(commands: Any) -> None:
    """Add `resps bench TARGET HEAD --dataset FILE`."""
    parser = commands.add_parser("bench", help="policies, trees and plain decoding in turn, and which of them to use")
    add_options(parser)
    parser.set_defaults(run=bench)


def bench(args: argparse.Namespace) -> int:
    """Return 0; 1 when rounding does not explain a difference from plain decoding; 130 after Ctrl-C."""
    from ..bench.__main__ import run  # needs the extra `bench`

    return run(read_options(args))
