r"""Compare fixed trees, a fitted model of acceptance, the online policy and the oracle on recorded texts.

Question: how much can a policy gain, and how much of that can be predicted?
Answer: with head and lookup the oracle is 21 to 51% above the best fixed tree, a fitted model of acceptance 1 to 9%.
`policy="auto"` reaches the fitted model and, greedily, the best tree of each prompt. A second drafter gains more than
a better choice of trees. Tables: `HEADROOM.md`.

    python -m training.studies.headroom --recordings work/recordings

Method: replays what `training/prompts/recordings.py` recorded with the cost tables of a quiet machine: nothing is
timed. Trees are searched and models fitted on `fit/` alone; all figures are of `evaluate/`.
"""

import argparse
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transformers_resps import TreeShape
from transformers_resps.policies.action_grid import ActionGrid
from transformers_resps.policies.base import Observation, PolicyWrapper
from transformers_resps.policies.costs import CostTable
from transformers_resps.policies.guard import BaselineGuard
from transformers_resps.policies.throughput import ThroughputPolicy
from transformers_resps.replay import Oracle, RecordedText, fitted_policy, replay_policy

from .acceptance_model import FittedAcceptance
from .positions import LEVELS, SIGNALS, Positions, levels_of, read_positions
from .predictable import Decider
from .step_costs import outcome_table, read_tables


SOURCES = ("head", "lookup", "both")
SIZES = 5, 4, 16  # depth, top_k and nodes of the online policy at most: texts were recorded for them
RESULTS = Path("training/studies/measurements/headroom/results.json")
COSTS = ["training/studies/measurements/headroom/smollm2-135m-instruct-head/costs.json"]
COLUMNS = (
    "best_fixed",
    "best_fixed_here",
    "per_prompt",
    "auto_first_call",
    "auto",
    "auto_fitted",
    "predictable",
    "oracle",
)
LADDER = {  # what each signal adds to the fitted model, for head and lookup together
    "scores and match": ("scores", "lookup"),
    "agreement of head and lookup": ("scores", "lookup", "agreement"),
    "recent hits": ("scores", "lookup", "agreement", "recent"),
    "fused features": SIGNALS,
}


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


@dataclass(frozen=True, slots=True)
class Corpus:
    """Recordings of one temperature, read once.

    Attributes:
        fit: to search and to fit on.
        texts: to score.
        benchmarks: of each of `texts`.
        fit_positions: of `fit`.
        positions: of `texts`.
        models: of acceptance, by what they may see; they know nothing of costs.
    """

    fit: list[RecordedText]
    texts: list[RecordedText]
    benchmarks: list[str]
    fit_positions: Positions
    positions: Positions
    models: dict[tuple[str, ...], FittedAcceptance] = field(default_factory=dict)

    @classmethod
    def load(cls, recordings: Path, temperature: str) -> "Corpus":
        fit = load_folder(recordings / "fit" / temperature)
        folders = sorted((recordings / "evaluate" / temperature).iterdir())
        scored = [(text, folder.name) for folder in folders for text in load_folder(folder)]
        texts, names = [text for text, _ in scored], [name for _, name in scored]
        return cls(fit, texts, names, read_positions(fit), read_positions(texts))

    def predictable(self, sources: str, costs: CostTable, signals: tuple[str, ...] = SIGNALS) -> Tensor:
        """Seconds of each text when a model of acceptance decides, fitted with `signals`."""
        if sources == "head":
            signals = tuple(signal for signal in signals if signal not in ("lookup", "agreement"))
        if signals not in self.models:
            self.models[signals] = FittedAcceptance(self.fit_positions, levels_of(self.fit[0]), signals)
        model = self.models[signals]
        decider = Decider(model, self.fit_positions, costs, 0 if sources == "lookup" else LEVELS)
        return decider.seconds(self.positions)


class Only(PolicyWrapper):
    """Hides a source from a policy."""

    def __init__(self, policy: ThroughputPolicy, sources: str) -> None:
        super().__init__(policy)
        self.sources = sources

    def choose(self, observation: Observation) -> TreeShape:
        if self.sources == "lookup":
            observation = replace(observation, features=None)
        if self.sources == "head":
            observation = replace(observation, prefix_accept_probs=list)
        return self.policy.choose(observation)


def online(
    texts: list[RecordedText], warm: list[RecordedText], policy: ThroughputPolicy, sources: str, table: CostTable
) -> Tensor:
    """Seconds of each text under the guarded online policy, after it has decoded `warm`."""
    guarded = BaselineGuard(Only(policy, sources))
    for text in warm:
        replay_policy(text, guarded, table)
    return torch.tensor([replay_policy(text, guarded, table).seconds for text in texts], dtype=torch.float64)


def study(corpus: Corpus, sources: str, table: CostTable) -> list[dict[str, Any]]:
    """One row per benchmark and one for all: speeds in those of plain decoding."""
    grid, texts = grid_of(sources), corpus.texts
    found = Oracle(outcome_table(corpus.fit, grid, table)).best_fixed
    oracle = Oracle(outcome_table(texts, grid, table))
    by_text = oracle.fixed_seconds
    warm = corpus.fit[::7]
    columns = {
        "best_fixed": by_text[:, found],
        "per_prompt": by_text.min(-1).values,
        "auto": online(texts, warm, ThroughputPolicy(*SIZES), sources, table),
        "auto_fitted": online(
            texts, warm, fitted_policy(corpus.fit, depth=SIZES[0], most_nodes=SIZES[2]), sources, table
        ),
        "predictable": corpus.predictable(sources, table),
        "oracle": oracle.best_seconds,
    }
    if sources == "both":
        first = [online([text], [], ThroughputPolicy(*SIZES), sources, table) for text in texts]
        columns["auto_first_call"] = torch.cat(first)
    plain, rows = by_text[:, grid.shapes.index(TreeShape.plain())], []
    for name in [*dict.fromkeys(corpus.benchmarks), "all"]:
        here = torch.tensor([name in (one, "all") for one in corpus.benchmarks])
        speeds = {column: float(plain[here].sum() / seconds[here].sum()) for column, seconds in columns.items()}
        speeds["best_fixed_here"] = float(plain[here].sum() / by_text[here].sum(0).min())
        rows.append({"benchmark": name, "texts": int(here.sum()), "fixed": str(grid[found]), **speeds})
    return rows


def ladder(corpus: Corpus, table: CostTable) -> dict[str, float]:
    """Speed with more and more signals, over all texts, in those of plain decoding."""
    only_plain = ActionGrid((TreeShape.plain(),))
    plain = Oracle(outcome_table(corpus.texts, only_plain, table)).fixed_seconds.sum()
    return {name: float(plain / corpus.predictable("both", table, signals).sum()) for name, signals in LADDER.items()}


def kept(row: dict[str, Any], of: str, policy: str = "auto_fitted", above: str = "best_fixed") -> str:
    """Share of a gain that a policy keeps; nothing where there is hardly any gain."""
    whole = row[of] - row[above]
    return f"{(row[policy] - row[of] + whole) / whole:.0%}" if whole > 0.03 else ""


def print_tables(results: list[dict[str, Any]]) -> None:
    titles = [column.replace("_", " ") for column in COLUMNS]
    shares = ["of predictable", "of oracle"]
    for result in results:
        fixed = result["rows"][-1]["fixed"]
        print(f"\n### {result['costs']}, temperature {result['temperature']}, {result['sources']}; fixed: `{fixed}`\n")
        print("| " + " | ".join(["benchmark", *titles, *shares]) + " |\n|---" + "|---:" * (len(titles) + 2) + "|")
        for row in result["rows"]:
            cells = [f"{row[column]:.2f}" if column in row else "" for column in COLUMNS]
            print("| " + " | ".join([row["benchmark"], *cells, kept(row, "predictable"), kept(row, "oracle")]) + " |")
        if "ladder" in result:
            print(
                "\nThe fitted model with one signal more each time: "
                + ", ".join(f"{name} {speed:.3f}" for name, speed in result["ladder"].items())
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recordings", type=Path, default=Path("work/recordings"))
    parser.add_argument("--costs", type=Path, nargs="+", default=[Path(file) for file in COSTS])
    parser.add_argument("--temperatures", nargs="+", default=["0", "1"], choices=["0", "1"])
    parser.add_argument("--sources", nargs="+", default=list(SOURCES), choices=SOURCES)
    parser.add_argument("--results", type=Path, default=RESULTS, help="added to")
    parser.add_argument("--print-only", action="store_true", help="print the tables of results that are there")
    args = parser.parse_args()
    tables = {} if args.print_only else read_tables(args.costs)
    for temperature in args.temperatures if tables else []:
        corpus = Corpus.load(args.recordings, temperature)
        for name, table in tables.items():
            for sources in args.sources:
                result = {"costs": name, "temperature": temperature, "sources": sources}
                result["fitted_to"], result["rows"] = len(corpus.fit), study(corpus, sources, table)
                if sources == "both":
                    result["ladder"] = ladder(corpus, table)
                add_result(result, args.results)
    print_tables(json.loads(args.results.read_text(encoding="utf-8"))["results"])


def add_result(result: dict[str, Any], file: Path) -> None:
    """Write it in place of the one of the same costs, temperature and sources."""
    known = json.loads(file.read_text(encoding="utf-8"))["results"] if file.is_file() else []
    kind = ("costs", "temperature", "sources")
    others = [one for one in known if [one[key] for key in kind] != [result[key] for key in kind]]
    results = sorted([*others, result], key=lambda one: [one[key] for key in kind])
    file.write_text(json.dumps({"results": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
