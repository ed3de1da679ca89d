"""`resps calibrate`: measures what steps cost on this machine."""

import argparse
from typing import Any

from ..bench.models import load_target
from ..bench.options import model
from ..calibration import calibrate
from ..heads import DraftHead
from ..policies.costs import CostTable, Range
from .options import add_target_options


_TELLING = 0.1  # plain forwards: a smaller spread changes no conclusion
_NODES = (2, 4, 8)  # of which the verdict speaks


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
    print("\nMilliseconds per target forward, by context length: the median, and the middle half of the repeats.")
    print("The last line is plain decoding.\n")
    print("  nodes" + "".join(f"{context:>24}" for context in contexts))
    for nodes in sorted(table.verify[contexts[0]]):
        rows = [(table.verify[context][nodes], table.verify_range.get(context, {}).get(nodes)) for context in contexts]
        print(f"{nodes:7}" + "".join(f"{milliseconds(*row):>24}" for row in rows))
    if table.plain:
        rows = [(table.plain_seconds(context), table.plain_range.get(context)) for context in contexts]
        print("  plain" + "".join(f"{milliseconds(*row):>24}" for row in rows))
    if table.draft:
        print("\nMilliseconds per level of the head, by width:\n")
        for width, seconds in sorted(table.draft.items()):
            print(f"{width:7}{milliseconds(seconds, table.draft_range.get(width)):>24}")
    print(f"\nMilliseconds per step outside its forwards: {1e3 * table.overhead:.2f}")
    print(f"\n{what_must_be_accepted(table)}")
    return 0


def milliseconds(seconds: float, spread: Range | None) -> str:
    """A median, and the quartiles of the repeats where the table has them."""
    ends = f" ({1e3 * spread[0]:.1f} to {1e3 * spread[1]:.1f})" if spread else ""
    return f"{1e3 * seconds:.1f}{ends}"


def what_must_be_accepted(table: CostTable) -> str:
    """Say how many drafted tokens must be accepted for drafting to pay; or first that the repeats tell too little."""
    context = min(table.verify)
    plain = table.plain_seconds(context)
    costs = {nodes: table.verify_seconds(nodes, context) / plain for nodes in _NODES}
    listed = ", ".join(f"{nodes} nodes {cost:.1f}" for nodes, cost in costs.items())
    least = min(costs.values())
    spread, difference = _spread(table, context) / plain, max(1.0, *costs.values()) - min(1.0, *costs.values())
    if spread > max(difference, _TELLING):
        return (
            f"TOO NOISY TO TELL: repeats of one forward differ by {spread:.1f} plain forwards, the costs by "
            f"{difference:.1f}. Wait until the machine is idle, then measure again with --refresh.\n"
            f"Cost of verifying, in plain forwards, as measured: {listed}."
        )
    verdict = "can pay" if least < 1.6 else "can hardly pay"
    return (
        f"Cost of verifying, in plain forwards: {listed}. Drafting {verdict} here: a step must accept more than "
        f"{max(least - 1, 0.0):.1f} drafted tokens on average, plus what pays for drafting them."
    )


def _spread(table: CostTable, context: int) -> float:
    """Seconds between the quartiles of one forward's repeats: the most, of those that the verdict compares."""
    rows = table.verify_range.get(context, {})
    ranges = [rows[nodes] for nodes in _NODES if nodes in rows]
    ranges += [table.plain_range[context]] if context in table.plain_range else []
    return max((high - low for low, high in ranges), default=0.0)
