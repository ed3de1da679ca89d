r"""What can a policy win? Best fixed shapes, the oracle, what is predictable, and what the online policy keeps of it.

    python training/headroom.py --recordings work/recordings --results training/headroom/results.json

Reads what `training/recordings.py` recorded. Shapes are searched, and models fitted, on `fit/` alone; all figures are
of `evaluate/`. Writes the results and prints the tables of `training/HEADROOM.md`.
"""

import argparse
import json
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from transformers_resps import TreeShape
from transformers_resps.lookup import BatchLookup
from transformers_resps.policy import ActionGrid, Guard, Observation, Policy, ThroughputPolicy
from transformers_resps.trainers import (
    Oracle,
    OutcomeTable,
    RecordedText,
    StepCosts,
    replay,
    replay_policy,
)
from transformers_resps.trainers.ppo import expected_gain


SOURCES = ("head", "lookup", "both")
COST_TABLES = Path(__file__).parent / "headroom" / "cost_tables.json"


def load_folder(folder: Path) -> list[RecordedText]:
    return [RecordedText.load(file) for file in sorted(folder.rglob("*.safetensors"))]


def grid_of(sources: str) -> ActionGrid:
    trees = ActionGrid.from_bins((2, 3, 4, 6, 8, 12), (1, 2, 3, 4, 6), (1, 2, 4)).shapes
    chains = tuple(TreeShape(1, 0, 1, count) for count in (1, 2, 3, 4, 6, 8, 12))
    if sources == "head":
        return ActionGrid(trees)
    if sources == "lookup":
        return ActionGrid((TreeShape.plain(), *chains))
    merged = tuple(replace(tree, lookup=count) for tree in trees for count in (3, 6) if tree.asks_head)
    return ActionGrid((*trees, *chains, *merged))


def costs_of(table: dict[str, Any]) -> StepCosts:
    row = {int(nodes): float(seconds) for nodes, seconds in table["verify"].items()}
    known = sorted(row)

    def verify(nodes: int, context: int) -> float:
        if nodes in row:
            return row[nodes]
        place = min(bisect_left(known, nodes), len(known) - 1)
        low, high = known[place - 1], known[place]
        return row[low] + (nodes - low) / (high - low) * (row[high] - row[low])

    return StepCosts(verify, lambda width, levels: levels * float(table["level"]))


def outcomes(texts: list[RecordedText], grid: ActionGrid, costs: StepCosts) -> OutcomeTable:
    """Every action at every position. A looked-up node that the head drafted too is paid for twice here."""

    def seconds(shape: TreeShape, context: int) -> float:
        draft = costs.draft(shape.top_k, shape.depth) if shape.asks_head else 0.0
        return costs.verify(shape.total_tokens + shape.lookup, context) + draft

    return OutcomeTable([replay(text).outcomes(grid, seconds) for text in texts])


def signals(texts: list[RecordedText], sources: str) -> Tensor:
    """What may be known before a decision, generously: the scores of the whole pool as well. `[p, n]`."""
    rows = []
    for text in texts:
        pool, tokens = text.pools[4], text.input_ids.tolist()
        best = torch.stack([pool.scores[:, pool.levels == level].amax(1) for level in range(1, 7)], dim=1)
        masses = torch.stack(
            [pool.scores[:, pool.levels == level].exp().sum(1).clamp(max=1) for level in range(1, 7)], dim=1
        )
        heads = torch.cat([pool.scores[:, :4], best, masses], dim=1)
        lookup, found, recent = BatchLookup([0]), [], []
        for place in range(len(text)):
            root = text.prompt_length + place
            lookup.extend([tokens[lookup.lengths[0] : root + 1]])
            match = lookup.matches()[0]
            found.append([float(match.length), *(match.survival + [0.0] * 6)[:6]])
            upcoming = text.input_ids[None, root : root + 1]  # would the step before have foreseen the newest token?
            before = pool.tokens[place - 1 : place, :4] == upcoming if place else torch.zeros(1, 4)
            recent.append(float(before.any()))
        hits = torch.tensor(recent)
        padded = [nn.functional.pad(hits, (width - 1, 0)).unfold(0, width, 1).mean(1) for width in (1, 4, 16)]
        window = torch.stack(padded, dim=1)
        parts = {"head": [heads, window], "lookup": [torch.tensor(found)]}
        rows.append(torch.cat(parts["head"] + parts["lookup"] if sources == "both" else parts[sources], dim=1))
    return torch.cat(rows)


def fitted_choices(fit: OutcomeTable, known: Tensor, scored: Tensor, epochs: int = 150) -> Tensor:
    """Actions `[p]` at all positions to score, by a network trained to maximise the expected gain on `fit`.

    Stopped where it is best on the last fifth of the fitting texts.
    """
    torch.manual_seed(0)
    mean, spread = known.mean(0), known.std(0) + 1e-3
    inputs, rate = (known - mean) / spread, Oracle(fit).best_fixed_rate
    gains = (fit.emitted - rate * fit.seconds).float()
    edge = int(fit.starts[int(0.8 * len(fit))])
    model = nn.Sequential(nn.Linear(inputs.shape[1], 64), nn.GELU(), nn.Dropout(0.2), nn.Linear(64, gains.shape[1]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
    best, kept = -1e9, {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(epochs):
        for index in torch.randperm(edge).split(256):
            loss = -expected_gain(model(inputs[index]), gains[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            model.eval()
            picks = model(inputs[edge:]).argmax(-1)
            gain = float(gains[edge:].gather(1, picks[:, None]).mean())
            model.train()
        if gain > best:
            best, kept = gain, {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(kept)
    with torch.no_grad():
        return model.eval()((scored - mean) / spread).argmax(-1)


def seconds_of(table: OutcomeTable, actions: Tensor) -> Tensor:
    """Seconds of each text when `actions` `[p]` are taken."""
    taken = []
    for start, stop in zip(table.starts.tolist(), table.stops.tolist(), strict=True):
        place, seconds = start, 0.0
        while place < stop:
            action = int(actions[place])
            seconds += float(table.seconds[place, action])
            place += int(table.emitted[place, action])
        taken.append(seconds)
    return torch.tensor(taken, dtype=torch.float64)


class Only(Policy):
    """Hides a source from a policy."""

    glances = True

    def __init__(self, policy: ThroughputPolicy, sources: str) -> None:
        self.policy, self.sources, self.costs = policy, sources, policy.costs
        self.grow, self.size, self.observe = policy.grow, policy.size, policy.observe  # type: ignore[method-assign]

    @property
    def is_confident(self) -> bool:
        return self.policy.is_confident

    def choose(self, observation: Observation) -> TreeShape:
        if self.sources == "lookup":
            observation = replace(observation, features=None)
        if self.sources == "head":
            observation = replace(observation, survival=list)
        return self.policy.choose(observation)


def online(texts: list[RecordedText], warm: list[RecordedText], sources: str, costs: StepCosts) -> Tensor:
    """Seconds of each text under the guarded online policy, after it has decoded `warm`."""
    policy = Guard(Only(ThroughputPolicy(), sources))
    for text in warm:
        replay_policy(text, policy, costs)
    return torch.tensor([replay_policy(text, policy, costs).seconds for text in texts], dtype=torch.float64)


def study(
    fit: list[RecordedText], evaluate: dict[str, list[RecordedText]], sources: str, costs: StepCosts
) -> list[dict[str, Any]]:
    """One row per benchmark and one for all: speeds in those of plain decoding."""
    grid = grid_of(sources)
    texts = [text for benchmark in evaluate.values() for text in benchmark]
    names = [name for name, benchmark in evaluate.items() for _ in benchmark]
    fitting, scoring = outcomes(fit, grid, costs), outcomes(texts, grid, costs)
    oracle, found = Oracle(scoring), Oracle(fitting).best_fixed
    by_text = oracle.fixed_seconds
    plain = by_text[:, grid.index_of(TreeShape.plain())]
    picks = fitted_choices(fitting, signals(fit, sources), signals(texts, sources))
    columns = {
        "best_fixed": by_text[:, found],
        "best_per_prompt": by_text.min(-1).values,
        "oracle": oracle.best_seconds,
        "predictable": seconds_of(scoring, picks),
        "online_first_call": torch.cat([online([text], [], sources, costs) for text in texts]),
        "online": online(texts, fit[::4], sources, costs),
    }
    rows = []
    for name in [*evaluate, "all"]:
        here = torch.tensor([name in (one, "all") for one in names])
        speeds = {column: float(plain[here].sum() / seconds[here].sum()) for column, seconds in columns.items()}
        speeds["best_fixed_here"] = float(plain[here].sum() / by_text[here].sum(0).min())
        rows.append({"benchmark": name, "texts": int(here.sum()), "fixed": str(grid[found]), **speeds})
    return rows


HEADINGS: dict[str, Callable[[dict[str, Any]], str]] = {
    "benchmark": lambda row: row["benchmark"],
    "best fixed": lambda row: f"{row['best_fixed']:.2f}",
    "best fixed here": lambda row: f"{row['best_fixed_here']:.2f}",
    "per prompt": lambda row: f"{row['best_per_prompt']:.2f}",
    "oracle": lambda row: f"{row['oracle']:.2f}",
    "predictable": lambda row: f"{row['predictable']:.2f}",
    "online": lambda row: f"{row['online']:.2f}",
    "online, first call": lambda row: f"{row['online_first_call']:.2f}",
}


def print_tables(results: list[dict[str, Any]]) -> None:
    for result in results:
        fixed = result["rows"][-1]["fixed"]
        print(f"\n### {result['costs']}, temperature {result['temperature']}, {result['sources']}; fixed: `{fixed}`\n")
        print("| " + " | ".join(HEADINGS) + " |\n|---" + "|---:" * (len(HEADINGS) - 1) + "|")
        for row in result["rows"]:
            print("| " + " | ".join(cell(row) for cell in HEADINGS.values()) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recordings", type=Path, default=Path("work/recordings"))
    parser.add_argument("--results", type=Path, default=Path("training/headroom/results.json"))
    parser.add_argument("--print-only", action="store_true", help="print the tables of results that are there")
    args = parser.parse_args()
    results: list[dict[str, Any]] = []
    tables = json.loads(COST_TABLES.read_text(encoding="utf-8"))
    for folder in [] if args.print_only else sorted((args.recordings / "evaluate").iterdir()):
        load = {path.name: load_folder(path) for path in sorted(folder.iterdir())}
        fitting = load_folder(args.recordings / "fit" / folder.name)
        for name, table in tables.items():
            for sources in SOURCES:
                rows = study(fitting, load, sources, costs_of(table))
                results.append({"costs": name, "temperature": folder.name, "sources": sources, "rows": rows})
                args.results.write_text(json.dumps({"cost_tables": tables, "results": results}, indent=1))
    print_tables(results or json.loads(args.results.read_text(encoding="utf-8"))["results"])


if __name__ == "__main__":
    main()
