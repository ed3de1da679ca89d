"""Runs one benchmark from its settings to its results."""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from torch import Tensor
from transformers.utils.logging import tqdm

from ..calibration import calibrate
from .advice import NAMED_NODES, advice_of
from .config import BEST_FIXED, CEILING, CHOICES, EAGLE, PROMPT_LOOKUP, BenchConfig
from .headroom import BestFixed, Replayer, ceiling_of, shapes_for
from .journal import Journal
from .judging import Judge
from .methods import (
    Method,
    check_distinct,
    compiled,
    compiled_plain,
    draft_model,
    eagle_trees,
    fixed_tree,
    peers,
    plain,
    policies,
    prompt_lookup,
    shape_name,
)
from .models import BenchModels
from .noise import check_spread
from .peers import load_peers, peer_versions
from .prompts import Prompt
from .provenance import code, machine
from .results import SCHEMA_VERSION, measured_part
from .runs import Bench, Run
from .schedule import Schedule
from .selection import Selection
from .timing import PLAIN, AnswerTiming


_ADVICE_CONTEXT = 128  # positions


class Session:
    """A benchmark that is ready to be timed, and what came of it so far.

    Making one takes minutes: it measures the cost of steps, finds the best fixed tree, and warms up.

    Args:
        config: what to measure.
        models: as `config` names them.

    Raises:
        ValueError: the evaluation would not be fair, the output folder belongs to other settings, or an option is
            impossible.
    """

    def __init__(self, config: BenchConfig, models: BenchModels) -> None:
        self.config, self.models = config, models
        target = models.target
        self.prompts = Selection.of(config, models.trained_on)
        chosen = CHOICES if config.methods is None else config.methods
        self.selected = [name for name in chosen if name != BEST_FIXED or self.prompts.searched]
        others = peers(load_peers(config.peers, target, models.draft_model))
        self.facts = {**models.identity, **machine(target), **code(), "peers": peer_versions(config.peers)}
        self.settings = self._settings()
        self.journal = Journal(config.output, self.facts | self.settings)
        if config.accept_noise:  # what was measured so stays so when the run is resumed
            self.journal.note("accepted_noise", True)
        self.bench = Bench(target, config.max_new_tokens)
        self.costs = calibrate(target, models.head, folder=config.output / "costs")
        shapes = shapes_for(target.device.type)
        self.replayer = Replayer(target, models.head, shapes, self.costs, config.max_new_tokens)
        best = self._find_best_fixed() if BEST_FIXED in self.selected else None
        first = self.prompts.evaluated[0].prompt(models.tokenizer)
        self.not_compiled = self.bench.compile_refusal(first)
        self.methods = self._choose_methods(others, best)
        self.schedule = Schedule(
            self.bench, self.prompts.evaluated, self.methods, config.temperatures, config.repeats, models.tokenizer
        )
        self.bench.warm_up(first, self.methods)
        # "auto" keeps what it learns from answer to answer, and starts knowing nothing
        target.speculation_state.policy_cache.clear()
        self.judge = Judge(target, self.methods)
        self.runs: list[Run] = []
        self.ceilings: list[AnswerTiming] = []

    def _settings(self) -> dict[str, Any]:
        """Return what must stay the same for all figures of one table, besides `facts`."""
        config = self.config
        return {
            "methods": self.selected,
            "shapes": [shape_name(shape) for shape in config.shapes],
            "compile": config.compile,
            "datasets": list(config.datasets),
            "split": config.split,
            "prompts": {dialogue.name: dialogue.fingerprint for dialogue in self.prompts.evaluated},
            "searched": {dialogue.name: dialogue.fingerprint for dialogue in self.prompts.searched},
            "temperatures": list(config.temperatures),
            "max_new_tokens": config.max_new_tokens,
            "repeats": config.repeats,
        }

    def _find_best_fixed(self) -> BestFixed:
        """Find it once, then read it from the journal."""
        if "best_fixed" not in self.journal.notes:
            searched, tokenizer = self.prompts.searched, self.models.tokenizer

            def prompts() -> Iterator[tuple[str, Tensor]]:
                for dialogue in tqdm(searched, desc="Looking for the best fixed tree", unit="prompt"):
                    yield dialogue.name, dialogue.prompt(tokenizer).input_ids

            best = self.replayer.find_best_fixed(prompts(), min(self.config.temperatures))
            self.journal.note("best_fixed", best.to_dict())
        return BestFixed.from_dict(self.journal.notes["best_fixed"])

    def _choose_methods(self, others: list[Method], best: BestFixed | None) -> list[Method]:
        """Return them in the order of the table."""
        head, small, compiles = self.models.head, self.models.draft_model, self.not_compiled is None
        stock = [
            plain(),
            *([compiled_plain()] if compiles else []),
            *([prompt_lookup()] if PROMPT_LOOKUP in self.selected else []),
            *([] if small is None else [draft_model(small)]),
        ]
        own = [
            *(eagle_trees(head) if EAGLE in self.selected else []),
            *(fixed_tree(head, shape) for shape in self.config.shapes),
        ]
        if best is not None:
            own.append(fixed_tree(head, best.shape, f"best fixed {shape_name(best.shape).removeprefix('tree ')}"))
        own += policies(head, self.models.policies)
        if self.config.compile and compiles:
            own = [way for method in own for way in (method, compiled(method))]
        found = [*stock, *others, *own]
        check_distinct(found)
        return found

    def run(self, done: Callable[[], Any] = lambda: None) -> Iterator[tuple[Prompt, list[Run]]]:
        """Yield each prompt and its runs, judged; `done` is called after each run.

        Raises:
            BusyMachine: plain decoding's rates spread too widely, and noise is not accepted.
        """
        for prompt, runs in self.schedule.run(self.journal, done):
            self.runs += runs
            self.judge.add(prompt, runs)
            if CEILING in self.selected:
                self.ceilings.append(self._ceiling(prompt, runs))
            if not self.config.accept_noise:
                check_spread([run.timing for run in self.runs], str(self.journal.file))
            yield prompt, runs

    def _ceiling(self, prompt: Prompt, runs: list[Run]) -> AnswerTiming:
        """Estimate how fast the oracle would have written the plain text."""
        answer = next(run for run in runs if run.timing.method == PLAIN)
        m = answer.timing
        seed = m.repeat if m.temperature else 0  # greedy repeats write one text
        key = f"ceiling {m.prompt} turn {m.turn} temperature {m.temperature:g} seed {seed}"
        if key not in self.journal.notes:
            self.journal.note(key, self.replayer.ceiling(prompt.input_ids, answer.token_ids))
        return ceiling_of(m, self.journal.notes[key])

    def results(self, command: list[str], load: float | None, *, partial: bool) -> dict[str, Any]:
        """Return all of `results.json`.

        Args:
            command: as typed.
            load: processors that others used before the start.
            partial: whether it was stopped.
        """
        timings = [run.timing for run in self.runs]
        trained_on = self.models.trained_on
        return {
            "schema_version": SCHEMA_VERSION,
            "partial": partial,
            "command": command,
            **self.facts,
            "settings": self.settings,
            "training_prompts": {name: None if hashes is None else len(hashes) for name, hashes in trained_on.items()},
            "noise": {"accepted": "accepted_noise" in self.journal.notes, "load_before": load},
            "costs": {name: part for name, part in asdict(self.costs).items() if name != "identity"},
            "best_fixed": self.journal.notes.get("best_fixed"),
            "not_compiled": self.not_compiled,
            "cut_short": sorted(self.schedule.cut),
            "advice": advice_of(self.methods, timings, self._verify_cost()),
            "same_text": dict(self.judge.same_text),
            "unexplained": self.judge.unexplained,
            **measured_part(self.methods, self.runs, self.ceilings),
        }

    def _verify_cost(self) -> float:
        """Return the cost of a forward over `NAMED_NODES` nodes, in forwards of plain decoding."""
        return self.costs.verify_seconds(NAMED_NODES, _ADVICE_CONTEXT) / self.costs.plain_seconds(_ADVICE_CONTEXT)
