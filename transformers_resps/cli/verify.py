"""`resps verify`: checks that the output with a head and a policy is the model's own."""

import argparse
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from ..bench.models import load_target
from ..bench.options import model, positive
from ..bench.policies import read_policy
from ..data import load_conversations, to_tokens
from ..heads import DraftHead
from ..testing import NotLosslessError, assert_lossless
from ..testing.divergence import move_of_gaps
from .options import add_target_options
from .questions import default_questions, up_to


def add_command(commands: Any) -> None:
    """Add `resps verify TARGET [HEAD] [POLICY]`."""
    parser = commands.add_parser(
        "verify", help="check that the output with a draft head is the model's own; prints a report"
    )
    parser.set_defaults(run=verify)
    add_target_options(parser)
    parser.add_argument(
        "head", type=model, nargs="?", help="folder or Hub id of a draft head; without one, drafts by lookup"
    )
    parser.add_argument(
        "policy",
        nargs="?",
        help="folder or Hub id of a policy, 'auto', or total_tokens,depth,top_k[,lookup]; default: the head's tree",
    )
    parser.add_argument("--dataset", help=".json, .jsonl or Hub id; its first user turns are the prompts")
    parser.add_argument("--split", default="train", help="of a dataset from the Hub")
    parser.add_argument("--prompts", type=positive, default=4, help="number of prompts (default: 4)")
    parser.add_argument("--seeds", type=positive, default=4, help="sampled outputs per sampling setting (default: 4)")
    parser.add_argument(
        "--max-new-tokens", type=positive, default=32, help="length of each compared output (default: 32)"
    )
    parser.add_argument(
        "--rounding", action="store_true", help="instead, measure how far a tree forward moves the target's logits"
    )
    parser.add_argument("--revision", help="of the head")


def verify(args: argparse.Namespace) -> int:
    """Print the report; 1 when the output is not the model's own, 2 when no draft was accepted, so nothing tested."""
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    target = load_target(args.target, args.dtype, args.device)
    head = DraftHead.from_pretrained(args.head, target=target, revision=args.revision) if args.head else None
    policy = None if args.policy is None else read_policy(args.policy, head)
    prompts = read_prompts(args, tokenizer)
    if args.rounding:
        return print_rounding(target, prompts, args.max_new_tokens)
    print("Comparing; on a CPU this takes minutes ...\n")
    try:
        report = assert_lossless(target, head, policy, prompts, seeds=args.seeds, max_new_tokens=args.max_new_tokens)
    except NotLosslessError as error:
        print(error.report)
        return 1
    print(report)
    return 0 if report.is_tested else 2


def print_rounding(target: Any, prompts: list[Tensor], max_new_tokens: int) -> int:
    """Print one line per number of nodes; always 0, for nothing is judged."""
    print(f"Tree forwards against one-token decoding, {target.dtype}, {torch.get_num_threads()} threads:\n")
    for moved in move_of_gaps(target, prompts, max_new_tokens, [2, 4, 8, 16, 0]):
        print(f"{f'{moved.nodes} nodes' if moved.nodes else 'all at once'}: {moved}")
    return 0


def read_prompts(args: argparse.Namespace, tokenizer: Any) -> list[Tensor]:
    """Return `--prompts` questions, those of `--dataset` or built-in ones, as token ids `[s]`.

    Raises:
        ValueError: the dataset has no user turns.
    """
    questions = default_questions(args.prompts)
    if args.dataset:
        rows = islice(load_conversations(args.dataset, args.split), args.prompts)
        questions = [asked for row in rows if (asked := up_to(row, "user"))]
    if not questions:
        raise ValueError(
            f"`--dataset {args.dataset}` has no user turns to use as prompts. Pass conversations, as "
            "training/train_head.py reads them."
        )
    return [to_tokens(question, tokenizer) for question in questions]
