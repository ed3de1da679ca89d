r"""Ablate Re-SpS on recorded texts: as published, repaired, and tuned to a domain.

Question: what makes Re-SpS slow as published, what repairs it, and what does tuning it to a domain gain?
Answer: as published it is slower than the best fixed tree (1.64x plain decoding against 1.84x, SmolLM2, head alone).
Repaired, it equals the best fixed tree (1.82x): it takes the likeliest action, normalises its features and pays for
drafting in the reward. Objective, state and form of the reward change nothing beyond noise. Training on one domain
gains there and loses on the others. All figures: `HEADROOM.md`.

    python -m training.studies.ablations --recordings work/recordings

Method: replays greedy answers that `training/prompts/recordings.py` recorded, with a cost table as the clock, so every
variant meets the same texts. Each is trained on `fit/` and scored on `evaluate/` in the way it would be used. The
state from text needs `pip install transformers-resps[ablations]`; without it those rows are left out.
"""

import argparse
import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from transformers_resps import TreeShape
from transformers_resps.policies.action_grid import ActionGrid
from transformers_resps.policies.costs import CostTable
from transformers_resps.policies.resps import ReSpSConfig, ReSpSPolicy
from transformers_resps.replay.recorded_text import RecordedText
from transformers_resps.trainers import PolicyTrainingConfig, ReplayRollouts, RolloutTrainer

from .experiment import print_table
from .headroom import COSTS, load_folder
from .step_costs import outcome_table, read_tables
from .text_state import embeds_text, seen_as, text_states


# The published actions start at 32 nodes, where a step costs two plain ones here: all variants pick from small trees.
GRID = ActionGrid.small()
PPO = {"num_ppo_epochs": 4, "num_mini_batches": 2, "max_steps": 240}
FULL = {"num_ppo_epochs": 1, "num_mini_batches": 4, "max_steps": 240}
LEARNING_RATE = 1e-3  # published 3e-4; these are short trainings


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to train and to use a Re-SpS policy.

    Attributes:
        objective: see `PolicyTrainingConfig`.
        reward: see `PolicyTrainer`.
        persistence: steps of a decision in training.
        in_use: steps of a decision in use.
        is_paper: raw features and drawn actions, as published.
        pays_drafting: whether the reward counts drafting as time; what is scored always does.
        state: `features`, or `text`.
    """

    objective: str = "full_information"
    reward: str = "tokens_per_second"
    persistence: int = 1
    in_use: int = 1
    is_paper: bool = False
    pays_drafting: bool = True
    state: str = "features"


PAPER = Variant("max_entropy_ppo", "mean_rate", persistence=10, in_use=30, is_paper=True)
REPAIRED = Variant()
VARIANTS = {
    "as published: drafting unpaid": replace(PAPER, pays_drafting=False),
    "as published, drafting paid": PAPER,
    "as published, PPO": replace(PAPER, objective="ppo"),
    "as published, text state": replace(PAPER, state="text"),
    "repaired: full information": REPAIRED,
    "repaired, PPO": replace(REPAIRED, objective="ppo"),
    "repaired, maximum entropy": replace(REPAIRED, objective="max_entropy_ppo"),
    "repaired, text state": replace(REPAIRED, state="text"),
    "repaired, drafting unpaid": replace(REPAIRED, pays_drafting=False),
    "repaired, mean rate": replace(REPAIRED, reward="mean_rate"),
    **{f"repaired, held {n}": replace(REPAIRED, persistence=min(n, 10), in_use=n) for n in (5, 10, 30, 50)},
}


def without_drafting(table: CostTable) -> CostTable:
    """The costs that the code of Re-SpS times: drafting is free."""
    return replace(table, draft={}, draft_start={})


def train(variant: Variant, rollouts: ReplayRollouts, seed: int = 0) -> ReSpSPolicy:
    """Train a policy on replayed texts, over their trees."""
    width = rollouts.table.features.shape[1]
    use = {"grid": rollouts.table.grid, "persistence": variant.in_use}
    config = ReSpSConfig.paper(width, **use) if variant.is_paper else ReSpSConfig(width, **use)
    policy = ReSpSPolicy(config, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        args = PolicyTrainingConfig(
            output_dir=folder,
            objective=variant.objective,
            persistence=variant.persistence,
            per_device_train_batch_size=8,
            learning_rate=LEARNING_RATE,
            logging_steps=1000,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            seed=seed,
            **(FULL if variant.objective == "full_information" else PPO),
        )
        RolloutTrainer(policy, args, rollouts, reward_func=variant.reward).train()
    return policy


def score(policy: ReSpSPolicy, scored: ReplayRollouts) -> tuple[torch.Tensor, int]:
    """Return the seconds of each text `[texts]` as in use, and how many actions were used."""
    use, seconds, used = policy.config, [], set()
    generator = torch.Generator().manual_seed(0) if use.sample else None
    for text in range(len(scored.table)):
        taken = scored.follow(policy, torch.tensor([text]), use.persistence, generator, temperature=use.temperature)
        seconds.append(float(taken.outcomes.seconds.sum()))
        used |= set(taken.actions.tolist())
    return torch.tensor(seconds, dtype=torch.float64), len(used)


@dataclass(frozen=True, slots=True)
class Corpus:
    """Greedy recordings by the name of their folder."""

    fit: dict[str, list[RecordedText]]
    evaluate: dict[str, list[RecordedText]]

    @classmethod
    def load(cls, recordings: Path) -> "Corpus":
        parts = [
            {folder.name: load_folder(folder) for folder in sorted((recordings / kind / "0").iterdir())}
            for kind in ("fit", "evaluate")
        ]
        return cls(*parts)

    @property
    def fitting(self) -> list[RecordedText]:
        return [text for texts in self.fit.values() for text in texts]

    @property
    def scored(self) -> list[RecordedText]:
        return [text for texts in self.evaluate.values() for text in texts]

    def speeds(self, seconds: torch.Tensor, plain: torch.Tensor) -> dict[str, float]:
        """Return the ratios to plain decoding, by benchmark and over all."""
        names = [name for name, texts in self.evaluate.items() for _ in texts]
        masks = {name: torch.tensor([name == one for one in names]) for name in self.evaluate}
        masks["all"] = torch.ones(len(names), dtype=torch.bool)
        return {name: float(plain[mask].sum() / seconds[mask].sum()) for name, mask in masks.items()}


def ablate(corpus: Corpus, costs: CostTable) -> list[dict[str, Any]]:
    """Train and score every variant: one row each, fixed trees first."""
    scored = outcome_table(corpus.scored, GRID, costs)
    held_out, rows = ReplayRollouts(scored), []
    fixed = held_out.oracle.fixed_seconds
    plain = fixed[:, GRID.shapes.index(TreeShape.plain())]
    tables = {
        paid: outcome_table(corpus.fitting, GRID, costs if paid else without_drafting(costs)) for paid in (True, False)
    }
    best = ReplayRollouts(tables[True]).oracle.best_fixed
    rows.append({"variant": f"best fixed {GRID[best]}", "actions": 1, **corpus.speeds(fixed[:, best], plain)})
    rows.append({"variant": "oracle", **corpus.speeds(held_out.oracle.best_seconds, plain)})
    states = [text_states(texts) for texts in (corpus.fitting, corpus.scored)] if embeds_text() else []
    for name, variant in VARIANTS.items():
        fitting, judged = tables[variant.pays_drafting], scored
        if variant.state == "text":
            if not states:
                continue
            fitting, judged = seen_as(fitting, states[0]), seen_as(scored, states[1])
        policy = train(variant, ReplayRollouts(fitting))
        seconds, used = score(policy, ReplayRollouts(judged))
        rows.append({"variant": name, "actions": used, **corpus.speeds(seconds, plain)})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def tune(corpus: Corpus, costs: CostTable) -> list[dict[str, Any]]:
    """Train on each domain and score on all: what it adds there and costs elsewhere."""
    held_out, rows = ReplayRollouts(outcome_table(corpus.scored, GRID, costs)), []
    plain = held_out.oracle.fixed_seconds[:, GRID.shapes.index(TreeShape.plain())]
    for name, texts in {**corpus.fit, "both": corpus.fitting}.items():
        table = outcome_table(texts, GRID, costs)
        seconds, used = score(train(REPAIRED, ReplayRollouts(table)), held_out)
        rows.append({"trained on": name, "texts": len(texts), "actions": used, **corpus.speeds(seconds, plain)})
        best = ReplayRollouts(table).oracle.best_fixed
        fixed = corpus.speeds(held_out.oracle.fixed_seconds[:, best], plain)
        rows.append({"trained on": f"{name}: best fixed {GRID[best]}", "texts": len(texts), "actions": 1, **fixed})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recordings", type=Path, default=Path("work/recordings"))
    parser.add_argument("--costs", type=Path, default=Path(COSTS[0]))
    parser.add_argument("--results", type=Path, default=Path("training/studies/measurements/headroom/ablations.json"))
    parser.add_argument("--print-only", action="store_true", help="print the tables of results that are there")
    args = parser.parse_args()
    if not args.print_only:
        corpus = Corpus.load(args.recordings)
        (costs,) = read_tables([args.costs]).values()
        results = {"ablations": ablate(corpus, costs), "domain": tune(corpus, costs)}
        args.results.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for rows in json.loads(args.results.read_text(encoding="utf-8")).values():
        print_table(rows)


if __name__ == "__main__":
    main()
