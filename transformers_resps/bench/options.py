"""The options of the benchmark; light enough for `resps --help`."""

import argparse
from pathlib import Path

from ..tree import TreeShape


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add them to `parser`."""
    parser.add_argument("target", help="folder or Hub id")
    parser.add_argument("head", help="folder or Hub id of a draft head for the target")
    parser.add_argument("--dataset", nargs="+", type=Path, required=True, help=".jsonl with turns, messages or prompt")
    parser.add_argument("--limit", type=int, default=10, help="prompts per dataset, spread evenly over the file")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument(
        "--shapes", nargs="+", type=shape, help="total_tokens,depth,top_k[,lookup]; the head's by default"
    )
    parser.add_argument("--prompt-lookup", action="store_true", help="also Transformers' own prompt lookup")
    parser.add_argument("--auto", action="store_true", help="also policy='auto', with the head and without")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="of the processor; as many as torch chooses by default")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("results/bench"), help="folder for results.json")
    parser.add_argument("--profile", action="store_true", help="instead: where time and memory of the first tree go")


def shape(text: str) -> TreeShape:
    """`8,4,2` -> total_tokens, depth, top_k; a fourth number is `lookup`."""
    try:
        return TreeShape(*(int(part) for part in text.split(",")))
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no shape. Write total_tokens,depth,top_k as in 8,4,2."
        ) from error
