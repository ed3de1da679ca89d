"""`resps verify`: check that decoding with drafts writes the same text as plain decoding."""

import argparse
import json
import sys
from dataclasses import asdict

from transformers import AutoTokenizer

from ..data import to_tokens
from ..testing import NotLosslessError, StoppedCheck, assert_lossless
from .loading import load_policy, load_source, load_target, questions_in, read_conversations


# Number of prompts, number of seeds, and length of outputs; with `--quick` a third of the calls, of half the length.
_SIZES = {"prompts": 4, "seeds": 4, "max_new_tokens": 32}
_QUICK_SIZES = {"prompts": 2, "seeds": 1, "max_new_tokens": 16}


def run(args: argparse.Namespace) -> int:
    """Print the report; return 1 if an output differs from plain decoding's, 2 if no draft was accepted, else 0.

    After Ctrl-C print the report of the finished comparisons, and return 130 unless one differs.
    """
    sizes = _QUICK_SIZES if args.quick else _SIZES
    sizes = {name: getattr(args, name) or usual for name, usual in sizes.items()}
    count = sizes.pop("prompts")
    target = load_target(args.target, args.dtype, args.device, packed=args.pack, quantization=args.quantization)
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    head = load_source(args.head, target, args.revision)
    policy = None if args.policy is None else load_policy(args.policy, head)
    questions = questions_in(read_conversations(args, count), count)
    prompts = [to_tokens(question, tokenizer) for question in questions]
    told = "Comparing; on a CPU this takes minutes. Ctrl-C reports what was compared until then.\n"
    print(told, file=sys.stderr, flush=True)
    is_stopped = False
    try:
        report = assert_lossless(target, head, policy, prompts, **sizes, invariant=args.invariant)
    except NotLosslessError as error:
        report = error.report
    except StoppedCheck as stop:
        report, is_stopped = stop.report, True
    if args.json:
        judged = {name: getattr(report, name) for name in ("verdict", "is_lossless", "is_tested")}
        print(json.dumps(judged | asdict(report), default=str))  # `str` converts values that JSON has no type for
    else:
        print(report)
    if is_stopped:
        return 130
    return 1 if not report.is_lossless else 0 if report.is_tested else 2
