"""Policies decide again on recorded texts under planted costs: no clock, and the oracle beside them."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils.logging import tqdm

from transformers_resps import BaselineGuard, DraftHead, FixedPolicy, Policy, TreeShape
from transformers_resps.policies.action_grid import ActionGrid
from transformers_resps.policies.costs import CostModel, CostTable
from transformers_resps.policies.resps import ReSpSPolicy
from transformers_resps.policies.throughput import ThroughputPolicy
from transformers_resps.replay import OutcomeTable, RankedText, RecordedText, depths_of, record_pools, replay_policy
from transformers_resps.tools.methods import Bench, Method, Prompt

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
    experiment: Experiment,
    bench: Bench,
    head: DraftHead,
    saved: Mapping[str, Policy],
    writes: Method,
    asked: Sequence[tuple[str, Tensor]],
    searched: Sequence[tuple[str, Tensor]],
) -> Iterator[dict[str, Any]]:
    """Yield a row for each prompt and arm.

    Args:
        experiment: its `costs` name the table.
        bench: of the target that writes the texts.
        head: drafts at each of their positions.
        saved: arm -> policy that was trained or fitted.
        writes: how the texts are written.
        asked: prompts by name.
        searched: other prompts, to find the best fixed tree on.
    """
    costs, grid = costs_of(experiment.costs), grid_of(experiment.costs)
    depth, top_k, most = _WIDTHS.get(experiment.costs, _WIDE)
    depths = {width: depth for width in (1, 2, 4, 8, top_k) if width <= top_k}
    for shapes in (grid, *(policy.config.grid for policy in saved.values() if isinstance(policy, ReSpSPolicy))):
        depths |= {width: max(levels, depths.get(width, 0)) for width, levels in depths_of(shapes).items()}
    depths = dict.fromkeys(depths, max(depths.values()))  # outcomes are those of pools that are equally deep
    others = [text for _, text in _recorded(bench, head, writes, searched, depths)]
    totals = sum(_outcomes(text, grid, costs).fixed_seconds.sum(0) for text in others)
    best = grid[int(torch.as_tensor(totals).argmin())]
    made: dict[str, Callable[[], Policy]] = {
        PLAIN: lambda: FixedPolicy(TreeShape.plain()),
        FIXED: lambda: FixedPolicy(best),
        **{name: (lambda policy=policy: copy.deepcopy(policy)) for name, policy in saved.items()},
    }
    auto = BaselineGuard(ThroughputPolicy(depth, top_k, most))  # learns on from text to text
    for name, text in _recorded(bench, head, writes, asked, depths):
        for arm in experiment.arms:
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
    bench: Bench, head: DraftHead, writes: Method, prompts: Sequence[tuple[str, Tensor]], depths: dict[int, int]
) -> Iterator[tuple[str, RecordedText]]:
    """Write each text, and record what the head drafts along it; texts of fewer than two tokens are no texts."""
    for name, ids in tqdm(prompts, desc="Recording"):
        answer = bench.decode(Prompt(name, ids), writes).token_ids
        if len(answer) > 1:
            spare, text = bench.max_new_tokens - len(answer), torch.cat([ids, answer])
            yield name, record_pools(bench.target, head, text, len(ids), depths=depths, spare_room=spare)
