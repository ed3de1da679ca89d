"""`resps serve`: answer requests of OpenAI's chat, completions and responses APIs with attached models."""

import argparse
import logging
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ..compat import check_extra
from .cli import COMPILE
from .loading import named_tree


_GRACE_SECONDS = 5  # time for running requests after Ctrl-C


def run(args: argparse.Namespace) -> int:
    """Load the models, then serve until Ctrl-C."""
    check_extra("serve")
    heads = args.head or []
    if heads and len(heads) != len(args.targets):
        raise ValueError(f"Got {len(heads)} heads for {len(args.targets)} targets. Pass one per target, or none.")
    served = args.served_model_name or []
    if served and (len(served) != len(args.targets) or len(set(served)) != len(served)):
        raise ValueError(
            f"Got the served names {served} for {len(args.targets)} targets. Pass one per target, all distinct."
        )
    tree = named_tree(args.policy)  # raises for a mistyped tree before models are loaded
    if args.memory and tree is not None and not tree.lookup:
        raise ValueError(
            f"`--memory` drafts by lookup, which `--policy {args.policy}` never does. Add a fourth number."
        )
    try:
        import uvicorn

        from . import serving
    except ImportError as error:
        raise ValueError(
            f"The server of this release of Transformers is not one that `resps serve` knows ({error}). Install "
            "Transformers 5.25."
        ) from error
    serving.check_release()
    with socket.create_server((args.host, args.port)) as listening, _log_of_requests(serving.logger):
        models = serving.AttachedModels(
            dict(zip(args.targets, heads or [None] * len(args.targets), strict=True)),
            served=served,
            policy=args.policy,
            compile=COMPILE[args.compile],
            invariant=args.invariant,
            dtype=args.dtype,
            device=args.device,
            packed=args.pack,
            quantization=args.quantization,
            remembers=args.memory,
        )
        host, port = listening.getsockname()[:2]
        if not models.repeats_seeds:
            told = "A seed may not repeat an answer in half precision. Pass --invariant or --dtype float32 if it must."
            print(told, file=sys.stderr, flush=True)
        print(f"Serving {', '.join(models.names)} at http://{host}:{port}/v1. Ctrl-C stops it.", flush=True)
        app = serving.build_app(models)
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=_GRACE_SECONDS)
        uvicorn.Server(config).run(sockets=[listening])
    return 0


@contextmanager
def _log_of_requests(logger: logging.Logger) -> Iterator[None]:
    """Print one line for each request, with the time, instead of Transformers' warnings."""
    server_log = logging.getLogger("transformers.cli.serving")
    level, propagate, server_level = logger.level, logger.propagate, server_log.level
    lines = logging.StreamHandler()
    lines.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger.addHandler(lines)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # Transformers' own handler would print each line again, without the time
    server_log.setLevel(logging.ERROR)  # it warns at every request
    try:
        yield
    finally:
        logger.removeHandler(lines)
        logger.setLevel(level)
        logger.propagate = propagate
        server_log.setLevel(server_level)
