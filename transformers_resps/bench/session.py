"""One benchmark from its settings to its results. It prints nothing."""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch

from ..calibration.cost_table import CostTable
from ..calibration.measuring import calibrate
from ..tree import TreeShape
from .advice import NAMED_NODES
from .headroom import BestFixed, Replayer, ceiling_of, shapes_for
from .journal import JOURNAL, Journal
from .judging import Judge
from .methods import (
    BEST_FIXED,
    CEILING,
    CHOICES,
    EAGLE,
    PROMPT_LOOKUP,
    Method,
    check_distinct,
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
from .prompts import Dialogue, Prompt, check_apart, check_stems, read_dialogues, spread, to_tokens
from .protocol import Bench, Run, Schedule
from .provenance import code, machine
from .results import SCHEMA_VERSION, advice_of, measured_part
from .timing import PLAIN, AnswerTiming


_MAX_SEARCHED = 8  # prompts, shared among the datasets
_ADVICE_CONTEXT = 128  # positions


class Session:
    """Everything between the command line and the files.

    Args:
        args: of `add_options`.
        models: loaded.
        say: told what is being done, in a few words.

    Raises:
        ValueError: the evaluation would not be fair, the output folder belongs to other settings, or an option is
            impossible.
    """

    def __init__(self, args: argparse.Namespace, models: BenchModels, say: Callable[[str], None]) -> None:
        self.args, self.models, self._say = args, models, say
        self.selected = CHOICES if args.methods is None else tuple(args.methods)
        check_stems(args.dataset)
        sources = {source: read_dialogues(source, args.split) for source in args.dataset}
        self.dialogues = [dialogue for rows in sources.values() for dialogue in spread(rows, args.limit)]
        self.searched = self._search_dialogues(list(sources.values())) if BEST_FIXED in self.selected else []
        if not self.searched:  # only if it was not asked for by name
            self.selected = tuple(name for name in self.selected if name != BEST_FIXED)
        self._check_prompts()
        self.peers = load_peers(args.peers, models.target, models.draft_model)
        self.settings = self._settings()
        self.journal = Journal.open(args.output, self.settings)
        if args.accept_noise:  # what was measured so stays so when the run is resumed
            self.journal.note("accepted_noise", True)
        self.bench = Bench(models.target, args.max_new_tokens)
        self.costs: CostTable | None = None
        self.replayer: Replayer | None = None
        self.methods: list[Method] = []
        self.ceilings: list[AnswerTiming] = []
        self._whole: list[Run] = []

    def _search_dialogues(self, sources: list[list[Dialogue]]) -> list[Dialogue]:
        """Prompts that are not evaluated: of `--search-dataset`, or what the limit leaves of the datasets.

        Where it leaves none, the best fixed tree is left out, unless it was asked for by name.
        """
        if self.args.search_dataset:
            return spread(read_dialogues(self.args.search_dataset, self.args.split), _MAX_SEARCHED)
        evaluated = {dialogue.fingerprint for dialogue in self.dialogues}
        rest = [[dialogue for dialogue in rows if dialogue.fingerprint not in evaluated] for rows in sources]
        each = max(1, _MAX_SEARCHED // len(sources))
        found = [dialogue for rows in rest if rows for dialogue in spread(rows, each)]
        if not found and self.args.methods is not None:
            raise ValueError(
                "All prompts are evaluated, and none is left to find the best fixed tree on. Lower --limit, pass "
                "--search-dataset, or choose --methods without best-fixed."
            )
        return found

    def _check_prompts(self) -> None:
        check_apart(self.dialogues, {d.fingerprint for d in self.searched}, "those of --search-dataset")
        for name, hashes in self.models.trained_on.items():
            check_apart(self.dialogues, hashes or set(), f"the training prompts of {name}")

    def _settings(self) -> dict[str, Any]:
        """What must stay the same for all figures of one table."""
        args = self.args
        return {
            **self.models.identity,
            **machine(self.models.target),
            **code(),
            "peers": peer_versions(args.peers),
            "methods": list(self.selected),
            "shapes": [shape_name(shape) for shape in args.shapes],
            "datasets": list(args.dataset),
            "split": args.split,
            "prompts": {dialogue.name: dialogue.fingerprint for dialogue in self.dialogues},
            "searched": {dialogue.name: dialogue.fingerprint for dialogue in self.searched},
            "temperatures": list(args.temperature),
            "max_new_tokens": args.max_new_tokens,
            "repeats": args.repeats,
        }

    def prepare(self) -> Schedule:
        """Measure costs, find the best fixed tree, and warm up; then all is ready to be timed."""
        target, head = self.models.target, self.models.head
        self._say("Measuring the cost of steps")
        self.costs = calibrate(target, head, folder=self.args.output / "costs")
        if not {BEST_FIXED, CEILING}.isdisjoint(self.selected):
            grid = shapes_for(target.device.type)
            self.replayer = Replayer(target, head, grid, self.costs, self.args.max_new_tokens)
        self.methods = self._choose_methods()
        schedule = Schedule(
            self.dialogues, self.methods, self.args.temperature, self.args.repeats, self.models.tokenizer
        )
        schedule.check_room(self.bench)
        self._say("Warming up")
        self.bench.warm_up(schedule.first_prompt(self.dialogues[0]), self.methods)
        target.policy_cache.clear()  # "auto" keeps what it learns from answer to answer, and starts knowing nothing
        self.judge = Judge(target, self.methods)
        return schedule

    def _choose_methods(self) -> list[Method]:
        head = self.models.head
        found = [plain()]
        if PROMPT_LOOKUP in self.selected:
            found.append(prompt_lookup())
        if self.models.draft_model is not None:
            found.append(draft_model(self.models.draft_model))
        found += peers(self.peers)
        if EAGLE in self.selected:
            found += eagle_trees(head)
        found += [fixed_tree(head, shape) for shape in self.args.shapes]
        best = self.best_fixed()
        if best is not None:
            found.append(fixed_tree(head, best.shape, f"best fixed {shape_name(best.shape).removeprefix('tree ')}"))
        found += policies(head, self.models.policies)
        check_distinct(found)
        return found

    def best_fixed(self) -> BestFixed | None:
        """Found once, then read from the journal."""
        if BEST_FIXED not in self.selected or self.replayer is None:
            return None
        if "best_fixed" not in self.journal.notes:
            tokenizer = self.models.tokenizer

            def prompts() -> Iterator[tuple[str, torch.Tensor]]:
                for number, dialogue in enumerate(self.searched, start=1):
                    self._say(f"Looking for the best fixed tree, prompt {number} of {len(self.searched)}")
                    yield dialogue.name, to_tokens(dialogue.asked([]), tokenizer)

            best = self.replayer.find_best_fixed(prompts(), min(self.args.temperature))
            self.journal.note("best_fixed", best.to_dict())
        return BestFixed.from_dict(self.journal.notes["best_fixed"])

    def add(self, prompt: Prompt, runs: list[Run]) -> None:
        """Judge a cell, see how far the oracle would have come, and whether the machine is still quiet.

        Raises:
            BusyMachine: plain decoding's rates spread too widely, and noise is not accepted.
        """
        self._whole += runs
        self.judge.add(prompt, runs)
        answer = next(run for run in runs if run.timing.method == PLAIN)
        if CEILING in self.selected and self.replayer is not None:
            m = answer.timing
            seed = m.repeat if m.temperature else 0  # greedy repeats write one text
            key = f"ceiling {m.prompt} turn {m.turn} temperature {m.temperature:g} seed {seed}"
            if key not in self.journal.notes:
                self.journal.note(key, self.replayer.ceiling(prompt.input_ids, answer.token_ids))
            self.ceilings.append(ceiling_of(m, self.journal.notes[key]))
        if not self.args.accept_noise:
            check_spread([run.timing for run in self._whole], str(self.args.output / JOURNAL))

    def results(self, command: list[str], load: float | None, cut: set[str], *, partial: bool) -> dict[str, Any]:
        """All of `results.json`."""
        timings = [run.timing for run in self._whole]
        facts = {name: value for name, value in self.settings.items() if name not in _ONLY_SETTINGS}
        return {
            "schema_version": SCHEMA_VERSION,
            "partial": partial,
            "command": command,
            **facts,
            "settings": {name: self.settings[name] for name in _ONLY_SETTINGS},
            "training_prompts": {
                name: None if hashes is None else len(hashes) for name, hashes in self.models.trained_on.items()
            },
            "noise": {"accepted": "accepted_noise" in self.journal.notes, "load_before": load},
            "costs": self._costs(),
            "best_fixed": self.journal.notes.get("best_fixed"),
            "cut_short": sorted(cut),
            "advice": advice_of(self.methods, timings, self.verify_cost()),
            "same_text": dict(self.judge.same_text),
            "unexplained": self.judge.unexplained,
            **measured_part(self.methods, self._whole, self.ceilings),
        }

    def _costs(self) -> dict[str, Any]:
        assert self.costs is not None
        return {name: part for name, part in asdict(self.costs).items() if name != "identity"}

    def verify_cost(self) -> float | None:
        """Of a forward over `NAMED_NODES` nodes, in forwards of plain decoding."""
        if self.costs is None:
            return None
        return self.costs.verify_seconds(NAMED_NODES, _ADVICE_CONTEXT) / self.costs.plain_seconds(_ADVICE_CONTEXT)


_ONLY_SETTINGS = (
    "methods", "shapes", "datasets", "split", "prompts", "searched", "temperatures", "max_new_tokens", "repeats",
)  # fmt: skip


def first_shape(args: argparse.Namespace, models: BenchModels) -> TreeShape:
    """What `--profile` looks at: the first of `--shapes`, or the head's own."""
    shape: TreeShape = args.shapes[0] if args.shapes else models.head.default_shape
    return shape
