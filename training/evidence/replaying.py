"""Policies decide again on recorded texts under planted costs: no clock, and the oracle beside them."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import tqdm

from transformers_resps import BaselineGuard, DraftHead, FixedPolicy, Policy, TreeShape
from transformers_resps.policies.action_grid import ActionGrid
from transformers_resps.policies.costs import CostModel, CostTable
from transformers_resps.policies.resps import ReSpSPolicy
from transformers_resps.policies.throughput import ThroughputPolicy
from transformers_resps.replay import OutcomeTable, RankedText, RecordedText, depths_of, record_pools, replay_policy
from transformers_resps.tools.methods import Bench, Generate, Method
from transformers_resps.tools.session import Dialogue

from .arms import LEARNED, Models
from .experiments import AUTO, FIXED, ORACLE, PLAIN, Experiment
from .planted import GPUS


# Compiled steps of SmolLM2 and its head in bfloat16 on a quiet Zen 4: medians of fixed trees and draft widths.
KEPT = Path("training/evidence/zen4_costs.json")
_LOOKUPS = (0, 4, 8)
_WIDTHS = {"Zen 4": (5, 4, 16)}  # depth, top_k and nodes of "auto"; as it asks for beyond a CPU elsewhere
_WIDE = (8, 10, 60)


def costs_of(name: str) -> CostModel:
    """Return the table of a "Zen 4", or of a planted GPU by its name."""
    if name == "Zen 4":
        return CostTable.load(KEPT)
    return next(gpu for gpu in GPUS if gpu.name == name)


def grid_of(name: str) -> ActionGrid:
    """Return the shapes that fixed tree and oracle choose among."""
    wide = ActionGrid.from_bins((4, 8, 16, 32, 60), (2, 4, 6, 8), (1, 4, 10))
    trees = ActionGrid.small() if name == "Zen 4" else wide
    return trees.with_lookups(_LOOKUPS)


def replayed(
    bench: Bench,
    experiment: Experiment,
    models: Models,
    arms: Mapping[str, Method],
    asked: Sequence[Dialogue],
    searched: Sequence[Dialogue],
) -> Iterator[dict[str, Any]]:
    """Yield a row for the first turn of each prompt and each arm: saved policies, fixed trees, "auto" and the oracle.

    Args:
        bench: of the target, which writes the texts as its arm `PLAIN` does.
        experiment: its `costs` name the table.
        models: their head drafts at each position of the texts.
        arms: by name, those that this machine has.
        asked: prompts.
        searched: other prompts, to find the best fixed tree on.
    """
    saved = {
        name: arm.keywords["policy"] for name, arm in arms.items() if name in LEARNED and isinstance(arm, Generate)
    }
    costs, grid = costs_of(experiment.costs), grid_of(experiment.costs)
    depth, top_k, most = _WIDTHS.get(experiment.costs, _WIDE)
    depths = {width: depth for width in (1, 2, 4, 8, top_k) if width <= top_k}
    for shapes in (grid, *(policy.config.grid for policy in saved.values() if isinstance(policy, ReSpSPolicy))):
        depths |= {width: max(levels, depths.get(width, 0)) for width, levels in depths_of(shapes).items()}
    depths = dict.fromkeys(depths, max(depths.values()))  # outcomes are those of pools that are equally deep
    recorded = partial(_recorded, bench, models, arms[PLAIN], depths)
    totals = sum(_outcomes(text, grid, costs).fixed_seconds.sum(0) for _, text in recorded(searched))
    best = grid[int(torch.as_tensor(totals).argmin())]
    made: dict[str, Callable[[], Policy]] = {
        PLAIN: lambda: FixedPolicy(TreeShape.plain()),
        FIXED: lambda: FixedPolicy(best),
        **{name: (lambda policy=policy: copy.deepcopy(policy)) for name, policy in saved.items()},
    }
    auto = BaselineGuard(ThroughputPolicy(depth, top_k, most))  # learns on from text to text
    for name, text in recorded(asked):
        for arm in (arm for arm in experiment.arms if arm in arms):
            row = {"arm": arm, "prompt": name, "turn": 1, "tokens": len(text)}
            if arm == ORACLE:
                seconds, forwards = float(_outcomes(text, grid, costs).best_seconds[0]), len(text)
            else:
                report = replay_policy(text, auto if arm == AUTO else made[arm](), costs)
                seconds, forwards = report.seconds, len(report.steps)
            yield row | {"forwards": forwards, "seconds": seconds, "shape": str(best) if arm == FIXED else ""}


def _outcomes(text: RecordedText, grid: ActionGrid, costs: CostModel) -> OutcomeTable:
    return OutcomeTable([RankedText.from_recording(text).outcomes(grid, costs)])


def _recorded(
    bench: Bench, models: Models, writes: Method, depths: dict[int, int], asked: Sequence[Dialogue]
) -> Iterator[tuple[str, RecordedText]]:
    """Write each text, and record what the head drafts along it; texts of fewer than two tokens are no texts."""
    assert isinstance(models.source, DraftHead)
    for prompt in tqdm([one.prompt(models.tokenizer) for one in asked], desc="Recording"):
        ids, answer = prompt.input_ids, bench.decode(prompt, writes).token_ids
        if len(answer) > 1:
            spare, text = bench.max_new_tokens - len(answer), torch.cat([ids, answer])
            pools = record_pools(bench.target, models.source, text, len(ids), depths=depths, spare_room=spare)
            yield prompt.name, pools
