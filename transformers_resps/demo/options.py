"""The options of the demo; light enough for `resps --help`."""

import argparse
from pathlib import Path


HEAD = Path(__file__).parents[2] / "model_cards" / "smollm2-135m-instruct-head"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add them to `parser`."""
    parser.add_argument("--head", default=str(HEAD), help="folder or Hub id of a head for SmolLM2-135M-Instruct")
    parser.add_argument("--max-new-tokens", type=int, default=96, help="of each answer")
    parser.add_argument(
        "--page",
        type=Path,
        default=Path("results/demo.html"),
        help="where the last answer is written down, step by step",
    )
