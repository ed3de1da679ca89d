r"""Replay "auto" under clocks with planted noise.

Question: what does "auto" lose to slow moments of the machine, from whose seconds it learns costs?
Answer: at most 0.03 of a ratio of 1.3 to 2.3, with slow stretches or with 2 in 100 forwards that take five times as
long (`HEADROOM.md`).

    python -m training.studies.noisy_clocks --recordings work/recordings/fit/0 \
        --costs model_cards/smollm2-135m-instruct-head/results.json --output noisy_clocks.json

Method: replays recorded texts under a clock with planted noise. The policy sees noisy seconds, and its score is in the
true ones of the cost table, so only its decisions differ. Ratios to plain steps without prefill, over several orders
of the texts; one policy for all texts of an order.
"""

import argparse
import json
import math
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers_resps import BaselineGuard, FixedPolicy, Policy, TreeShape
from transformers_resps.policies.costs import CostModel, CostTable
from transformers_resps.policies.throughput import ThroughputPolicy
from transformers_resps.replay import RecordedText, replay_policy

from .headroom import load_folder
from .step_costs import read_tables


@dataclass(frozen=True, slots=True)
class Noise:
    """Of the logarithm of a step's seconds.

    Attributes:
        jitter: standard deviation of what changes from step to step.
        slowness: of what lasts.
        memory: correlation of the latter from step to step.
        interrupted: share of forwards that take `INTERRUPTION` times as long.
    """

    jitter: float
    slowness: float = 0.0
    memory: float = 0.0
    interrupted: float = 0.0


INTERRUPTION = 5.0
NOISES = {
    "quiet": Noise(0.02),
    "slow stretches": Noise(0.07, 0.16, 0.98),
    "slower stretches": Noise(0.07, 0.25, 0.97),
    "interruptions": Noise(0.06, 0.06, 0.9, 0.02),
}
POLICIES: dict[str, Callable[[], Policy]] = {
    "auto": lambda: BaselineGuard(ThroughputPolicy()),
    "auto, unguarded": ThroughputPolicy,
    "chain of six, guarded": lambda: BaselineGuard(FixedPolicy(TreeShape(7, 6, 1))),
}


class NoisyClock(CostModel):
    """Prices of a table as a policy sees them on a noisy machine; `seconds` are the true ones so far."""

    def __init__(self, table: CostTable, noise: Noise, seed: int) -> None:
        self._table, self._noise, self._random = table, noise, random.Random(seed)
        self._slowness, self._factor = 0.0, 1.0
        self.overhead, self.seconds = table.overhead, 0.0

    def verify_seconds(self, nodes: int, context: int) -> float:
        noise, true = self._noise, self._table.verify_seconds(nodes, context)
        fresh = math.sqrt(1.0 - noise.memory**2) * noise.slowness
        self._slowness = noise.memory * self._slowness + self._random.gauss(0.0, fresh)
        self._factor = math.exp(self._slowness + self._random.gauss(0.0, noise.jitter))
        self.seconds += true + self.overhead
        return true * self._factor * (INTERRUPTION if self._random.random() < noise.interrupted else 1.0)

    def draft_seconds(self, width: int, levels: int) -> float:
        true = self._table.draft_seconds(width, levels)
        self.seconds += true
        return true * self._factor


def speed(texts: list[RecordedText], table: CostTable, noise: Noise, make: Callable[[], Policy], orders: int) -> float:
    """True seconds of plain steps over those of the policy, all texts in all orders."""
    plain = seconds = 0.0
    for seed in range(orders):
        clock, policy = NoisyClock(table, noise, seed), make()
        for text in random.Random(seed).sample(texts, len(texts)):
            replay_policy(text, policy, clock)
            places = range(text.prompt_length, text.prompt_length + len(text))
            plain += sum(table.verify_seconds(1, place) + table.overhead for place in places)
        seconds += clock.seconds
    return plain / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recordings", type=Path, nargs="+", required=True, help="folders of one target's texts")
    parser.add_argument("--costs", type=Path, required=True, help="a results.json, or a file of cost tables")
    parser.add_argument("--orders", type=int, default=6)
    parser.add_argument("--output", type=Path, default=Path("work/noisy_clocks.json"))
    args = parser.parse_args()
    table = next(iter(read_tables([args.costs]).values()))
    rows: list[dict[str, Any]] = []
    for folder in args.recordings:
        texts = load_folder(folder)
        for name, make in POLICIES.items():
            speeds = {noise: speed(texts, table, NOISES[noise], make, args.orders) for noise in NOISES}
            rows.append({"recordings": str(folder), "texts": len(texts), "policy": name, "speeds": speeds})
            print(folder, name, {noise: round(value, 3) for noise, value in speeds.items()}, flush=True)
    noises = {name: asdict(noise) for name, noise in NOISES.items()}
    facts = {"costs": str(args.costs), "orders": args.orders, "noises": noises, "rows": rows}
    args.output.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
