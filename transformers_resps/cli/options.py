"""The options that several commands share."""

import argparse

from ..bench.config import default_device
from ..bench.options import device, dtype, model


def add_target_options(parser: argparse.ArgumentParser) -> None:
    """Add TARGET, `--dtype` and `--device`."""
    parser.add_argument("target", type=model, help="folder or Hub id of the target")
    parser.add_argument("--dtype", type=dtype, help="auto, float32 (the default on a CPU), bfloat16 or float16")
    parser.add_argument("--device", type=device, default=default_device())
