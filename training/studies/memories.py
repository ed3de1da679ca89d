r"""Draft with a head, with what a memory holds of answers to other prompts, and with both.

Question: what does a memory of earlier answers add to prompt lookup, and to a head?
Answer: with 200 answers to other questions lookup writes 2.64 tokens per forward in place of 1.78, and with 20 of them
2.34, with at most eight nodes: nearly as many as the head alone, 2.85. Beside the head a memory adds next to nothing:
"auto" gets 3.08 tokens in place of 3.05, 2.58x plain decoding in place of 2.56x, and no less with a memory of random
or misleading texts: what the head does not propose either is hardly ever right, one node in 200 (SmolLM2, 16 questions
of GSM8K, greedy).

    python -m training.studies.memories work/smollm2 model_cards/smollm2-135m-instruct-head \
        --dataset eval/gsm8k.jsonl --remember gsm8k_train.jsonl --limit 16 --output work/memories

Method: greedy answers are written once and kept in the output folder. The head's pools are recorded at every position,
and every way to draft is replayed on the same texts. Nothing is timed: "auto" weighs nodes by the costs of a quiet
machine. A memory is empty or holds answers to prompts that are not evaluated, whose own answers never enter it.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from training.prompts.batched_answers import answer
from training.prompts.recordings import read_prompts
from transformers_resps import FixedPolicy, Policy, SuffixMemory, TreeShape
from transformers_resps.policies.costs import CostTable
from transformers_resps.policies.guard import BaselineGuard
from transformers_resps.policies.throughput import ThroughputPolicy
from transformers_resps.replay import RecordedText, record_pools, replay_policy
from transformers_resps.tools.cli import positive

from .experiment import Experiment, add_options, execute
from .headroom import COSTS
from .step_costs import read_tables


DEPTH, TOP_K, NODES = 3, 3, 8
HEAD, LOOKUP = TreeShape(NODES + 1, DEPTH, TOP_K), TreeShape(1, 0, 1, NODES)
BOTH = TreeShape(NODES // 2 + 1, DEPTH, TOP_K, NODES // 2)
WAYS: dict[str, Callable[[], Policy]] = {  # at most eight nodes beside the root in each
    "head": lambda: FixedPolicy(HEAD),
    "lookup": lambda: FixedPolicy(LOOKUP),
    "head and lookup": lambda: FixedPolicy(BOTH),
    "auto": lambda: BaselineGuard(ThroughputPolicy(DEPTH, TOP_K, 2 * NODES)),
}


@dataclass(frozen=True, slots=True)
class Replayed:
    """One way over all texts."""

    way: str
    remembered: int  # answers
    forwards: int
    tokens: int
    nodes: int  # beside the roots
    by_source: dict[str, int]  # accepted tokens
    seconds: float  # as the costs have them


def replay(texts: list[RecordedText], way: str, remembered: list[list[int]], costs: CostTable) -> Replayed:
    """Every text by a policy that keeps what it learns, as one memory would be used."""
    memory, policy = SuffixMemory(), WAYS[way]()
    memory.add(remembered)
    reports = [replay_policy(text, policy, costs, [memory]) for text in texts]
    steps = [step for report in reports for step in report.steps]
    accepted = [report.accepted_by_source._asdict() for report in reports]
    return Replayed(
        way,
        len(remembered),
        len(steps),
        sum(step.emitted_total for step in steps),
        sum(step.verified - 1 for step in steps),
        {source: sum(one[source] for one in accepted) for source in accepted[0]},
        sum(step.step_seconds for step in steps),
    )


def answers_of(file: Path, target: Any, prompts: list[list[int]], most_tokens: int) -> list[list[int]]:
    """Greedy answers, of which a file keeps those that are known."""
    known: dict[str, list[int]] = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    missing = sorted((prompt for prompt in prompts if str(prompt) not in known), key=len)
    for start in range(0, len(missing), 16):
        batch = missing[start : start + 16]
        known |= zip(map(str, batch), answer(target, None, batch, 0.0, most_tokens, seed=0), strict=True)
        file.write_text(json.dumps(known), "utf-8")
    return [known[str(prompt)] for prompt in prompts]


def run(args: argparse.Namespace) -> int:
    experiment = Experiment.load(args)
    target, head = experiment.target, experiment.head
    args.output.mkdir(parents=True, exist_ok=True)
    others = read_prompts(str(args.remember), AutoTokenizer.from_pretrained(args.target), args.remembered, 512)
    evaluated, remembered = (
        (prompts, answers_of(args.output / "answers.json", target, prompts, args.max_new_tokens))
        for prompts in ([prompt.tolist() for prompt in prompts] for prompts in (experiment.prompts, others))
    )
    texts = [
        record_pools(target, head, torch.tensor(prompt + own), len(prompt), depths={TOP_K: DEPTH})
        for prompt, own in zip(*evaluated, strict=True)
        if len(own) > 1
    ]
    costs = next(iter(read_tables(list(map(Path, COSTS))).values()))
    sizes = [0, len(others) // 10, len(others)]
    runs = [replay(texts, way, remembered[1][:size], costs) for way in WAYS for size in sizes]
    plain = sum(costs.step_seconds(TreeShape.plain(), text.prompt_length) * len(text) for text in texts)
    rows = [
        {
            "way": one.way,
            "answers remembered": one.remembered,
            "tokens per forward": one.tokens / one.forwards,
            "nodes per forward": one.nodes / one.forwards,
            "from the memory": one.by_source["memory"] / one.tokens,
            "plain seconds over own": plain / one.seconds,
        }
        for one in runs
    ]
    experiment.report(args, rows, runs)
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "work/memories")
    parser.add_argument(
        "--remember", type=Path, required=True, help="prompts of the same kind, none of them evaluated"
    )
    parser.add_argument("--remembered", type=positive, default=200, help="answers that a full memory holds")
    return execute(parser, arguments, run)


if __name__ == "__main__":
    raise SystemExit(main())
