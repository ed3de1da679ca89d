"""Time the steps of a target whose weights lie in small pages, and in huge ones.

Question: what are huge pages worth to compiled steps, or to prepacked ones?
Answer (a prototype, SmolLM2, bfloat16, two threads): a compiled plain step took 23.7 ms before its weights moved and
18.6 ms afterwards, and `auto` wrote 72.4 and 88.7 tokens/s. This study has not run on a quiet machine yet.

    python -m training.studies.huge_pages TARGET HEAD --dataset prompts.jsonl --dtype bfloat16 --threads 2
    python -m training.studies.huge_pages TARGET HEAD --dataset prompts.jsonl --dtype bfloat16 --pack --eager

Method: one process loads target and head twice. While the first pair is loaded, compiled and used, the package is told
that the kernel has no huge pages. Both decode every prompt, plainly and with `auto`, in turn; a first pass, which
compiles, is thrown away. `step_ms` is the median of the target's forwards after the prompt.
"""

import argparse
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from transformers.utils.logging import tqdm

from transformers_resps import FixedPolicy, TreeShape
from transformers_resps.compilation import pages
from transformers_resps.heads import DraftHead
from transformers_resps.tools.arguments import positive
from transformers_resps.tools.methods import PLAIN, Bench, Generate, Prompt, compiled, policies
from transformers_resps.tools.quiet import check_load, other_load
from transformers_resps.tools.results import AnswerTiming

from .experiment import Experiment, add_options, execute


SMALL, HUGE = "small", "huge"


@dataclass(frozen=True, slots=True)
class PagesRun:
    """One prompt decoded once.

    Attributes:
        pages: `SMALL` or `HUGE`.
        timing: names the way.
        step_seconds: of each forward of the target after the prompt.
        same: whether the text is that of the same way in small pages.
    """

    pages: str
    timing: AnswerTiming
    step_seconds: list[float]
    same: bool


@contextmanager
def in_pages(kind: str) -> Iterator[None]:
    """Let nothing move into huge pages inside the `with` block, if `kind` is `SMALL`."""
    if kind == HUGE:
        yield
    else:
        with patch.object(pages.Kernel, "has_huge_pages", lambda self: False):
            yield


def ways_of(head: DraftHead, *, compiles: bool) -> list[Generate]:
    """Plain steps and `auto`."""
    ways = [Generate(PLAIN, {"policy": FixedPolicy(TreeShape.plain())}), *policies(head, {"auto": "auto"})]
    return [compiled(way) for way in ways] if compiles else ways


def measure(
    given: Mapping[str, Experiment], max_new_tokens: int, repeats: int, *, compiles: bool
) -> Iterator[list[PagesRun]]:
    """Yield what each prompt took in every way, which begins with another one each time.

    Args:
        given: `SMALL` and `HUGE`, loaded `in_pages` of this kind.
        max_new_tokens: of each text.
        repeats: of every prompt; the first pass comes besides.
        compiles: whether steps run compiled.
    """
    benches = {kind: Bench(one.target, max_new_tokens) for kind, one in given.items()}
    ways = [(kind, way) for kind, one in given.items() for way in ways_of(one.head, compiles=compiles)]
    for repeat in range(-1, repeats):
        for number, prompt in enumerate(given[SMALL].prompts):
            first, done = (number + repeat) % len(ways), {}
            for kind, way in [*ways[first:], *ways[:first]]:
                with in_pages(kind):
                    done[kind, way.name] = benches[kind].decode(Prompt(f"prompt/{number}", prompt), way, repeat)
            if repeat >= 0:
                yield [
                    PagesRun(
                        kind,
                        run.timing,
                        [step.verify_seconds for step in run.steps[1:]],
                        torch.equal(run.token_ids, done[SMALL, name].token_ids),
                    )
                    for (kind, name), run in done.items()
                ]


def table(runs: Sequence[PagesRun]) -> list[dict[str, Any]]:
    """A row for each way and kind of pages: the median step, tokens over seconds, and these over small pages'."""
    rows: list[dict[str, Any]] = []
    for way in dict.fromkeys(run.timing.method for run in runs):
        small: float | None = None
        for kind in (SMALL, HUGE):
            own = [run for run in runs if (run.timing.method, run.pages) == (way, kind)]
            rate = sum(run.timing.tokens for run in own) / sum(run.timing.seconds for run in own)
            small = small or rate
            rows.append(
                {
                    "way": way,
                    "pages": kind,
                    "step_ms": 1e3 * median(seconds for run in own for seconds in run.step_seconds),
                    "tokens_per_second": rate,
                    "to_small": rate / small,
                    "same_text": sum(run.same for run in own) / len(own),
                }
            )
    return rows


def run(args: argparse.Namespace) -> int:
    """Load, decode, write, print."""
    if not pages.Kernel().has_huge_pages():
        raise ValueError(
            "This study needs huge pages of 2 MiB, and the system has none. Run it on Linux where "
            "/sys/kernel/mm/transparent_hugepage/enabled says `madvise` or `always`."
        )
    load = other_load()
    if not args.accept_noise:
        check_load(load)
    if args.threads:
        torch.set_num_threads(args.threads)
    logging.getLogger(f"transformers.{pages.__name__}").setLevel(logging.INFO)  # how much moves, and how long it takes
    given = dict[str, Experiment]()
    for kind in (SMALL, HUGE):
        with in_pages(kind):
            given[kind] = Experiment.load(args)
    prompts = args.repeats * len(given[SMALL].prompts)
    found = measure(given, args.max_new_tokens, args.repeats, compiles=not args.eager)
    runs = [run for some in tqdm(found, desc="Decoding", total=prompts) for run in some]
    noise = {"accepted": args.accept_noise, "load_before": load}
    given[HUGE].report(args, table(runs), runs, noise=noise)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        "python -m training.studies.huge_pages",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser, "results/huge_pages")
    parser.add_argument("--eager", action="store_true", help="compile nothing; prepacked weights move with --pack")
    parser.add_argument("--threads", type=positive, help="CPU threads; default: as torch chooses")
    parser.add_argument(
        "--accept-noise", action="store_true", help="measure even on a busy machine; the results say so"
    )
    return execute(parser, arguments, run)


if __name__ == "__main__":
    sys.exit(main())
