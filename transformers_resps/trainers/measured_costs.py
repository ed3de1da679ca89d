"""What steps cost on the machine that a policy is trained on: measured once for each run."""

from dataclasses import replace
from pathlib import Path

from ..calibration.cost_table import CostTable
from ..calibration.measuring import calibrate
from .pair import Pair
from .policy_config import PolicyTrainingConfig


def measured_costs(pair: Pair, args: PolicyTrainingConfig) -> CostTable:
    """What steps cost on this machine, from `OUTPUT_DIR/costs.json`: a resumed run keeps those it started with.

    One process measures while the others wait: together they would slow each other and learn different costs.

    Raises:
        ValueError: the run started on another machine, or with another target or head.
    """
    file = Path(str(args.output_dir)) / "costs.json"
    with args.main_process_first(desc="measuring what steps cost"):
        if not file.is_file():
            calibrate(pair.target, pair.head).save(file)
    table = CostTable.load(file)
    table.check_here(pair.target, pair.head)
    return table if args.reward_includes_drafting else replace(table, draft={})
