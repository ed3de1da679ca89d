"""`resps demo`: a real model answers five prompts, plain and with a draft head."""

import argparse
from typing import Any

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
    if args.head == str(HEAD) and not HEAD.is_dir():
        raise ValueError(
            f"There is no folder {HEAD}: the demo's head lies in a checkout, and this package was installed without "
            "one, but a head for SmolLM2-135M-Instruct is needed. Run `make demo` in a clone, or pass `--head`."
        )
    try:
        from ..demo.__main__ import run
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{error.name} cannot be found, but the demo needs it. Install transformers-resps[demo]."
        ) from error
    return run(args)
