"""`resps demo`: a real model answers five prompts, plain and with a draft head."""

import argparse
from typing import Any

from ..compat import check_extra
from ..demo.options import HEAD, add_options


def add_command(commands: Any) -> None:
    """`resps demo`."""
    parser = commands.add_parser("demo", help="a real model answers five prompts, plain and with a draft head")
    add_options(parser)
    parser.set_defaults(run=demo)


def demo(args: argparse.Namespace) -> int:
    """0 when rounding explains every difference between both texts, otherwise 1.

    Raises:
        ValueError: a package of the extra `demo` is missing, or the head of a checkout where there is none.
    """
    check_extra("demo")
    if args.head == str(HEAD) and not HEAD.is_dir():
        raise ValueError(
            f"The demo's head is part of a clone of the repository, and {HEAD} does not exist. Run `make demo` in a "
            "clone, or pass `--head` with a head for SmolLM2-135M-Instruct."
        )
    from ..demo.__main__ import run  # needs the extra

    return run(args)
