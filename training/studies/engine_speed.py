"""Measure the engine alone: how much of tau becomes speed, eager and compiled, at a tau that is planted.

Question: what part of the mean acceptance length (tau) becomes speed, against plain decoding eager and compiled? What
part where three of four layers are recurrent?
Answer: on two cores, compiled Llamas of 0.1B and 1B keep 0.41 to 0.90 of tau, `auto` 0.69 to 0.87; each level reads a
head that is a sixth, or a ninth, of the target. On a hybrid of 0.15B with gated delta nets, on a CPU and at
tau 2.3, a compiled chain is 1.4 times as fast as compiled plain decoding, which is 2.35 times as fast as eager; eager
chains gain a little, and trees, which were read path by path then, nothing.

    python -m training.studies.engine_speed --shape 0.1b 1b --tau 2 3 4 --dtype bfloat16
    python -m training.studies.engine_speed --shape 0.1b-gdn 0.1b-mamba2 --tau 2.5 --trees 6,3,2 --dtype float32
    python -m training.studies.engine_speed --shape tiny --tau 2 --eager --accept-noise --max-new-tokens 32

Method: targets of random weights (`random_target`) and, rigged to each tau (`rigged_head`), a head that drafts as a
trained one of EAGLE-3's sizes does, and is right as often as tau needs. Greedy, one prompt at a time, every way in
turn, total tokens over total seconds. Chains draft `2 tau - 1` tokens; trees are as deep, yield what their first chain
yields, and show what width costs. Prompt lookup never finds a match in these texts: its row shows what looking costs.
`auto` meets the same heads, and is not held to a tau. A first pass, which compiles, is thrown away. Where layers are
recurrent, Transformers has no prompt lookup.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.utils.logging import tqdm

from transformers_resps import DraftHead, TreeShape, attach
from transformers_resps.tools.cli import device, positive, shape
from transformers_resps.tools.loading import default_device
from transformers_resps.tools.methods import (
    Bench,
    Generate,
    Prompt,
    compiled,
    fixed_tree,
    plain,
    plain_steps,
    policies,
    prompt_lookup,
)
from transformers_resps.tools.quiet import checked_load
from transformers_resps.tools.results import AnswerTiming, plain_spread, summarise
from transformers_resps.verifying.hybrids import is_recurrent
from transformers_resps.verifying.prepacking import prepack

from .experiment import execute, report
from .random_target import SHAPES, following, random_target
from .rigged_head import hit_rate_for, rigged_head


DRAFT_VOCABULARY = 32_000  # as EAGLE-3 publishes its heads
_WARM_UP = 64  # tokens of a prompt: one code serves longer ones


class Way(NamedTuple):
    """A method, and the tau that its head is rigged to; `None` for what drafts without one, or its own trees."""

    method: Generate
    tau: float | None = None


def chain_of(tau: float) -> TreeShape:
    """The chain that yields `tau` at a middling rate."""
    return TreeShape(round(2 * tau), round(2 * tau) - 1, 1)


def tree_of(tau: float, device: str) -> TreeShape:
    """A tree as deep as the chain of `tau`, and wide."""
    depth = chain_of(tau).depth
    return TreeShape(16, depth, 4) if device == "cpu" else TreeShape(60, depth, 10)


def ways_of(
    heads: dict[float, DraftHead], shapes: dict[float, Sequence[TreeShape]], *, compiles: bool, looks_up: bool = True
) -> list[Way]:
    """Every way, in the order of the table.

    Args:
        heads: tau -> the head that is rigged to it.
        shapes: tau -> what that head drafts.
        compiles: whether ours are also decoded with, compiled.
        looks_up: whether Transformers' prompt lookup takes the target.
    """
    found = [
        Way(plain()),
        *([Way(compiled(plain_steps()))] if compiles else []),
        *([Way(prompt_lookup())] if looks_up else []),
    ]
    for tau, head in heads.items():
        own = [(fixed_tree(head, shape), tau) for shape in shapes[tau]]
        own += [(auto, None) for auto in policies(head, {"auto": "auto"})]
        for method, planted in own:
            named = Generate(f"{method.name}, tau {tau:g}", method.keywords)
            found += [Way(one, planted) for one in ([named, compiled(named)] if compiles else [named])]
    return found


@dataclass(frozen=True, slots=True)
class EngineRun:
    """One text decoded once.

    Attributes:
        model: of `SHAPES`.
        planted: the tau of the way.
        timing: names the way.
        same: whether the text is that of plain decoding.
    """

    model: str
    planted: float | None
    timing: AnswerTiming
    same: bool


def rig(target: Any, texts: Sequence[Tensor], tau: float, draft_vocabulary: int) -> DraftHead:
    """Make a head whose chain of `tau` yields as much on `texts`."""
    hit_rate, vocab_size = hit_rate_for(tau, chain_of(tau).depth), target.config.vocab_size
    size, tokens = min(draft_vocabulary, vocab_size), torch.cat(list(texts))
    return rigged_head(target, following(vocab_size), hit_rate, tokens=tokens, draft_vocab_size=size).head


@dataclass(frozen=True, slots=True)
class EngineBench:
    """Decodes every prompt in every way, in turn.

    Args:
        model: of `SHAPES`.
        bench: of the target.
        ways: plain decoding first.
        texts: `[s]` each, the prompts of one length and their plain continuations.
        prompt_tokens: of each text.
        not_compiled: why nothing is compiled; `None` where it is.
    """

    model: str
    bench: Bench
    ways: Sequence[Way]
    texts: Sequence[Tensor]
    prompt_tokens: int
    not_compiled: str | None = None

    @classmethod
    def prepare(cls, args: argparse.Namespace, model: str) -> "EngineBench":
        """Make a target of the shape `model`, let it write the texts, and rig its heads."""
        target: Any = random_target(model, getattr(torch, args.dtype), args.device)
        bench = Bench(attach(prepack(target) if args.pack else target), args.max_new_tokens)
        random = torch.Generator().manual_seed(0)
        size = (args.limit, args.prompt_tokens)
        prompts = [
            Prompt(f"random/{number}", ids)
            for number, ids in enumerate(torch.randint(1, target.config.vocab_size, size, generator=random))
        ]
        short = replace(prompts[0], input_ids=prompts[0].input_ids[:_WARM_UP])
        reason = "Left out by --eager." if args.eager else bench.compile_refusal(short)
        texts = [torch.cat([prompt.input_ids, bench.decode(prompt, plain()).token_ids]) for prompt in prompts]
        heads = {tau: rig(target, texts, tau, args.draft_vocabulary) for tau in args.tau}
        shapes = {tau: [chain_of(tau), *(args.trees or [tree_of(tau, args.device)])] for tau in args.tau}
        ways = ways_of(heads, shapes, compiles=reason is None, looks_up=not is_recurrent(target))
        return cls(model, bench, ways, texts, args.prompt_tokens, reason)

    def run(self, repeats: int) -> Iterator[EngineRun]:
        """Yield the runs, beginning each prompt with another way; those of repeat -1 warm up and compile."""
        for way in self.ways:
            yield self._decode(way, 0, -1, most=_WARM_UP)
        for repeat in range(repeats):
            for number in range(len(self.texts)):
                first = (number + repeat) % len(self.ways)
                for way in [*self.ways[first:], *self.ways[:first]]:
                    yield self._decode(way, number, repeat)

    def _decode(self, way: Way, number: int, repeat: int, most: int | None = None) -> EngineRun:
        """Decode a text in some way after its prompt, of which `most` tokens are read."""
        prompt, answer = self.texts[number].tensor_split([self.prompt_tokens])
        run = self.bench.decode(Prompt(f"random/{number}", prompt[:most]), way.method, repeat)
        return EngineRun(self.model, way.tau, run.timing, run.token_ids.tolist() == answer.tolist())


def table(runs: Sequence[EngineRun]) -> list[dict[str, Any]]:
    """Sum up a row for each model and way: what `resps bench` sums up, the planted tau, the share of equal texts."""
    timed = [run for run in runs if run.timing.repeat >= 0]
    rows = []
    for model, way in dict.fromkeys((run.model, run.timing.method) for run in timed):
        own = [run for run in timed if (run.model, run.timing.method) == (model, way)]
        timings = [run.timing for run in timed if run.model == model]
        found = summarise(timings, way)
        rows.append(
            {"model": model, "way": found.pop("method"), "planted": own[0].planted}
            | {name: value for name, value in found.items() if name != "temperature"}
            | {"same_text": sum(run.same for run in own) / len(own)}
        )
    return rows


def run(args: argparse.Namespace) -> int:
    """Decode, write, print."""
    load = checked_load(args.accept_noise)
    if args.threads:
        torch.set_num_threads(args.threads)
    runs: list[EngineRun] = []
    spreads: dict[str, float | None] = {}
    refusals: dict[str, str | None] = {}
    for model in args.shape:
        engine = EngineBench.prepare(args, model)
        total = (1 + args.repeats * len(engine.texts)) * len(engine.ways)
        found = list(tqdm(engine.run(args.repeats), desc=f"Decoding with {model}", total=total))
        spreads[model] = plain_spread(run.timing for run in found if run.timing.repeat >= 0)
        refusals[model] = engine.not_compiled
        runs += found
    noise = {"accepted": args.accept_noise, "load_before": load}
    target = engine.bench.target
    report(args, target, table(runs), runs, noise=noise, plain_spread=spreads, not_compiled=refusals)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        "python -m training.studies.engine_speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--shape", nargs="+", choices=SHAPES, default=["0.1b"], help="sizes of the targets; default: 0.1b")
    add("--tau", nargs="+", type=float, default=[2.0, 3.0, 4.0], help="that heads are rigged to; default: 2 3 4")
    add("--draft-vocabulary", type=positive, default=DRAFT_VOCABULARY, help="tokens that they can propose")
    add("--trees", nargs="+", type=shape, help="besides chains: total_tokens,depth,top_k; default: as deep and wide")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16", help="default: bfloat16")
    add("--device", type=device, default=default_device(), help="default: cuda if available, otherwise cpu")
    add("--eager", action="store_true", help="compile nothing")
    add("--pack", action="store_true", help="prepack the target's weights, for every way")
    add("--limit", type=positive, default=4, help="prompts; default: 4")
    add("--prompt-tokens", type=positive, default=64, help="of a prompt; default: 64")
    add("--max-new-tokens", type=positive, default=128, help="of an answer; default: 128")
    add("--repeats", type=positive, default=3, help="of everything; default: 3")
    add("--threads", type=positive, help="CPU threads; default: as torch chooses")
    add("--accept-noise", action="store_true", help="measure even on a busy machine; the results say so")
    add("--output", type=Path, default=Path("results/engine"), help="folder for results.json")
    return execute(parser, arguments, run)


if __name__ == "__main__":
    sys.exit(main())
