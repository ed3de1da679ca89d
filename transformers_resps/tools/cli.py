"""The command `resps`: its subcommands, of which `calibrate` and `verify` stand here."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from ..calibration import calibrate
from ..data import to_tokens
from ..heads import DraftHead
from ..policies.costs import CostTable, Range
from ..testing import NotLosslessError, assert_lossless
from ..testing.divergence import move_of_gaps
from . import bench, doctor, inspect, serve
from .loading import (
    add_question_options,
    add_target_options,
    load_policy,
    load_target,
    model,
    positive,
    questions_in,
    read_conversations,
)


_MIN_SPREAD = 0.1  # plain forwards: a smaller one changes no conclusion
_NODES = (2, 4, 8)  # of which the verdict of `resps calibrate` speaks
_PAYS_BELOW = 1.6  # plain forwards that a verification may cost


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; 1 when what it examined has a fault, 2 when it could not examine it, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser("resps", description="Lossless draft trees for Transformers.")
    commands = parser.add_subparsers(dest="command", required=True)
    for add_command in (
        doctor.add_command,
        inspect.add_command,
        add_calibrate,
        add_verify,
        bench.add_command,
        serve.add_command,
    ):
        add_command(commands)
    args = parser.parse_args(arguments)
    try:
        status: int = args.run(args)
    except (ValueError, OSError) as error:
        print(f"resps {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"resps {args.command}: stopped.", file=sys.stderr)
        return 130
    return status


def add_calibrate(commands: Any) -> None:
    """Add `resps calibrate TARGET [HEAD]`."""
    parser = commands.add_parser(
        "calibrate", help="measure what steps cost on this machine, and whether drafting can pay"
    )
    parser.set_defaults(run=print_costs)
    add_target_options(parser)
    parser.add_argument("head", type=model, nargs="?", help="folder or Hub id of a draft head for the target")
    parser.add_argument("--pack", action="store_true", help="prepack the target's weights first, as `prepack` does")
    parser.add_argument("--refresh", action="store_true", help="measure again even if a table is stored")


def print_costs(args: argparse.Namespace) -> int:
    """Print the cost table, measured now or before, and what follows from it."""
    target = load_target(args.target, args.dtype, args.device, packed=args.pack)
    head = DraftHead.from_pretrained(args.head, target=target) if args.head else None
    table = calibrate(target, head, refresh=args.refresh)
    for key, value in table.identity.items():
        print(f"{key:14}{value}")
    contexts = sorted(table.verify)
    print("\nMilliseconds per target forward, by context length: the median, and the middle half of the repeats.")
    print("The last line is plain decoding.\n")
    print("  nodes" + "".join(f"{context:>24}" for context in contexts))
    for nodes in sorted(table.verify[contexts[0]]):
        rows = [(table.verify[context][nodes], table.verify_range.get(context, {}).get(nodes)) for context in contexts]
        print(f"{nodes:7}" + "".join(f"{_milliseconds(*row):>24}" for row in rows))
    if table.plain:
        rows = [(table.plain_seconds(context), table.plain_range.get(context)) for context in contexts]
        print("  plain" + "".join(f"{_milliseconds(*row):>24}" for row in rows))
    if table.draft:
        print("\nMilliseconds per level of the head, by width:\n")
        for width, seconds in sorted(table.draft.items()):
            print(f"{width:7}{_milliseconds(seconds, table.draft_range.get(width)):>24}")
    print(f"\nMilliseconds per step outside its forwards: {1e3 * table.overhead:.2f}")
    print(f"\n{what_must_be_accepted(table)}")
    return 0


def _milliseconds(seconds: float, spread: Range | None) -> str:
    ends = f" ({1e3 * spread[0]:.1f} to {1e3 * spread[1]:.1f})" if spread else ""
    return f"{1e3 * seconds:.1f}{ends}"


def what_must_be_accepted(table: CostTable) -> str:
    """Say how many drafted tokens must be accepted for drafting to pay, or that repeats differ too much to tell."""
    context = min(table.verify)
    plain = table.plain_seconds(context)
    costs = {nodes: table.verify_seconds(nodes, context) / plain for nodes in _NODES}
    listed = ", ".join(f"{nodes} nodes {cost:.1f}" for nodes, cost in costs.items())
    verify_range = table.verify_range.get(context, {})
    ranges = [verify_range[nodes] for nodes in _NODES if nodes in verify_range]
    ranges += [table.plain_range[context]] if context in table.plain_range else []
    spread = max((high - low for low, high in ranges), default=0.0) / plain
    difference = max(1.0, *costs.values()) - min(1.0, *costs.values())
    if spread > max(difference, _MIN_SPREAD):
        return (
            f"TOO NOISY TO TELL: repeats of one forward differ by {spread:.1f} plain forwards, the costs by "
            f"{difference:.1f}. Wait until the machine is idle, then measure again with --refresh.\n"
            f"Cost of verifying, in plain forwards, as measured: {listed}."
        )
    least = min(costs.values())
    verdict = "can pay" if least < _PAYS_BELOW else "can hardly pay"
    return (
        f"Cost of verifying, in plain forwards: {listed}. Drafting {verdict} here: a step must accept more than "
        f"{max(least - 1, 0.0):.1f} drafted tokens on average, plus what pays for drafting them."
    )


def add_verify(commands: Any) -> None:
    """Add `resps verify TARGET [HEAD] [POLICY]`, the proof that output is lossless."""
    parser = commands.add_parser(
        "verify", help="check that the output with a draft head is the model's own; prints a report"
    )
    parser.set_defaults(run=prove_lossless)
    add_target_options(parser)
    add_question_options(parser, "its first user turns are the prompts")
    add = parser.add_argument
    add("head", type=model, nargs="?", help="folder or Hub id of a draft head; without one, drafts by lookup")
    named = "folder or Hub id of a policy, 'auto', or total_tokens,depth,top_k[,lookup]; default: the head's tree"
    add("policy", nargs="?", help=named)
    add("--prompts", type=positive, default=4, help="number of prompts (default: 4)")
    add("--seeds", type=positive, default=4, help="sampled outputs per sampling setting (default: 4)")
    add("--max-new-tokens", type=positive, default=32, help="length of each compared output (default: 32)")
    rounding = "instead, measure how far a tree forward moves the target's logits"
    add("--rounding", action="store_true", help=rounding)
    add("--revision", help="of the head")


def prove_lossless(args: argparse.Namespace) -> int:
    """Print the report; 1 when the output is not the model's own, 2 when no draft was accepted, so nothing tested."""
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    target = load_target(args.target, args.dtype, args.device)
    head = DraftHead.from_pretrained(args.head, target=target, revision=args.revision) if args.head else None
    policy = None if args.policy is None else load_policy(args.policy, head)
    questions = questions_in(read_conversations(args, args.prompts), args.prompts)
    prompts = [to_tokens(question, tokenizer) for question in questions]
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
    """Print one line per number of nodes; always 0, because nothing is judged."""
    print(f"Tree forwards against one-token decoding, {target.dtype}, {torch.get_num_threads()} threads:\n")
    for moved in move_of_gaps(target, prompts, max_new_tokens, [2, 4, 8, 16, 0]):
        print(f"{f'{moved.nodes} nodes' if moved.nodes else 'all at once'}: {moved}")
    return 0
