"""`resps verify`: check that decoding with drafts writes the same text as plain decoding."""

import argparse
import json
import sys
from dataclasses import asdict

from transformers import AutoTokenizer

from ..data import to_tokens
from ..testing import NotLosslessError, assert_lossless
from .loading import load_policy, load_source, load_target, questions_in, read_conversations


def run(args: argparse.Namespace) -> int:
    """Print the report; return 1 if an output differs from plain decoding's, 2 if no draft was accepted, else 0."""
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    target = load_target(args.target, args.dtype, args.device, packed=args.pack, quantization=args.quantization)
    head = load_source(args.head, target, args.revision)
    policy = None if args.policy is None else load_policy(args.policy, head)
    questions = questions_in(read_conversations(args, args.prompts), args.prompts)
    prompts = [to_tokens(question, tokenizer) for question in questions]
    print("Comparing; on a CPU this takes minutes ...\n", file=sys.stderr, flush=True)
    try:
        settings = {name: getattr(args, name) for name in ("seeds", "max_new_tokens", "invariant")}
        report = assert_lossless(target, head, policy, prompts, **settings)
    except NotLosslessError as error:
        report = error.report
    if args.json:
        judged = {name: getattr(report, name) for name in ("verdict", "is_lossless", "is_tested")}
        print(json.dumps(judged | asdict(report), default=str))  # `str` converts values that JSON has no type for
    else:
        print(report)
    return 1 if not report.is_lossless else 0 if report.is_tested else 2
