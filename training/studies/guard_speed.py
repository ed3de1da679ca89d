"""Time the guard where drafting cannot pay.

Question: what does the guard leave of plain decoding where drafting cannot pay?
Answer: at least 0.99x plain decoding, whatever drafts (SmolLM2, prompts in languages that the head never read; table
in docs/benchmarks.md). A policy that never drafts reaches 1.09x there: our plain steps have the faster attention.

    python -m training.studies.guard_speed TARGET HEAD --dataset prompts.jsonl --pack --dtype bfloat16
    python -m training.studies.guard_speed TARGET HEAD --dataset prompts.jsonl --sources mtp small --max-new-tokens 512

Method: two heads, an untrained one of HEAD's kind and HEAD itself; give prompts of a domain that it never read. Of
other `--sources` an MTP layer, and a model with a quarter of the target's layers, both with random weights. Two
policies that draft by the head alone, because lookups would earn what it loses: "auto", and EAGLE-3's 60/5/10, which
never hesitates. Each is new in every call, which is the worst case, or kept between calls.
"""

import argparse
import copy
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from transformers_resps import BaselineGuard, DraftHead, FixedPolicy, Policy, TreeShape
from transformers_resps.assistants import MtpConfig, MtpHead
from transformers_resps.policies.base import Observation
from transformers_resps.policies.throughput import ThroughputPolicy
from transformers_resps.verifying.prepacking import prepack

from .experiment import Experiment, add_options


class HeadAlone(ThroughputPolicy):
    """Drafts as "auto" does, without prompt lookup."""

    uses_lookup = False

    def choose(self, observation: Observation) -> TreeShape:
        return super().choose(replace(observation, prefix_accept_probs=list))


POLICIES: dict[str, Callable[[], Policy]] = {
    "ours": HeadAlone,
    "60/5/10": lambda: FixedPolicy(TreeShape.from_eagle(60, 5, 10)),
    "never drafts": lambda: FixedPolicy(TreeShape.plain()),
}
UNTRAINED, GIVEN = "untrained", "given"
KINDS = ("head", "mtp", "small")
SMALL_SHARE = 4  # of the target's layers a small model has one in so many


@dataclass(frozen=True, slots=True)
class GuardTiming:
    """One prompt, decoded plainly and guarded one after the other."""

    head: str
    policy: str
    kept: bool
    prompt: int
    plain_tokens: int
    plain_seconds: float
    tokens: int
    seconds: float
    tau: float


def untrained(target: Any, head: DraftHead) -> DraftHead:
    """Make a head of the same sizes with random weights; its embedding and vocabulary are real."""
    torch.manual_seed(0)
    made = DraftHead.from_target(
        target, draft_token_ids=head.draft_token_ids, feature_layers=head.config.feature_layers
    )
    return made.eval()


def untrained_mtp(target: Any) -> MtpHead:
    """Make an MTP layer with random weights."""
    torch.manual_seed(0)
    return MtpHead(MtpConfig(), target).to(target.device, target.dtype).eval()


def untrained_model(target: Any) -> PreTrainedModel:
    """Make a small model of the target's class, with random weights."""
    config = copy.deepcopy(target.config)
    config.num_hidden_layers = max(config.num_hidden_layers // SMALL_SHARE, 1)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    torch.manual_seed(0)
    made: Any = AutoModelForCausalLM.from_config(config, dtype=target.dtype)
    return made.to(target.device).eval()


def sources_of(given: Experiment, kinds: Sequence[str]) -> dict[str, Any]:
    """What drafts, by the name of its rows."""
    found: dict[str, Any] = {}
    if "head" in kinds:
        found |= {UNTRAINED: untrained(given.target, given.head), GIVEN: given.head}
    if "mtp" in kinds:
        found["untrained MTP layer"] = untrained_mtp(given.target)
    if "small" in kinds:
        found["untrained small model"] = untrained_model(given.target)
    return found


def settings(sources: Iterable[str]) -> list[tuple[str, str, bool]]:
    """Source, policy, and whether the policy is kept between calls."""
    names = list(sources)
    found = [(name, policy, kept) for name in names for policy in ("ours", "60/5/10") for kept in (False, True)]
    return found + [(names[-1], "never drafts", True)]


def timed(target: Any, prompt: Tensor, max_new_tokens: int, **speculation: Any) -> tuple[int, float, float]:
    """Time one greedy call: new tokens, seconds, and tokens per forward."""
    started = time.perf_counter()
    out = target.generate(
        prompt[None],
        attention_mask=torch.ones_like(prompt[None]),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        return_dict_in_generate=True,
        **speculation,
    )
    seconds = time.perf_counter() - started
    tau = out.speculation.tau if speculation else 1.0
    return out.sequences.shape[1] - len(prompt), seconds, tau


def measure(given: Experiment, sources: dict[str, Any], max_new_tokens: int, repeats: int) -> list[GuardTiming]:
    """Time every setting and prompt, with plain decoding right before or after, in turn."""
    timed(given.target, given.prompts[0], max_new_tokens)
    found = []
    for name, policy_name, kept in settings(sources):
        make = POLICIES[policy_name]
        policy = BaselineGuard(make())
        for repeat in range(repeats):
            for number, prompt in enumerate(given.prompts):
                policy = policy if kept else BaselineGuard(make())
                ways = [{}, {"assistant_model": sources[name], "policy": policy}]
                order = (0, 1) if (number + repeat) % 2 == 0 else (1, 0)
                got = {way: timed(given.target, prompt, max_new_tokens, **ways[way]) for way in order}
                found.append(GuardTiming(name, policy_name, kept, number, *got[0][:2], *got[1]))
    return found


def table(runs: Sequence[GuardTiming]) -> list[dict[str, Any]]:
    """One row for each setting: the ratio to plain decoding, and tau."""
    rows = []
    for key in dict.fromkeys((run.head, run.policy, run.kept) for run in runs):
        own = [run for run in runs if (run.head, run.policy, run.kept) == key]
        plain = sum(run.plain_tokens for run in own) / sum(run.plain_seconds for run in own)
        guarded = sum(run.tokens for run in own) / sum(run.seconds for run in own)
        tau = sum(run.tau for run in own) / len(own)
        rows.append(
            dict(zip(("head", "policy", "kept"), key, strict=True)) | {"to_plain": guarded / plain, "tau": tau}
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "results/guard")
    parser.add_argument("--sources", nargs="+", choices=KINDS, default=["head"], help="what drafts; default: head")
    args = parser.parse_args()
    given = Experiment.load(args)
    sources = sources_of(given, args.sources)
    if args.pack:
        for name in sources.keys() - {GIVEN}:
            prepack(sources[name])
    runs = measure(given, sources, args.max_new_tokens, args.repeats)
    given.report(args, table(runs), runs)


if __name__ == "__main__":
    main()
