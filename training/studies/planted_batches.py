r"""Compare policies in batches where each forward costs what a formula says.

Question: what do policies gain in ragged batches, apart from the noise of the machine?
Answer: `auto` reaches 2.44x plain decoding at batch size 1, 1.96x at 2, 1.57x at 4 and 1.23x at 8. Chains of one to
three drafted tokens reach less, and at batch size 8 as much (SmolLM2, GSM8K; docs/benchmarks.md).

    python -m training.studies.planted_batches work/smollm2 model_cards/smollm2-135m-instruct-head --pack \
        --dtype bfloat16 --dataset gsm8k.jsonl --limit 16 --output work/planted

Method: real texts, but a clock that goes on by the price of each forward and stands still otherwise. Timed batches
differ by a tenth from run to run on a shared machine, and policies learn from such times. Prompts cost nothing.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

from torch import Tensor

from transformers_resps import FixedPolicy, Policy, SpeculationReport, TreeShape
from transformers_resps.decoding.loop import TreeDecoding
from transformers_resps.decoding.proposal import Proposal
from transformers_resps.generation import decode
from transformers_resps.generation.output import left_padded
from transformers_resps.policies.auto import default_policy
from transformers_resps.tree import DraftTree
from transformers_resps.verifying.forward import Features
from transformers_resps.verifying.growing import TreeVerifier

from .experiment import Experiment, add_options


# Milliseconds on two Zen 4 cores in a quiet moment, SmolLM2 in bfloat16, prepacked: its linear layers by rows of a
# forward; of attention after 250 positions, for each row of the batch; all that depends on neither; the head.
LINEAR = {1: 17.0, 4: 17.4, 8: 17.9, 16: 21.4, 24: 26.8, 32: 31.7, 48: 43.7, 64: 51.7}
ATTENTION, MASKED, FURTHER_NODE, REST = 1.0, 0.35, 0.25, 14.0
READING, LEVEL = (2.0, 0.2), (2.5, 0.1)  # the head's, and more for each row
POLICIES: dict[str, Callable[[], Policy]] = {
    "plain": lambda: FixedPolicy(TreeShape.plain()),
    "auto": default_policy,
    "2/1/1": lambda: FixedPolicy(TreeShape(2, 1, 1)),
    "3/2/1": lambda: FixedPolicy(TreeShape(3, 2, 1)),
    "4/3/1": lambda: FixedPolicy(TreeShape(4, 3, 1)),
}


def verify_seconds(rows: int, nodes: int) -> float:
    """Of a forward over `nodes` in each of `rows`; beyond 64 in all as much for each as between 48 and 64."""
    forwarded, sizes = rows * nodes, list(LINEAR)
    low, high = next((pair for pair in zip(sizes, sizes[1:], strict=False) if forwarded <= pair[1]), sizes[-2:])
    linear = LINEAR[low] + (forwarded - low) / (high - low) * (LINEAR[high] - LINEAR[low])
    attention = rows * ATTENTION * (1.0 + FURTHER_NODE * (nodes - 1)) + (rows * MASKED if nodes > 1 else 0.0)
    return (REST + linear + attention) / 1e3


def draft_seconds(rows: int, levels: int) -> float:
    """Of reading what was committed, and of the levels after the first, which that gives."""
    return (READING[0] + READING[1] * rows + (levels - 1) * (LEVEL[0] + LEVEL[1] * rows)) / 1e3


class PlantedClock:
    """Seconds that the caller adds."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class PricedDecoding(TreeDecoding):
    """Decodes as ever, and pays for drafting on `clock`."""

    def __init__(self, *args: Any, clock: PlantedClock, **options: Any) -> None:
        super().__init__(*args, clock=clock, **options)
        self._planted = clock

    def _propose(self) -> Proposal:
        proposal = super()._propose()
        if proposal.pool is not None:
            levels = int(proposal.pool.levels[-1])
            self._planted.now += draft_seconds(len(proposal.pool.tokens), levels)
        return proposal


class PricedVerifier(TreeVerifier):
    """Verifies as ever, and pays for it on `clock`."""

    def __init__(self, *args: Any, clock: PlantedClock) -> None:
        super().__init__(*args)
        self._clock = clock

    def verify(self, tree: DraftTree) -> tuple[Tensor, Features]:
        self._clock.now += verify_seconds(*tree.tokens.shape)
        return super().verify(tree)


def planted(clock: PlantedClock) -> list[tuple[ModuleType, str, Any]]:
    """What `generate` is to decode with: where it is named, its name there, and what takes its place."""
    return [
        (decode, "TreeDecoding", partial(PricedDecoding, clock=clock)),
        (decode, "TreeVerifier", partial(PricedVerifier, clock=clock)),
    ]


@dataclass(frozen=True, slots=True)
class GroupTiming:
    """One group of prompts decoded once; `seconds` are planted."""

    policy: str
    batch_size: int
    group: int
    tokens: int
    steps: int
    seconds: float


def measure(given: Experiment, size: int, max_new_tokens: int) -> list[GroupTiming]:
    """All groups of a size by every policy, which learns on from group to group."""
    groups = [given.prompts[start : start + size] for start in range(0, len(given.prompts) - size + 1, size)]
    found = []
    for name, make in POLICIES.items():
        policy = make()
        for number, group in enumerate(groups):
            ids, mask = left_padded(group)
            options: dict[str, Any] = {
                "assistant_model": given.head,
                "policy": policy,
                "return_dict_in_generate": True,
            }
            report: SpeculationReport = given.target.generate(
                ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, **options
            ).speculation
            found.append(GroupTiming(name, size, number, report.emitted_total, len(report.steps), report.seconds))
    return found


def table(runs: list[GroupTiming]) -> list[dict[str, Any]]:
    """Of each size and policy the tokens a second, and those over plain decoding's."""
    rates: dict[tuple[int, str], float] = {}
    for place in dict.fromkeys((run.batch_size, run.policy) for run in runs):
        own = [run for run in runs if (run.batch_size, run.policy) == place]
        rates[place] = sum(run.tokens for run in own) / sum(run.seconds for run in own)
    return [
        {"batch_size": size, "policy": name, "tokens_per_second": rate, "to_plain_batch": rate / rates[size, "plain"]}
        for (size, name), rate in rates.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "results/planted")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 4, 8])
    args = parser.parse_args()
    given = Experiment.load(args)
    for place, name, made in planted(PlantedClock()):
        setattr(place, name, made)
    runs = [run for size in args.batch_sizes for run in measure(given, size, args.max_new_tokens)]
    given.report(args, table(runs), runs)


if __name__ == "__main__":
    main()
