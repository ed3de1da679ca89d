"""`resps calibrate`: measures what steps cost on this machine."""

import argparse
from typing import Any

from ..bench.models import load_target
from ..bench.options import model
from ..calibration.cost_table import CostTable
from ..calibration.measuring import calibrate
from ..head import DraftHead
from .options import add_target_options


def add_command(commands: Any) -> None:
    """Add `resps calibrate TARGET [HEAD]`."""
    parser = commands.add_parser(
        "calibrate", help="measure what steps cost on this machine, and whether drafting can pay"
    )
    parser.set_defaults(run=calibrate_costs)
    add_target_options(parser)
    parser.add_argument("head", type=model, nargs="?", help="folder or Hub id of a draft head for the target")
    parser.add_argument("--pack", action="store_true", help="prepack the target's weights first, as `prepack` does")
    parser.add_argument("--refresh", action="store_true", help="measure again even if a table is stored")


def calibrate_costs(args: argparse.Namespace) -> int:
    """Print the cost table, measured now or before."""
    target = load_target(args.target, args.dtype, args.device, packed=args.pack)
    head = DraftHead.from_pretrained(args.head, target=target) if args.head else None
    table = calibrate(target, head, refresh=args.refresh)
    for key, value in table.identity.items():
        print(f"{key:14}{value}")
    contexts = sorted(table.verify)
    print("\nMilliseconds per target forward, by context length; the last line is plain decoding:\n")
    print("  nodes" + "".join(f"{context:>9}" for context in contexts))
    for nodes in sorted(table.verify[contexts[0]]):
        print(f"{nodes:7}" + "".join(f"{1e3 * table.verify[context][nodes]:9.1f}" for context in contexts))
    if table.plain:
        print("  plain" + "".join(f"{1e3 * table.plain_seconds(context):9.1f}" for context in contexts))
    if table.draft:
        widths = ", ".join(f"{width}: {1e3 * seconds:.1f}" for width, seconds in sorted(table.draft.items()))
        print(f"\nMilliseconds per level of the head, by width: {widths}")
    print(f"\nMilliseconds per step outside its forwards: {1e3 * table.overhead:.2f}")
    print(f"\n{what_must_be_accepted(table)}")
    return 0


def what_must_be_accepted(table: CostTable) -> str:
    """Say in two sentences how many drafted tokens must be accepted for drafting to pay."""
    context = min(table.verify)
    plain = table.plain_seconds(context)
    costs = {nodes: table.verify_seconds(nodes, context) / plain for nodes in (2, 4, 8)}
    listed = ", ".join(f"{nodes} nodes {cost:.1f}" for nodes, cost in costs.items())
    least = min(costs.values())
    verdict = "can pay" if least < 1.6 else "can hardly pay"
    return (
        f"Cost of verifying, in plain forwards: {listed}. Drafting {verdict} here: a step must accept more than "
        f"{max(least - 1, 0.0):.1f} drafted tokens on average, plus what pays for drafting them."
    )
