"""`resps serve`: OpenAI's chat, completions and responses, answered by attached models."""

import argparse
import logging
import socket
from typing import Any

from ..compat import check_extra
from .loading import default_device, device, dtype, model, named_tree


_GRACE_SECONDS = 5  # that running requests get to end in after Ctrl-C


def add_command(commands: Any) -> None:
    """Add `resps serve TARGET [TARGET ...] [--head HEAD]`."""
    parser = commands.add_parser("serve", help="answer requests of OpenAI's API, one at a time")
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("targets", type=model, nargs="+", metavar="TARGET", help="folder or Hub id; several are served by name")
    add("--head", type=model, action="append", help="folder or Hub id of a draft head; one per target, in their order")
    named = "folder or Hub id of a policy, 'auto' (the default), or total_tokens,depth,top_k[,lookup]"
    add("--policy", default="auto", help=named)
    add(
        "--compile", choices=("auto", "always", "never"), default="never", help="compiled steps: when they pay, or not"
    )
    add("--dtype", type=dtype, help="auto, float32 (the default on a CPU), bfloat16 or float16")
    add("--device", type=device, default=default_device(), help="default: cuda if available, or cpu")
    add("--pack", action="store_true", help="prepack the targets' weights first, as `prepack` does")
    add("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, this machine only)")
    add("--port", type=int, default=8000, help="port; 0 takes a free one (default: 8000)")


def run(args: argparse.Namespace) -> int:
    """Serve until Ctrl-C.

    Raises:
        ValueError: a package is missing or of an unknown release, or the heads do not fit the targets.
        OSError: the port is taken, or a model cannot be loaded.
    """
    check_extra("serve")
    heads = args.head or []
    if heads and len(heads) != len(args.targets):
        raise ValueError(f"Got {len(heads)} heads for {len(args.targets)} targets. Pass one per target, or none.")
    named_tree(args.policy)  # a mistyped tree shows before models are loaded
    try:
        import uvicorn

        from . import serving
    except ImportError as error:
        raise ValueError(
            f"The server of this release of Transformers is not one that `resps serve` knows ({error}). Install "
            "Transformers 5.20 to 5.24."
        ) from error
    serving.check_release()
    logging.getLogger("transformers.cli.serving").setLevel(logging.ERROR)  # stock warns of every request
    with socket.create_server((args.host, args.port)) as listening:
        figures = serving.Figures()
        worker = serving.OneAtATime(figures)
        models = serving.AttachedModels(
            [serving.Served(*pair) for pair in zip(args.targets, heads or [None] * len(args.targets), strict=True)],
            policy=args.policy,
            compile={"auto": "auto", "always": True, "never": None}[args.compile],
            dtype=args.dtype,
            device=args.device,
            packed=args.pack,
            worker=worker,
        )
        app = serving.build_app(models, worker, figures)
        host, port = listening.getsockname()[:2]
        print(f"Serving {', '.join(models.names)} at http://{host}:{port}/v1. Ctrl-C stops it.", flush=True)
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=_GRACE_SECONDS)
        uvicorn.Server(config).run(sockets=[listening])
    return 0
