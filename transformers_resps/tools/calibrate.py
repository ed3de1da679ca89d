"""`resps calibrate`: measure how long steps take on this machine, and whether drafting can save time."""

import argparse
import json
from dataclasses import asdict

from ..calibration import calibrate
from ..compilation.kernels import machine_line
from ..policies.costs import CostTable, Range
from .loading import load_source, load_target


_MIN_SPREAD = 0.1  # in units of a plain forward; repeats that differ by less change no conclusion
_IMPOSSIBLE = 3.0  # if a forward takes this many times as long as a larger one, other processes disturbed it
_NODES = (2, 4, 8)  # tree sizes in the verdict
_PAYS_BELOW = 1.6  # drafting can save time if verifying a tree costs less than this many plain forwards


def run(args: argparse.Namespace) -> int:
    """Measure or load the cost table of a target and head; print it, and say whether drafting can save time."""
    target = load_target(args.target, args.dtype, args.device, packed=args.pack, quantization=args.quantization)
    table = calibrate(target, load_source(args.head, target), invariant=args.invariant, refresh=args.refresh)
    if args.json:
        print(json.dumps(asdict(table) | {"machine": machine_line(), "verdict": what_must_be_accepted(table)}))
        return 0
    print(f"{'machine':14}{machine_line()}")
    for key, value in table.identity.items():
        print(f"{key:14}{value}")
    contexts = sorted(table.verify)
    print("\nMilliseconds per target forward, by context length: the median, and the middle half of the repeats.")
    print(f"{'The last line' if table.plain else 'One node'} is plain decoding.\n")
    print("  nodes" + "".join(f"{context:>24}" for context in contexts))
    for nodes in sorted(table.verify[contexts[0]]):
        rows = [(table.verify[context][nodes], table.verify_range.get(context, {}).get(nodes)) for context in contexts]
        print(f"{nodes:7}" + "".join(f"{_milliseconds(*row):>24}" for row in rows))
    if table.plain:
        rows = [(table.plain_seconds(context), table.plain_range.get(context)) for context in contexts]
        print("  plain" + "".join(f"{_milliseconds(*row):>24}" for row in rows))
    if table.draft:
        print("\nMilliseconds of a draft: per level of the head, by width, and once for the whole draft.\n")
        print(f"  width{'per level':>24}{'once':>24}")
        for width, seconds in sorted(table.draft.items()):
            start = _milliseconds(table.draft_start.get(width, 0.0), None)
            print(f"{width:7}{_milliseconds(seconds, table.draft_range.get(width)):>24}{start:>24}")
    print(f"\nMilliseconds per step outside its forwards: {1e3 * table.overhead:.2f}")
    print(f"\n{what_must_be_accepted(table)}")
    return 0


def _milliseconds(seconds: float, spread: Range | None) -> str:
    ends = f" ({1e3 * spread[0]:.1f} to {1e3 * spread[1]:.1f})" if spread else ""
    return f"{1e3 * seconds:.1f}{ends}"


def what_must_be_accepted(table: CostTable) -> str:
    """Say how many drafted tokens must be accepted to save time, or that the costs are too noisy to tell."""
    context = min(table.verify)
    plain = table.plain_seconds(context)
    costs = {nodes: table.verify_seconds(nodes, context) / plain for nodes in _NODES}
    listed = ", ".join(f"{nodes} nodes {cost:.1f}" for nodes, cost in costs.items())
    verify_range = table.verify_range.get(context, {})
    ranges = [verify_range[nodes] for nodes in _NODES if nodes in verify_range]
    ranges += [table.plain_range[context]] if context in table.plain_range else []
    spread = max((high - low for low, high in ranges), default=0.0) / plain
    difference = max(1.0, *costs.values()) - min(1.0, *costs.values())
    doubt = ""
    if spread > max(difference, _MIN_SPREAD):
        doubt = f"repeats of one forward differ by {spread:.1f} plain forwards, the costs by {difference:.1f}"
    elif (times := _contradiction(table)) > _IMPOSSIBLE:
        doubt = f"one forward took {times:.1f} times as long as another that is as large or larger"
    if doubt:
        return (
            f"TOO NOISY TO TELL: {doubt}. Wait until no other process uses the cores, then measure again with "
            f"--refresh.\nCost of verifying, in plain forwards, as measured: {listed}."
        )
    least = min(costs.values())
    verdict = "can pay" if least < _PAYS_BELOW else "can hardly pay"
    return (
        f"Cost of verifying, in plain forwards: {listed}. Drafting {verdict} here: a step must accept more than "
        f"{max(least - 1, 0.0):.1f} drafted tokens on average, plus what pays for drafting them."
    )


def _contradiction(table: CostTable) -> float:
    """Return the largest factor by which a forward took longer than another of at least its size; above 1 is noise."""
    cells = [(context, nodes, taken) for context, row in table.verify.items() for nodes, taken in row.items()]
    cells += [(context, 1, taken) for context, taken in table.plain.items()]
    return max(
        taken / longer
        for context, nodes, taken in cells
        for at, more, longer in cells
        if at >= context and more >= nodes
    )
