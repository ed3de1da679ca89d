r"""Compare policies over a block head on recorded texts: fixed trees, `auto`, Re-SpS, and two rules of others.

Question: does a policy gain over a block head, whose levels come from one pass, more than the best fixed tree?
Answer: no, and "auto" is as good. Over a block head of four levels that `block_heads` trained, on 16 held-out
questions of GSM8K: "auto" +2.1%, -0.1% and -0.9% of the best fixed tree at the costs of a CPU, of compiled steps and
of a GPU, and +15% to +25% with prompt lookup. Re-SpS -2.2%, -0.3% and -10.6%, BlockPilot -10%, -9% and -27%, trees
that are cut by probability +2.7%, -4.2% and -4.1%; the oracle +31%, +23% and +13%. A chain writes 1.52, 1.63 and 1.66
times plain decoding's tokens; a tree 1.72 with 8 nodes, 1.78 with 4, and 2.26 with 32. With 64 nodes it is slower than
plain decoding on the CPU, with 32 by compiled steps; on the GPU more nodes than 32 gain nothing.

    python -m training.studies.block_policies --recordings work/block_recordings

The recordings are those of any block head:

    python -m training.prompts.recordings --target work/smollm2 --head HEAD --fit gsm8k_train.jsonl \
        --evaluate gsm8k.jsonl --output work/block_recordings

Method: replays greedy answers under planted costs, so nothing is timed. Trees are searched, thresholds chosen and
policies trained on `fit/` alone; all figures are of `evaluate/`. Ways, each with its interval over texts:

- best fixed: depth, budget and children of the fastest tree on `fit/`; its chain: the fastest of one child.
- auto: guarded, over the head alone, after it has decoded some of `fit/`; first call: a new one for each text.
- re-sps: the repaired variant of `ablations` over the same trees.
- BlockPilot (arXiv 2606.31315): one chain for each prompt, by a network that reads the target's features once.
- saturation: the tail of paths is cut where their probability falls below a threshold (Jella et al. 2026, "Following
  the Speedup", in which this rule alone paid); for a chain and for trees.
- oracle: the fastest tree at every step, known afterwards.
"""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from torch import Tensor

from transformers_resps import TreeShape
from transformers_resps.policies.action_grid import ActionGrid
from transformers_resps.policies.auto import default_policy
from transformers_resps.policies.base import Observation, Policy
from transformers_resps.policies.costs import CostTable
from transformers_resps.policies.guard import BaselineGuard
from transformers_resps.policies.throughput import ThroughputPolicy
from transformers_resps.replay import OutcomeTable, RankedText, RecordedText, replay_policy
from transformers_resps.telemetry.report import Timing, bootstrap_interval, rate
from transformers_resps.trainers import ReplayRollouts

from .ablations import REPAIRED, score, train
from .experiment import print_table
from .headroom import Only, load_folder
from .step_costs import read_tables


NODES = (2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48, 65)
BUDGETS = (4, 8, 16, 32, 64)  # nodes beside the root
THRESHOLDS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
WHOLE_TEXT = 10**6  # steps of a decision that is kept
RESULTS = Path("training/studies/measurements/block_policies.json")


def planted(verify: dict[int, float], draft: float) -> CostTable:
    """Seconds by nodes, and of a block draft, which does not depend on its levels."""
    return CostTable({128: verify}, {1: 0.0}, {}, 0.0003, draft_start={1: draft})


# SmolLM2 in bf16 on two Zen 4 cores, where a draft takes a tenth of a plain step; and an accelerator
COSTS = {
    "CPU": planted({1: 0.024, 8: 0.029, 16: 0.034, 32: 0.043, 64: 0.068}, 0.0024),
    "CPU, compiled": planted({1: 0.0135, 4: 0.0135, 6: 0.0145, 8: 0.0174, 12: 0.0203, 16: 0.0244, 32: 0.0427}, 0.0014),
    "GPU": planted({1: 0.020, 2: 0.0202, 64: 0.0225}, 0.002),
}


def grid_of(text: RecordedText) -> ActionGrid:
    """Trees of every depth of the text's block, for every budget that it can fill, as wide as it was recorded."""
    pools = {top_k: pool.levels.tolist() for top_k, pool in text.pools.items()}
    shapes = [
        TreeShape(nodes, depth, top_k)
        for depth, nodes, top_k in product(range(1, text.depth + 1), NODES, pools)
        if depth < nodes <= 1 + sum(level <= depth for level in pools[top_k]) and nodes <= 1 + text.block_nodes
    ]
    return ActionGrid((TreeShape.plain(), *shapes))


class Saturation(Policy):
    """Drafts whole blocks, and verifies the nodes whose paths are at least as probable as a threshold."""

    grows = uses_lookup = needs_drafted_match = False

    def __init__(self, shape: TreeShape, threshold: float) -> None:
        self.shape, self.threshold = shape, threshold

    def __repr__(self) -> str:
        return f"Saturation({self.shape}, {self.threshold})"

    def choose(self, observation: Observation) -> TreeShape:
        return self.shape

    def size(self, scores: Tensor, levels: Tensor) -> int:
        return 1 + int((scores[0] >= math.log(self.threshold)).sum())


@dataclass(frozen=True, slots=True)
class Decoded:
    """Held-out texts under one way to decide; `choice` is what was chosen on other texts."""

    seconds: list[float]
    choice: str = ""


def study(fit: Sequence[RecordedText], texts: Sequence[RecordedText], costs: CostTable) -> list[dict[str, Any]]:
    """One row for each way: speed in that of plain decoding, and over the best fixed tree, with its 95% interval."""
    ways = decode(fit, texts, costs)
    timed = {
        name: [Timing(len(text), taken) for text, taken in zip(texts, way.seconds, strict=True)]
        for name, way in ways.items()
    }
    rows = []
    for name, times in timed.items():
        fixed, plain = timed["best fixed"], timed["plain"]
        low, high = bootstrap_interval([[one] for one in times], [[one] for one in fixed])
        gain, speed = (rate(times) / rate(other) for other in (fixed, plain))
        row = {"way": name, "chosen": ways[name].choice, "speed": speed, "over best fixed": f"{gain - 1:+.1%}"}
        rows.append(row | {"95%": f"{low - 1:+.1%} to {high - 1:+.1%}"})
    return rows


def budgets(texts: Sequence[RecordedText], costs: CostTable) -> list[dict[str, Any]]:
    """One row for each budget: the speed of a chain and of a tree of whole blocks, in that of plain decoding.

    A chain ends with its block, so that further nodes are not drafted.
    """
    depth, plain = texts[0].depth, TreeShape.plain()
    chain, *_, tree = sorted(texts[0].pools)
    ranked = [RankedText.from_recording(text) for text in texts]
    rows = []
    for budget in BUDGETS:
        shapes = TreeShape(1 + min(budget, depth), depth, chain), TreeShape(1 + budget, depth, tree)
        outcomes = OutcomeTable([text.outcomes(ActionGrid((plain, *shapes)), costs) for text in ranked])
        base, *taken = ReplayRollouts(outcomes).oracle.fixed_seconds.sum(0).tolist()
        rows.append({"nodes": budget, "chain": base / taken[0], "tree": base / taken[1]})
    return rows


def decode(fit: Sequence[RecordedText], texts: Sequence[RecordedText], costs: CostTable) -> dict[str, Decoded]:
    known, held_out = ([RankedText.from_recording(text) for text in part] for part in (fit, texts))

    def rollouts(part: list[RankedText], grid: ActionGrid) -> ReplayRollouts:
        return ReplayRollouts(OutcomeTable([text.outcomes(grid, costs) for text in part]))

    def trained(grid: ActionGrid, persistence: int) -> Decoded:
        variant = replace(REPAIRED, persistence=min(persistence, 10), in_use=persistence)
        policy = train(variant, rollouts(known, grid))
        seconds, used = score(policy, rollouts(held_out, grid))
        return Decoded(seconds.tolist(), f"{used} trees")

    grid = grid_of(fit[0])
    chains = ActionGrid(tuple(shape for shape in grid.shapes if shape.top_k == 1))
    found, hindsight = rollouts(known, grid).oracle, rollouts(held_out, grid).oracle
    by_shape = hindsight.fixed_seconds  # [texts, a]
    ways = {"plain": Decoded(by_shape[:, 0].tolist())}
    for name, part in (("best fixed", grid), ("its chain", chains)):
        best = min(part.shapes, key=lambda shape: float(found.fixed_seconds[:, grid.shapes.index(shape)].sum()))
        ways[name] = Decoded(by_shape[:, grid.shapes.index(best)].tolist(), str(best))
    ways["auto"] = Decoded(replayed(without_lookup, fit[:8], texts, costs))
    ways["auto, first call"] = Decoded([replayed(without_lookup, [], [text], costs)[0] for text in texts])
    ways["auto and lookup"] = Decoded(replayed(default_policy, fit[:8], texts, costs))
    ways["re-sps"], ways["BlockPilot"] = trained(grid, 1), trained(chains, WHOLE_TEXT)
    for name, top_k in (("saturation, chain", 1), ("saturation, tree", max(fit[0].pools))):
        shape = TreeShape(1 + (fit[0].depth if top_k == 1 else fit[0].block_nodes), fit[0].depth, top_k)
        rules = [Saturation(shape, threshold) for threshold in THRESHOLDS]
        best_rule = min(rules, key=lambda rule: sum(replayed(lambda: rule, [], fit, costs)))
        ways[name] = Decoded(replayed(lambda rule=best_rule: rule, [], texts, costs), str(best_rule.threshold))
    ways["oracle"] = Decoded(hindsight.best_seconds.tolist())
    return ways


def without_lookup() -> Policy:
    """What "auto" means, over the block head alone, as all other ways."""
    return BaselineGuard(Only(ThroughputPolicy(), "head"))


def replayed(
    make: Callable[[], Policy], warm: Sequence[RecordedText], texts: Sequence[RecordedText], costs: CostTable
) -> list[float]:
    """Seconds of each text under a policy that has decoded `warm`."""
    policy = make()
    for text in warm:
        replay_policy(text, policy, costs)
    return [replay_policy(text, policy, costs).seconds for text in texts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recordings", type=Path, default=Path("work/block_recordings"))
    parser.add_argument("--costs", type=Path, nargs="+", default=[], help="cost tables; by default planted ones")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    fit, texts = (load_folder(args.recordings / kind / "0") for kind in ("fit", "evaluate"))
    rows = []
    for name, table in (read_tables(args.costs) if args.costs else COSTS).items():
        found = study(fit, texts, table)
        print(f"\n### {name}")
        print_table(found)
        swept = budgets(texts, table)
        print()
        print_table(swept)
        rows += [{"costs": name, **row} for row in [*found, *swept]]
    args.results.parent.mkdir(parents=True, exist_ok=True)
    facts = {"fit": len(fit), "texts": len(texts), "tokens": sum(map(len, texts)), "rows": rows}
    args.results.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
