"""`resps bench` with more methods, a journal that an interrupted command goes on from, provenance and plots."""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor
from transformers.utils.logging import tqdm

from transformers_resps import TreeShape
from transformers_resps.calibration import calibrate
from transformers_resps.compat import check_extra
from transformers_resps.heads import DraftHead, parameter_fingerprint
from transformers_resps.hub.upload import RESULTS
from transformers_resps.tools.bench import (
    BenchConfig,
    BenchModels,
    answer_all,
    methods_of,
    read_datasets,
    read_options,
    report,
    results_of,
    settings_of,
)
from transformers_resps.tools.cli import add_bench_options
from transformers_resps.tools.methods import Method, Prompt, fixed_tree
from transformers_resps.tools.quiet import BusyMachineError, checked_load
from transformers_resps.tools.results import PLAIN, AnswerTiming, Run, check_spread, machine, write_results
from transformers_resps.tools.session import Dialogue, Judge, Session, check_apart, read_dialogues, spread

from .headroom import Replayer, ceiling_of, shapes_for
from .journal import Journal, JournaledBench
from .peers import PEERS, check_installed, load_peers, peer_versions, vllm_peers
from .plots import draw_plots
from .provenance import code, config_sha256, weights_sha256


BEST_FIXED, CEILING = "best-fixed", "oracle"
_MAX_SEARCHED = 8  # prompts, shared among the datasets


@dataclass(frozen=True)
class FullConfig(BenchConfig):
    """The settings of a benchmark with everything.

    Attributes:
        peers: other libraries, of `PEERS`.
        vllm: the Python of an environment with vLLM, which is then measured, too.
        search_dataset: prompts to find the best fixed tree on; `None` for those of `datasets` beyond the limit.
    """

    choices: ClassVar[Mapping[str, str]] = {
        **BenchConfig.choices,
        BEST_FIXED: "the fixed tree that is fastest on other prompts",
        CEILING: "an upper bound for all policies",
    }

    peers: Sequence[str] = ()
    vllm: str | None = None
    search_dataset: str | None = None


def main(arguments: list[str] | None, description: str) -> int:
    """Run the command.

    Returns:
        0; 1 when an answer differs from the plain one and rounding does not explain it; 2 when nothing could be
        measured; 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(
        "training/benchmark.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_bench_options(parser, FullConfig.choices)
    add = parser.add_argument_group("beyond `resps bench`").add_argument
    add("--peers", nargs="+", choices=PEERS, help="also these installed libraries")
    add("--vllm", metavar="PYTHON", help="also vLLM, by the Python of its environment (see `make vllm`)")
    searched = "prompts to find the best fixed tree on; default: those of the datasets that are not evaluated"
    add("--search-dataset", metavar="FILE_OR_ID", help=searched)
    try:
        return benchmark(read_options(parser.parse_args(arguments), FullConfig))
    except (ValueError, OSError) as error:
        print(f"benchmark.py: {error}", file=sys.stderr)
        return 2


def replayable(models: BenchModels) -> DraftHead:
    """Return the head whose trees are replayed to find the best one. Raises `ValueError` for other drafters."""
    if not isinstance(models.head, DraftHead):
        got = type(models.head).__name__
        raise ValueError(f"Only trees of a draft head are searched, got a {got}. Run `resps bench`, or name a head.")
    return models.head


def benchmark(config: FullConfig) -> int:
    """Measure, judge, report; returns the exit status.

    Raises:
        ValueError: something is missing, does not fit, or would make the figures worthless.
    """
    if config.head is None:
        raise ValueError("HEAD is missing, whose trees are searched. Name it after TARGET, or run `resps bench`.")
    check_extra("bench")
    check_installed(config.peers)
    if config.vllm is not None and not Path(config.vllm).is_file():
        raise ValueError(
            f"--vllm got {config.vllm}, which is no file. Pass the Python of an environment with vLLM, for instance "
            "`.venv/vllm/bin/python` after `make .venv/vllm/.filled`."
        )
    load = checked_load(config.accept_noise)
    models = BenchModels.load(config)
    head = replayable(models)
    others, versions = load_peers(config.peers, models.target), peer_versions(config.peers)
    with ExitStack() as running:
        if config.vllm is not None:
            methods, versions["vllm"] = running.enter_context(vllm_peers(Path(config.vllm), models.target, head))
            others += methods
        return measure(config, models, head, others, versions, load)


def measure(
    config: FullConfig,
    models: BenchModels,
    head: DraftHead,
    others: Sequence[Method],
    versions: Mapping[str, str],
    load: float | None,
) -> int:
    """Measure beside methods of other libraries, given their versions and the load before anything was started."""
    evaluated, searched = choose_dialogues(config)
    models.check_unseen(evaluated)
    if not searched:
        config = replace(config, methods=[name for name in config.chosen if name != BEST_FIXED])
    fingerprints = {dialogue.name: dialogue.fingerprint for dialogue in searched}
    settings = settings_of(config, evaluated) | {"searched": fingerprints}
    facts = identity_of(config, models) | {"peers": dict(versions)}
    journal = Journal(config.output, facts | settings)
    if config.accept_noise:  # what was measured so stays so when the command goes on
        journal.note("accepted_noise", True)
    bench = JournaledBench(models.target, config.max_new_tokens, journal)
    try:
        costs = calibrate(models.target, head, folder=config.output / "costs")
        grid = shapes_for(models.target.device.type)
        replayer = Replayer(models.target, head, grid, costs, config.max_new_tokens)
        best = find_best_fixed(replayer, searched, models.tokenizer, min(config.temperatures), journal)
        refusal = bench.compile_refusal(evaluated[0].prompt(models.tokenizer)) if config.compile else None
        methods = methods_of(
            config,
            models,
            compiles=config.compile and refusal is None,
            others=others,
            trees=[] if best is None else [fixed_tree(head, best, f"best fixed {best}")],
        )
        session = Session(bench, models.tokenizer, evaluated, methods, config.temperatures, range(config.repeats))
        session.warm_up()
    except KeyboardInterrupt:
        print("Stopped before anything was measured. The same command goes on from here.", file=sys.stderr)
        return 130
    judge, ceilings = Judge(models.target, methods), list[AnswerTiming]()

    def after(prompt: Prompt, runs: Sequence[Run]) -> None:
        judge.add(prompt, runs)
        if CEILING in config.chosen:
            ceilings.append(ceiling(replayer, prompt, runs, journal))
        if not config.accept_noise:
            check_quiet(session.timings, journal)

    partial = True
    try:
        partial = not answer_all(session, after)
    finally:
        results = {
            **facts,
            "command": ["python", "training/benchmark.py", *sys.argv[1:]],
            "partial": partial,
            "noise": {"accepted": "accepted_noise" in journal.notes, "load_before": load},
            "not_compiled": refusal,
            **results_of(config, models, session, judge, costs, ceilings),
            "settings": settings,
            "best_fixed": journal.notes.get("best_fixed"),
            "ceilings": [asdict(one) for one in ceilings],
        }
        file = write_results(config.output / RESULTS, results)
    status = report(results, file)
    if results["measurements"]:
        draw_plots(results, config.output)
    return status


def choose_dialogues(config: FullConfig) -> tuple[list[Dialogue], list[Dialogue]]:
    """Return the conversations that are evaluated, and others to find the best fixed tree on.

    The latter are from `--search-dataset`, or from what the limit leaves of the datasets; none where the tree is not
    wanted, or where nothing is left and it was not asked for by name.

    Raises:
        ValueError: a dataset is not there, or the evaluation would not be fair.
    """
    sources = read_datasets(config)
    evaluated = [dialogue for rows in sources for dialogue in spread(rows, config.limit)]
    if BEST_FIXED not in config.chosen:
        return evaluated, []
    if config.search_dataset:
        searched = spread(read_dialogues(config.search_dataset, config.split), _MAX_SEARCHED)
    else:
        taken = {dialogue.fingerprint for dialogue in evaluated}
        rest = [[dialogue for dialogue in rows if dialogue.fingerprint not in taken] for rows in sources]
        each = max(1, _MAX_SEARCHED // len(sources))
        searched = [dialogue for rows in rest if rows for dialogue in spread(rows, each)]
    if not searched and config.methods is not None:
        raise ValueError(
            "All prompts are evaluated, and none is left to find the best fixed tree on. Lower --limit, pass "
            "--search-dataset, or choose --methods without best-fixed."
        )
    check_apart(evaluated, {dialogue.fingerprint for dialogue in searched}, "those of --search-dataset")
    return evaluated, searched


def identity_of(config: BenchConfig, models: BenchModels) -> dict[str, Any]:
    """Return what was measured, with what code, on what machine."""
    return {
        **code(),
        **machine(models.target),
        "target": config.target,
        "packed": config.pack,
        "target_fingerprint": parameter_fingerprint(models.target),
        "head": config.head,
        "policies": dict(zip(models.policies, config.policies, strict=True)),
        "draft_model": config.draft_model,
        "weights_sha256": {name: weights_sha256(source) for name, source in models.sources.items()},
        "config_sha256": {name: config_sha256(source) for name, source in models.sources.items()},
    }


def find_best_fixed(
    replayer: Replayer, searched: Sequence[Dialogue], tokenizer: Any, temperature: float, journal: Journal
) -> TreeShape | None:
    """Find the best fixed tree once, then take it from the journal; `None` without prompts to search on."""
    if not searched:
        return None
    if "best_fixed" not in journal.notes:

        def prompts() -> Iterator[tuple[str, Tensor]]:
            for dialogue in tqdm(searched, desc="Looking for the best fixed tree", unit="prompt"):
                yield dialogue.name, dialogue.prompt(tokenizer).input_ids

        journal.note("best_fixed", replayer.find_best_fixed(prompts(), temperature))
    return TreeShape(*journal.notes["best_fixed"]["shape"])


def ceiling(replayer: Replayer, prompt: Prompt, runs: Sequence[Run], journal: Journal) -> AnswerTiming:
    """Estimate how fast the oracle would have written the plain text."""
    answer = next(run for run in runs if run.timing.method == PLAIN)
    m = answer.timing
    seed = m.repeat if m.temperature else 0  # greedy repeats write one text
    key = f"ceiling {m.prompt} turn {m.turn} temperature {m.temperature:g} seed {seed}"
    if key not in journal.notes:
        journal.note(key, replayer.ceiling(prompt.input_ids, answer.token_ids))
    return ceiling_of(m, journal.notes[key])


def check_quiet(timings: Sequence[AnswerTiming], journal: Journal) -> None:
    """Raises BusyMachineError when plain decoding's rates spread too widely."""
    try:
        check_spread(timings)
    except BusyMachineError as error:
        raise BusyMachineError(f"{error} Delete {journal.file} first.") from error
