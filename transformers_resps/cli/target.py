"""The target of a command: the options that name it, and the model they name."""

import argparse
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from ..bench.options import device, dtype, model


def add_target_options(parser: argparse.ArgumentParser) -> None:
    """TARGET, `--dtype` and `--device`."""
    parser.add_argument("target", type=model, help="folder or Hub id of the target")
    parser.add_argument("--dtype", type=dtype, help="auto, float32 (the default on a CPU), bfloat16 or float16")
    parser.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")


def load_target(args: argparse.Namespace) -> Any:
    """The model that the options of `add_target_options` name, on its device."""
    dtype = args.dtype or ("float32" if args.device == "cpu" else "auto")
    return AutoModelForCausalLM.from_pretrained(args.target, dtype=dtype).to(args.device)
