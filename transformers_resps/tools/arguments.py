"""Types of arguments, which check what is typed before PyTorch is loaded, and options of several commands."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from ..tree import TreeShape


def model(text: str) -> str:
    """Accept an existing folder, or what may be a Hub id."""
    if (text.count("/") > 1 or text.startswith(("/", ".", "~"))) and not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is no folder and no Hub id (NAME or OWNER/NAME). Check the path.")
    return text


def temperature(text: str) -> float:
    """Accept a finite number from 0 on."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.0 <= value < math.inf:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no temperature. Write 0 for greedy decoding, or a number above 0."
        )
    return value


def shape(text: str) -> "TreeShape":
    """Read total_tokens, depth and top_k from `8,4,2`; a fourth number is `lookup`."""
    from ..tree import TreeShape  # imports PyTorch

    try:
        return TreeShape(*(int(part) for part in text.split(",")))
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no shape. Write total_tokens,depth,top_k as in 8,4,2."
        ) from error


def dtype(text: str) -> str:
    """Accept the name of a dtype that models are loaded in, or auto."""
    if text not in ("auto", "float64", "float32", "bfloat16", "float16"):
        raise argparse.ArgumentTypeError(f"{text!r} is no supported dtype. Write auto, float32, bfloat16 or float16.")
    return text


def device(text: str) -> str:
    """Accept an available device that computes."""
    if text.startswith("meta"):
        raise argparse.ArgumentTypeError(f"{text!r} is no device that computes. Write cpu, or leave it out.")
    if text == "cpu":
        return text
    import torch

    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no device here ({error}). Write cpu, or leave it out."
        ) from error
    return text


def positive(text: str) -> int:
    """Accept a whole number above zero."""
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no integer above 0.")
    return int(text)


def add_target_options(parser: argparse.ArgumentParser) -> None:
    """Add TARGET, `--dtype` and `--device`."""
    parser.add_argument("target", type=model, help="folder or Hub id of the target")
    parser.add_argument("--dtype", type=dtype, help="auto, float32 (the default on a CPU), bfloat16 or float16")
    parser.add_argument("--device", type=device, help="default: cuda if available, or cpu")


def add_invariant_option(add: Callable[..., Any], what: str) -> None:
    """Add `--invariant` by the method `add` of a parser or a group; `what` is done in the mode."""
    mode = "in the invariant mode: the same text in any dtype, whatever drafts"
    add("--invariant", action="store_true", help=f"{what} {mode}")


def add_question_options(parser: argparse.ArgumentParser, of_dataset: str) -> None:
    """Add `--dataset` and `--split`."""
    parser.add_argument("--dataset", help=f".json, .jsonl or Hub id of conversations; {of_dataset}")
    parser.add_argument("--split", default="train", help="of a dataset from the Hub")
