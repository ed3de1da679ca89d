"""The command line of the benchmark, and the types of arguments that other commands share."""

import argparse
import math
from dataclasses import fields
from pathlib import Path

import torch

from ..tree import TreeShape
from .config import CHOICES, BenchConfig
from .peers import PEERS


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give `parser` an option for each field of `BenchConfig`."""
    parser.argument_default = argparse.SUPPRESS  # what is left out keeps the default of `BenchConfig`
    parser.add_argument("target", type=model, help="folder or Hub id of the target")
    parser.add_argument("head", type=model, help="folder or Hub id of a draft head for the target")
    add_methods(parser)
    add_prompts(parser)
    add_conditions(parser)
    parser.add_argument("--output", type=Path, help="folder for results, table and plots; default: results/bench")


def read_options(args: argparse.Namespace) -> BenchConfig:
    """Return what the parsed options of `add_options` ask for."""
    given = vars(args)
    return BenchConfig(**{field.name: given[field.name] for field in fields(BenchConfig) if field.name in given})


def add_methods(parser: argparse.ArgumentParser) -> None:
    """Add the methods to compare."""
    what = parser.add_argument_group("methods to compare (plain decoding is always included)")
    what.add_argument(
        "--policy",
        nargs="+",
        dest="policies",
        metavar="POLICY",
        help="'auto', folders or Hub ids; default: auto",
    )
    what.add_argument(
        "--methods",
        nargs="*",
        choices=CHOICES,
        help="besides the policies: Transformers' prompt lookup, EAGLE-3's published trees, the fixed tree that is "
        "fastest on other prompts, an upper bound for all policies; default: all four",
    )
    what.add_argument(
        "--shapes", nargs="+", type=shape, help="also these fixed trees: total_tokens,depth,top_k[,lookup]"
    )
    what.add_argument("--draft-model", metavar="ID", help="also Transformers' assisted generation with this model")
    what.add_argument(
        "--peers",
        nargs="+",
        choices=PEERS,
        help="also these installed libraries; they draft with --draft-model, otherwise by lookup",
    )


def add_prompts(parser: argparse.ArgumentParser) -> None:
    """Add where prompts come from."""
    on = parser.add_argument_group("prompts")
    on.add_argument(
        "--dataset",
        nargs="+",
        required=True,
        dest="datasets",
        metavar="FILE_OR_ID",
        help=".jsonl or .json with turns, messages or prompt, or a Hub id; all user turns are answered",
    )
    on.add_argument("--split", help="of datasets from the Hub; default: test")
    on.add_argument("--limit", type=positive, help="prompts per dataset, spread evenly over it; default: 10")
    on.add_argument(
        "--search-dataset",
        metavar="FILE_OR_ID",
        help="prompts to find the best fixed tree on; default: those of the datasets that are not evaluated",
    )


def add_conditions(parser: argparse.ArgumentParser) -> None:
    """Add the conditions of the benchmark."""
    how = parser.add_argument_group("conditions")
    how.add_argument(
        "--temperature",
        nargs="+",
        type=temperature,
        dest="temperatures",
        metavar="T",
        help="0 (the default) is greedy",
    )
    how.add_argument("--max-new-tokens", type=positive, help="of an answer; default: 128")
    how.add_argument("--repeats", type=positive, help="of everything; default: 3")
    how.add_argument("--dtype", type=dtype, help="auto, float32 (the default on a CPU), bfloat16 or float16")
    how.add_argument("--device", type=device, help="default: cuda if available, otherwise cpu")
    how.add_argument(
        "--pack", action="store_true", help="prepack the target's weights, for every method, plain decoding too"
    )
    how.add_argument(
        "--compile",
        action="store_true",
        help="decode with every tree and policy twice, as it is and compiled; plain decoding is always compared both "
        "ways",
    )
    how.add_argument("--threads", type=positive, help="CPU threads; default: as torch chooses")
    how.add_argument("--accept-noise", action="store_true", help="measure even on a noisy machine; the results say so")


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


def shape(text: str) -> TreeShape:
    """Read total_tokens, depth and top_k from `8,4,2`; a fourth number is `lookup`."""
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
