"""Measure what static caches and compilation gain, plain and with trees.

Question: what do static caches and compilation gain, plain and with trees?
Answer: a static cache alone gains nothing on a CPU, and costs a tenth in bfloat16. Compilation gains a fifth to a
third in float32 after one to two minutes of compiling; in bfloat16 prepacked layers are faster (docs/benchmarks.md).

    python -m training.studies.static_caches TARGET HEAD --dataset prompts.jsonl --shape 8,3,3

Method: greedy, one prompt at a time, trees of one shape (the head's default without `--shape`), every way in turn. Run
it on a quiet machine.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import CompileConfig

from transformers_resps.head import DraftHead
from transformers_resps.policy import FixedPolicy
from transformers_resps.tree import TreeShape

from .experiment import Experiment, add_options, execute


# Way -> whether a head drafts, and what holds the target's keys.
WAYS: dict[str, tuple[bool, str]] = {
    f"{decoding}, {cache}": (decoding == "tree", cache)
    for decoding in ("plain", "tree")
    for cache in ("dynamic", "static", "compiled")
}


@dataclass(frozen=True, slots=True)
class CacheTiming:
    """One prompt decoded once.

    Attributes:
        way: one of `WAYS`.
        prompt: which one.
        repeat: from 0; -1 is the first pass, in which forwards are compiled.
        tokens: of the answer.
        seconds: of the call.
        same: whether the answer equals that of plain decoding with a cache that grows.
    """

    way: str
    prompt: int
    repeat: int
    tokens: int
    seconds: float
    same: bool


class StaticBench:
    """One target and head that decode greedily, one prompt at a time, timed by `clock`.

    Args:
        target: attached.
        head: drafts.
        shape: of every tree, so that all ways verify the same ones.
        max_new_tokens: of an answer.
        compile_config: how forwards are compiled; `None` leaves the compiled ways out.
        clock: seconds.
    """

    def __init__(
        self,
        target: Any,
        head: DraftHead,
        shape: TreeShape,
        max_new_tokens: int,
        compile_config: CompileConfig | None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._target, self._head, self._shape, self._clock = target, head, shape, clock
        self._max_new_tokens, self._compile_config = max_new_tokens, compile_config
        settings: Any = compile_config
        if settings is not None:
            settings._compile_all_devices = True  # plain `generate` compiles on a CPU only with it

    def run(self, prompts: Sequence[Tensor], repeats: int) -> Iterator[CacheTiming]:
        """Every way on every prompt, beginning with another way each time; before that once to compile."""
        ways = [way for way, (_, cache) in WAYS.items() if cache != "compiled" or self._compile_config is not None]
        slots = max(map(len, prompts)) + self._max_new_tokens  # one size for all, so that no prompt compiles anew
        for repeat in range(-1, repeats):
            for number, prompt in enumerate(prompts):
                first = (number + repeat) % len(ways)
                taken = {way: self._decode(way, prompt, slots) for way in [*ways[first:], *ways[:first]]}
                expected, _ = taken["plain, dynamic"]
                for way, (answer, seconds) in taken.items():
                    yield CacheTiming(way, number, repeat, len(answer), seconds, answer == expected)

    def _decode(self, way: str, prompt: Tensor, slots: int) -> tuple[list[int], float]:
        drafts, cache = WAYS[way]
        options: dict[str, Any] = {"max_new_tokens": self._max_new_tokens, "do_sample": False}
        if drafts:
            options |= {"assistant_model": self._head, "policy": FixedPolicy(self._shape)}
        if cache != "dynamic":
            options |= {"cache_implementation": "static", "max_cache_len": slots}
        options |= {"compile_config": self._compile_config} if cache == "compiled" else {"disable_compile": True}
        ids = prompt[None].to(self._target.device)
        mask = ids.new_ones(ids.shape)
        started = self._clock()
        sequences = self._target.generate(ids, attention_mask=mask, **options)
        answer: list[int] = sequences[0, len(prompt) :].tolist()  # reading it waits for the device
        return answer, self._clock() - started


def table(measurements: Sequence[CacheTiming]) -> list[dict[str, Any]]:
    """One row per way: its speed, ratios to plain and to the same decoding with a growing cache, and equal texts.

    `first_pass_extra_seconds` are those of the first pass beyond a later one: what compiling took.
    """
    timed = [m for m in measurements if m.repeat >= 0]
    found = {way: [m for m in timed if m.way == way] for way in WAYS}
    rates = {way: sum(m.tokens for m in own) / sum(m.seconds for m in own) for way, own in found.items() if own}
    repeats = 1 + max(m.repeat for m in timed)
    rows = []
    for way, rate in rates.items():
        first = sum(m.seconds for m in measurements if m.way == way and m.repeat < 0)
        rows.append(
            {
                "way": way,
                "tokens_per_second": rate,
                "to_plain": rate / rates["plain, dynamic"],
                "to_dynamic": rate / rates["tree, dynamic" if WAYS[way][0] else "plain, dynamic"],
                "same_text": sum(m.same for m in found[way]) / len(found[way]),
                "first_pass_extra_seconds": first - sum(m.seconds for m in found[way]) / repeats,
            }
        )
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        "python -m training.studies.static_caches",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser, "results/static")
    parser.add_argument(
        "--backend", default="inductor", help="backend of `torch.compile`; 'none' leaves compiling out"
    )
    return execute(parser, arguments, run)


def run(args: argparse.Namespace) -> int:
    """Decode, write, print."""
    from rich.progress import track  # of the extra `bench`

    given = Experiment.load(args)
    config = None if args.backend == "none" else CompileConfig(backend=args.backend)
    shape = args.shape or given.head.default_shape
    bench = StaticBench(given.target, given.head, shape, args.max_new_tokens, config)
    runs = list(track(bench.run(given.prompts, args.repeats), "Decoding"))
    given.report(args, table(runs), runs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
