"""`resps bench`: compare draft trees and policies with plain decoding on your prompts.

`training/benchmark.py` in a clone adds methods, a journal and more plots.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from ..calibration import calibrate
from ..data import training_prompts_of
from ..drafting import DraftSource
from ..generation.attach import attach
from ..heads import pair_identity
from ..hub.upload import RESULTS
from ..policies.base import Policy
from ..policies.costs import CostTable
from ..policies.resps import ReSpSPolicy
from ..tree import TreeShape
from ..verifying.prepacking import is_prepacked
from .cli import BENCH_METHODS, EAGLE, PROMPT_LOOKUP
from .loading import default_device, load_policy, load_source, load_target, named_tree, short_name
from .methods import (
    Bench,
    Generate,
    Method,
    Prompt,
    compiled,
    draft_model,
    eagle_trees,
    fixed_tree,
    invariant,
    plain,
    plain_steps,
    policies,
    prompt_lookup,
)
from .plots import ratios
from .results import (
    NAMED_NODES,
    SCHEMA_VERSION,
    AnswerTiming,
    Run,
    advice_of,
    check_spread,
    machine,
    markdown_table,
    plain_spread,
    summarise_steps,
    summary_rows,
    write_results,
)
from .session import Dialogue, Judge, Session, check_apart, read_dialogues, spread


_ADVICE_CONTEXT = 128  # context length, in tokens, at which the advice compares costs


@dataclass(frozen=True)
class BenchConfig:
    """The settings of one benchmark, described by `resps bench --help`. `methods=None` selects all methods."""

    choices: ClassVar[Mapping[str, str]] = BENCH_METHODS

    target: str
    head: str | None
    datasets: Sequence[str]
    policies: Sequence[str] = ("auto",)
    methods: Sequence[str] | None = None
    shapes: Sequence[TreeShape] = ()
    draft_model: str | None = None
    revision: str | None = None
    split: str = "test"
    limit: int = 10
    temperatures: Sequence[float] = (0.0,)
    max_new_tokens: int = 128
    repeats: int = 3
    dtype: str | None = None
    device: str = field(default_factory=default_device)
    compile: bool = False
    invariant: bool = False
    pack: bool = False
    quantization: str | None = None
    threads: int | None = None
    accept_noise: bool = False
    output: Path = Path("results/bench")

    def __post_init__(self) -> None:
        asked = ["--methods eagle"] if EAGLE in (self.methods or ()) else []
        asked += [f"--shapes {shape}" for shape in self.shapes if shape.asks_head]
        if asked and self.head is None:
            raise ValueError(f"`{asked[0]}` asks for trees of a draft head. Name a HEAD after TARGET.")

    @property
    def chosen(self) -> list[str]:
        """Names in `choices` of the methods to compare: `methods` or, if `None`, all ("eagle" only with a head)."""
        possible = [name for name in self.choices if self.head is not None or name != EAGLE]
        return possible if self.methods is None else list(self.methods)


Config = TypeVar("Config", bound=BenchConfig)


def run(args: argparse.Namespace) -> int:
    """Run `resps bench` with the parsed options; `main` has already checked that the machine is quiet."""
    return bench(read_options(args, BenchConfig), args.load, as_json="json" in args, plots="plot" in args)


def read_options(args: argparse.Namespace, config_type: type[Config]) -> Config:
    """Make a `config_type` from parsed options; a field without an option keeps its default."""
    options = vars(args)
    return config_type(**{field.name: options[field.name] for field in fields(config_type) if field.name in options})


def bench(config: BenchConfig, load: float | None = None, *, as_json: bool = False, plots: bool = False) -> int:
    """Run the benchmark; return 130 after Ctrl-C, 1 if an answer differs from plain decoding beyond rounding, or 0."""
    models = BenchModels.load(config)
    dialogues = [one for rows in read_datasets(config) for one in spread(rows, config.limit)]
    models.check_unseen(dialogues)
    costs = calibrate(models.target, models.head, folder=config.output / "costs")
    timed = Bench(models.target, config.max_new_tokens)
    refusal = timed.compile_refusal(dialogues[0].prompt(models.tokenizer)) if config.compile else None
    methods = methods_of(config, models, compiles=config.compile and refusal is None)
    session = Session(timed, models.tokenizer, dialogues, methods, config.temperatures, range(config.repeats))
    session.warm_up()
    judge = Judge(models.target, methods)

    def check(prompt: Prompt, runs: Sequence[Run]) -> None:
        judge.add(prompt, runs)
        if not config.accept_noise:
            check_spread(session.timings)

    partial = True
    try:
        partial = not answer_all(session, check)
    finally:
        facts = {
            "command": ["resps", *sys.argv[1:]],
            "partial": partial,
            "noise": {"accepted": config.accept_noise, "load_before": load},
            "not_compiled": refusal,
        }
        results = facts | results_of(config, models, session, judge, costs)
        file = write_results(config.output / RESULTS, results)
    status = report(results, file, as_json=as_json)
    if plots and results["measurements"]:
        drawing = file.with_name("ratios.svg")
        drawing.write_text(ratios(results), encoding="utf-8")
        print(f"Drawn in {drawing}", file=sys.stderr if as_json else sys.stdout)
    return status


@dataclass(frozen=True, slots=True)
class BenchModels:
    """The models of one benchmark: a target, and a head, policies and draft model that were checked to fit it."""

    target: Any
    tokenizer: Any
    head: DraftSource | None
    policies: dict[str, Policy | str]  # name in the table -> policy, or "auto"
    draft_model: PreTrainedModel | None  # small model for Transformers' assisted generation
    sources: dict[str, str]  # "head", or name of a policy -> folder or Hub id
    trained_on: dict[str, set[str] | None]  # the same keys -> fingerprints of training prompts; `None`: unknown

    @classmethod
    def load(cls, config: BenchConfig) -> "BenchModels":
        """Load the models and policies of `config`; raise `ValueError` if one is missing or unfit for the target.

        Also sets the threads of this process, and hides progress bars unless stderr is a terminal.
        """
        if not sys.stderr.isatty():
            transformers_logging.disable_progress_bar()
        if config.threads:
            torch.set_num_threads(config.threads)
        options: dict[str, Any] = {"packed": config.pack, "quantization": config.quantization}
        target = attach(load_target(config.target, config.dtype, config.device, **options))
        tokenizer = AutoTokenizer.from_pretrained(config.target)
        head = load_source(config.head, target, config.revision)
        loaded = load_policies(config.policies, target, head)
        small: Any = None
        if config.draft_model is not None:  # with another vocabulary, the warm-up raises
            small = AutoModelForCausalLM.from_pretrained(config.draft_model, dtype=target.dtype).to(target.device)
        sources = {} if head is None else {"head": str(head.identity()["name_or_path"])}
        sources |= {name: source for name, source in zip(loaded, config.policies, strict=True) if source != "auto"}
        trained_on = {name: training_prompts_of(source) for name, source in sources.items()}
        return cls(target, tokenizer, head, loaded, small, sources, trained_on)

    def check_unseen(self, dialogues: Sequence[Dialogue]) -> None:
        """Raise `ValueError` if the head or a policy was trained on one of the prompts."""
        for name, fingerprints in self.trained_on.items():
            check_apart(dialogues, fingerprints or set(), f"the training prompts of {name}")


def load_policies(names: Sequence[str], target: Any, head: DraftSource | None) -> dict[str, Policy | str]:
    """Load policies from folders, Hub ids or "auto"; return a dict from the names in the results to the policies."""
    policies_by_name: dict[str, Policy | str] = {}
    counts = Counter(map(short_name, names))
    origins = Counter(Path(name).resolve() if Path(name).is_dir() else name for name in names)
    if twice := [origin for origin, count in origins.items() if count > 1]:
        raise ValueError(f"`--policy` names {twice[0]} twice. Pass each policy once.")
    for source in names:
        if named_tree(source) is not None:
            raise ValueError(
                f"`--policy {source}` is a tree, but `--policy` takes 'auto', folders or Hub ids. Pass `--shapes "
                f"{source}`."
            )
        policy = load_policy(source, head)
        if head is None and isinstance(policy, Policy) and policy.needs_head:
            raise ValueError(f"`--policy {source}` shapes the trees of a draft head. Name a HEAD after TARGET.")
        if isinstance(policy, Policy) and policy.has_identity:
            policy.check_identity(**pair_identity(target, head))
        called = short_name(source)
        if counts[called] > 1:
            called = source.rstrip("/")
        if isinstance(policy, ReSpSPolicy):
            called = f"Re-SpS {called}"
        elif isinstance(policy, Policy) and not called.startswith("policy"):
            called = f"policy {called}"
        policies_by_name[called] = policy
    return policies_by_name


def read_datasets(config: BenchConfig) -> list[list[Dialogue]]:
    """Read all conversations of each dataset; raise `ValueError` if one is empty or two have the same name."""
    stems = [Path(source).stem for source in config.datasets]
    odd = sorted({stem for stem in stems if stems.count(stem) > 1 or stem == "all"})
    if odd:
        raise ValueError(
            f"The names of datasets must differ, and none may be `all`, got {', '.join(odd)}. Give the files other "
            "names."
        )
    return [read_dialogues(source, config.split) for source in config.datasets]


def methods_of(
    config: BenchConfig,
    models: BenchModels,
    *,
    compiles: bool,
    others: Sequence[Method] = (),
    trees: Sequence[Generate] = (),
) -> list[Method]:
    """Return the decoding methods that `config` asks for, in the order of the results table.

    The caller's methods `others` come before the trees of `config`, and the caller's `trees` after. With `compiles`,
    each method of this package is also listed with compiled steps.
    """
    modes: list[Callable[[Generate], Generate]] = [lambda method: method]
    if config.invariant:
        modes.append(invariant)
    if compiles:
        modes += [lambda method, mode=mode: mode(compiled(method)) for mode in modes]  # type: ignore[misc]
    stock = [
        plain(),
        *(mode(plain_steps()) for mode in modes[1:]),
        *([prompt_lookup()] if PROMPT_LOOKUP in config.chosen else []),
        *([] if models.draft_model is None else [draft_model(models.draft_model)]),
    ]
    own = [
        *(eagle_trees(models.head) if models.head is not None and EAGLE in config.chosen else []),
        *(fixed_tree(models.head, shape) for shape in config.shapes),
        *trees,
        *policies(models.head, models.policies),
    ]
    own = [mode(method) for method in own for mode in modes]
    return [*stock, *others, *own]


def answer_all(session: Session, after: Callable[[Prompt, Sequence[Run]], None]) -> bool:
    """Answer each prompt with all methods, then call `after(prompt, timed answers)`. Return `False` after Ctrl-C."""
    with transformers_logging.tqdm(total=session.total, desc="Decoding", unit="answer") as bar:
        try:
            for prompt, runs in session.run(bar.update):
                bar.total = session.total  # it falls when a conversation ends early
                bar.set_postfix_str(prompt.name)
                after(prompt, runs)
        except KeyboardInterrupt:
            print("Stopped.", file=sys.stderr)
            return False
    return True


def settings_of(config: BenchConfig, dialogues: Sequence[Dialogue]) -> dict[str, Any]:
    """Return the entry `settings` of the results: only results with equal settings can share a table."""
    return {
        "methods": config.chosen,
        "shapes": [f"tree {shape}" for shape in config.shapes],
        "compile": config.compile,
        "invariant": config.invariant,
        "datasets": list(config.datasets),
        "split": config.split,
        "prompts": {dialogue.name: dialogue.fingerprint for dialogue in dialogues},
        "temperatures": list(config.temperatures),
        "max_new_tokens": config.max_new_tokens,
        "repeats": config.repeats,
    }


def results_of(
    config: BenchConfig,
    models: BenchModels,
    session: Session,
    judge: Judge,
    costs: CostTable,
    estimates: Sequence[AnswerTiming] = (),
) -> dict[str, Any]:
    """Return the results so far (see training/benchmarking/RESULTS.md), with `estimates` marked as not measured."""
    timings = session.timings
    runs = {one.name: [run for run in session.runs if run.timing.method == one.name] for one in session.methods}
    cost = costs.verify_seconds(NAMED_NODES, _ADVICE_CONTEXT) / costs.plain_seconds(_ADVICE_CONTEXT)
    return {
        "schema_version": SCHEMA_VERSION,
        "target": config.target,
        "packed": is_prepacked(models.target),
        "quantization": config.quantization,
        "target_parameters": models.target.num_parameters(),
        "head": config.head,
        "policies": dict(zip(models.policies, config.policies, strict=True)),
        "draft_model": config.draft_model,
        **machine(models.target),
        "settings": settings_of(config, session.dialogues),
        "training_prompts": {name: None if seen is None else len(seen) for name, seen in models.trained_on.items()},
        "costs": {name: part for name, part in asdict(costs).items() if name != "identity"},
        "cut_short": sorted(session.cut),
        "advice": advice_of({method.name: method.effort for method in session.methods}, timings, cost),
        "same_text": dict(judge.same_text),
        "same_text_invariant": dict(judge.same_text_invariant),
        "unexplained": judge.unexplained,
        "plain_spread": plain_spread(timings),
        **summary_rows(timings, list(runs), estimates),
        "steps": {name: summarise_steps(own) for name, own in runs.items() if own and own[0].steps},
        "measurements": [asdict(timing) for timing in timings],
    }


def report(results: dict[str, Any], file: Path, *, as_json: bool = False) -> int:
    """Print the results, write `table.md` into the folder of `file`, and return the exit status, as `bench` does."""
    status = 130 if results["partial"] else int(bool(results["unexplained"]))
    table = markdown_table(results)
    file.with_name("table.md").write_text(table + "\n", encoding="utf-8")
    if as_json:
        print(json.dumps(results))
        return status
    print(table)
    if results["noise"]["accepted"]:
        print("\nMeasured on a machine that was allowed to be busy: do not publish these figures.")
    for line in results["unexplained"]:
        print(f"NOT explained by rounding: {line}")
    print(f"\n{results['advice']}\n\nWritten to {file}{', marked as partial' if results['partial'] else ''}")
    return status
