"""Measure the engine alone: how much of tau becomes speed, eager and compiled, at a tau that is planted.

Question: what part of the mean acceptance length (tau) becomes speed, against plain decoding eager and compiled?
Answer: not measured yet.

    python -m training.studies.engine_speed --shape 0.1b 1b --tau 2 3 4 --dtype bfloat16
    python -m training.studies.engine_speed --shape tiny --tau 2 --eager --accept-noise --max-new-tokens 32

Method: Llamas of random weights (`random_llama`) and a rigged head for each tau (`rigged_head`), which drafts as a
trained head of EAGLE-3's sizes does, and is right as often as tau needs. Greedy, one prompt at a time, every way in
turn, total tokens over total seconds. Chains draft `2 tau - 1` tokens; a tree yields what its first chain yields, and
its further nodes show what width costs. Prompt lookup never finds a match in these texts: its row shows what looking
costs. `auto` meets the head of the chains, and is not held to a tau. A first pass, which compiles, is thrown away.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transformers_resps import TreeShape, attach
from transformers_resps.bench.config import default_device
from transformers_resps.bench.methods import (
    Method,
    compiled,
    compiled_plain,
    fixed_tree,
    plain,
    policies,
    prompt_lookup,
)
from transformers_resps.bench.noise import check_load, other_load, plain_spread
from transformers_resps.bench.options import device, positive, shape
from transformers_resps.bench.prompts import Prompt
from transformers_resps.bench.runs import Bench
from transformers_resps.bench.timing import AnswerTiming, summarise
from transformers_resps.target.prepacking import prepack

from .experiment import Experiment, execute
from .random_llama import SHAPES, random_llama
from .rigged_head import RiggedHead, hit_rate_for


DRAFT_VOCABULARY = 32_000  # as EAGLE-3 publishes its heads


@dataclass(frozen=True, slots=True)
class Way:
    """A method, with what its head is rigged to.

    Attributes:
        method: of `resps bench`.
        head: that drafts; `None` for methods without one.
        hit_rate: that is planted in it before each text.
        tau: that this rate gives; `None` for "auto", which draws its own trees.
    """

    method: Method
    head: RiggedHead | None = None
    hit_rate: float = 0.0
    tau: float | None = None


def ways_of(heads: dict[float, RiggedHead], trees: Sequence[TreeShape], compiles: bool) -> list[Way]:
    """Every way, in the order of the table.

    Args:
        heads: tau -> the head that is rigged to it.
        trees: shapes besides the chain of each tau.
        compiles: whether ours are also decoded with, compiled.
    """
    found = [Way(plain()), *([Way(compiled_plain())] if compiles else []), Way(prompt_lookup())]
    for tau, head in heads.items():
        chain = TreeShape(round(2 * tau), round(2 * tau) - 1, 1)
        drafted: list[tuple[Method, float, float | None]] = [
            (fixed_tree(head, one), hit_rate_for(tau, one.depth), tau) for one in (chain, *trees)
        ]
        drafted += [(auto, drafted[0][1], None) for auto in policies(head, {"auto": "auto"})]
        for method, hit_rate, planted in drafted:
            named = Method(f"{method.name}, tau {tau:g}", method.keywords)
            found += [
                Way(one, head, hit_rate, planted) for one in ((named, compiled(named)) if compiles else (named,))
            ]
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
        target: Any = random_llama(model, getattr(torch, args.dtype), args.device)
        bench = Bench(attach(prepack(target) if args.pack else target), args.max_new_tokens)
        random = torch.Generator().manual_seed(0)
        texts = []
        for _ in range(args.limit):
            prompt = torch.randint(1, target.config.vocab_size, (args.prompt_tokens,), generator=random)
            texts.append(torch.cat([prompt, bench.decode(Prompt("random/0", prompt), plain()).token_ids]))
        reason = "Left out by --eager." if args.eager else bench.compile_refusal(Prompt("random/0", prompt))
        size = min(DRAFT_VOCABULARY, target.config.vocab_size)
        heads = {tau: RiggedHead.for_texts(target, texts, size) for tau in args.tau}
        trees = args.trees or [TreeShape(8, 4, 2) if args.device == "cpu" else TreeShape(60, 8, 10)]
        return cls(model, bench, ways_of(heads, trees, reason is None), texts, args.prompt_tokens, reason)

    def run(self, repeats: int) -> Iterator[EngineRun]:
        """Yield the runs, beginning each prompt with another way; those of repeat -1 warm up and compile."""
        for repeat in range(-1, repeats):
            for number in range(len(self.texts)):
                first = (number + repeat) % len(self.ways)
                for way in [*self.ways[first:], *self.ways[:first]]:
                    yield self._decode(way, number, repeat)

    def _decode(self, way: Way, number: int, repeat: int) -> EngineRun:
        text = self.texts[number]
        if way.head is not None:
            way.head.plant(text, way.hit_rate, seed=len(self.texts) * (repeat + 1) + number)
        run = self.bench.decode(Prompt(f"random/{number}", text[: self.prompt_tokens]), way.method, repeat)
        same = run.token_ids.tolist() == text[self.prompt_tokens :].tolist()
        return EngineRun(self.model, way.tau, run.timing, same)


def table(runs: Sequence[EngineRun]) -> list[dict[str, Any]]:
    """Sum up a row for each model and way: a `Summary` of `resps bench`, the planted tau, the share of equal texts."""
    timed = [run for run in runs if run.timing.repeat >= 0]
    rows = []
    for model, way in dict.fromkeys((run.model, run.timing.method) for run in timed):
        own = [run for run in timed if (run.model, run.timing.method) == (model, way)]
        found = asdict(summarise([run.timing for run in timed if run.model == model], way))
        rows.append(
            {"model": model, "way": found.pop("method"), "planted": own[0].planted}
            | {name: value for name, value in found.items() if name != "temperature"}
            | {"same_text": sum(run.same for run in own) / len(own)}
        )
    return rows


def run(args: argparse.Namespace) -> int:
    """Decode, write, print."""
    from rich.progress import track  # of the extra `bench`

    load = other_load()
    if not args.accept_noise:
        check_load(load)
    if args.threads:
        torch.set_num_threads(args.threads)
    runs: list[EngineRun] = []
    spreads: dict[str, float | None] = {}
    refusals: dict[str, str | None] = {}
    for model in args.shape:
        engine = EngineBench.prepare(args, model)
        total = (args.repeats + 1) * len(engine.texts) * len(engine.ways)
        found = list(track(engine.run(args.repeats), f"Decoding with {model}", total=total))
        spreads[model] = plain_spread(run.timing for run in found if run.timing.repeat >= 0)
        refusals[model] = engine.not_compiled
        runs += found
    noise = {"accepted": args.accept_noise, "load_before": load}
    given = Experiment(engine.bench.model, engine.ways[-1].head, [])
    given.report(args, table(runs), runs, noise=noise, plain_spread=spreads, not_compiled=refusals)
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
    add("--trees", nargs="+", type=shape, help="besides chains; default: 8,4,2 on a CPU, otherwise 60,8,10")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16", help="default: bfloat16")
    add("--device", type=device, default=default_device(), help="default: cuda if available, otherwise cpu")
    add("--eager", action="store_true", help="compile nothing")
    add("--pack", action="store_true", help="prepack the target's weights, for every way")
    add("--limit", type=positive, default=3, help="prompts; default: 3")
    add("--prompt-tokens", type=positive, default=64, help="of a prompt; default: 64")
    add("--max-new-tokens", type=positive, default=96, help="of an answer; default: 96")
    add("--repeats", type=positive, default=3, help="of everything; default: 3")
    add("--threads", type=positive, help="CPU threads; default: as torch chooses")
    add("--accept-noise", action="store_true", help="measure even on a busy machine; the results say so")
    add("--output", type=Path, default=Path("results/engine"), help="folder for results.json")
    return execute(parser, arguments, run)


if __name__ == "__main__":
    sys.exit(main())
