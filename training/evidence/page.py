"""`docs/benchmarks.md` from results files: five questions, for each version a table, empty cells with reasons."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any, Self

import numpy as np
from scipy import stats

from transformers_resps.tools.plots import bars
from transformers_resps.tools.results import AnswerTiming, Interval, compare, ratio, table_row, tau_of

from . import experiments as named
from .experiments import QUESTIONS, Experiment, experiments
from .planted import GPUS
from .quiet import apart
from .sealed import Measured, Version, check_alike, check_together


PAGE = Path("docs/benchmarks.md")
REASONS = "reasons.json"  # why an experiment has no file, beside the files
LEAST = 0.97  # that the fifth question asks of each arm
LEARNED = (named.AUTO, named.FITTED, named.PUBLISHED, named.REPAIRED)
FEW_PROMPTS = 25  # below, bootstrap intervals are too narrow
LEAST_PROMPTS = 4  # or groups of a batch; below, no gain is claimed of other prompts
_NOT_RUN = "not measured here"
Row = Mapping[str, Any]  # an answer: `arm`, `prompt`, `turn`, `tokens`, and more


@dataclass(frozen=True)
class Table:
    """The results files of one version on one processor, and why experiments have none."""

    folder: Path
    files: Sequence[Measured]
    reasons: Mapping[str, str]

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read a folder. Raises `UnfitResultsError` for files that no table may hold, or not together."""
        reasons = folder / REASONS
        files = [Measured.read(file) for file in sorted(folder.glob("*.json")) if file != reasons]
        check_together(files)
        return cls(folder, files, json.loads(reasons.read_text("utf-8")) if reasons.is_file() else {})

    @property
    def version(self) -> Version:
        return self.files[0].version

    @property
    def processor(self) -> str:
        return self.files[0].processor if self.files else self.folder.name

    @property
    def date(self) -> str:
        return max((str(one.data.get("date", "")) for one in self.files), default="")


def read_tables(measured: Path) -> list[Table]:
    """Read all folders of results files, the newest first."""
    folders = sorted({file.parent for file in measured.rglob("*.json")})
    tables = [table for table in map(Table.read, folders) if table.files or table.reasons]
    return sorted(tables, key=lambda table: table.date, reverse=True)


def published(name: str, tables: Iterable[Table]) -> "Found | None":
    """Return the newest figures of an experiment."""
    [asked] = (one for one in experiments() if one.name == name)
    return next((found for table in tables if (found := Found.of(asked, table)).processes), None)


@dataclass(frozen=True)
class Found:
    """The results of one experiment, of one version on one processor.

    Attributes:
        processes: the files that give figures; empty where no figure may be shown.
        reason: why; else `None`.
    """

    experiment: Experiment
    processes: Sequence[Measured]
    reason: str | None

    @classmethod
    def of(cls, experiment: Experiment, table: Table, *, quick: bool = False) -> Self:
        """Choose its quiet files. Raises `UnfitResultsError` for one that lacks an arm or asked otherwise."""
        files = [one for one in table.files if one.data["experiment"] == experiment.name]
        for one in files:
            one.check_arms(one.data["arms"])
        check_alike(files)
        noise = noise_of(experiment, files) if not quick else {}
        kept = [one for one in files if one.file not in noise]
        if len(kept) >= experiment.processes:
            return cls(experiment, kept, None)
        if not files:
            return cls(experiment, [], table.reasons.get(experiment.name, _NOT_RUN))
        told = (
            f"not quiet: {next(iter(noise.values()))}" if noise else f"{len(kept)} of {experiment.processes} processes"
        )
        return cls(experiment, [], told)

    @property
    def title(self) -> str:
        return self.experiment.title

    @property
    def left_out(self) -> dict[str, str]:
        """Arms that were not measured, with reasons."""
        return dict(self.processes[0].data["left_out"]) if self.processes else {}

    @cached_property
    def timings(self) -> list[list[AnswerTiming]]:
        return [one.timings for one in self.processes]

    def over(self, arm: str, base: str, prompts: Iterable[str] | None = None) -> Interval | None:
        """Return the speed of an arm over another, on some prompts or all; `None` where one was not measured."""
        if any(not self.of_arm(name) for name in (arm, base)):
            return None
        wanted = None if prompts is None else set(prompts)
        kept = [[m for m in own if wanted is None or m.prompt in wanted] for own in self.timings]
        return compare(kept, arm, base)

    def of_processes(self, arm: str, base: str) -> str:
        """Return the lowest and the highest ratio of a process."""
        alone = [ratio(own, arm, base) for own in self.timings]
        return f"{min(alone):.2f} to {max(alone):.2f}" if len(alone) > 1 else ""

    def of_arm(self, arm: str) -> list[Row]:
        return [row for one in self.processes for row in one.data["rows"] if row["arm"] == arm]

    def tau(self, arm: str) -> float:
        return tau_of(m for own in self.timings for m in own if m.method == arm)

    @property
    def prompts(self) -> int:
        return len({row["prompt"] for row in self.processes[0].data["rows"]}) if self.processes else 0


def noise_of(experiment: Experiment, files: Sequence[Measured]) -> dict[Path, str]:
    """Return the files that give no ratio, each with the reason: others disturbed it, or it lies apart."""
    if not experiment.is_judged:
        return {}
    noise = {one.file: one.watch.reasons[0] for one in files if one.watch.reasons}
    kept = [one for one in files if one.file not in noise]
    base, *arms = [arm for arm in kept[0].data["arms"] if arm not in kept[0].data["left_out"]] if kept else [""]
    distances = apart([[ratio(one.timings, arm, base) for arm in arms] for one in kept])
    return noise | {one.file: told[0] for one, told in zip(kept, distances, strict=True) if told}


@dataclass(frozen=True, slots=True)
class Answer:
    """What stands below one question: columns, rows of cells, bars of the picture, and a sentence below the table."""

    columns: Sequence[str]
    rows: list[list[str]]
    bars: list[tuple[str, Interval]]
    note: str = ""


def _measured(found: Sequence[Found], rows: list[list[str]], columns: Sequence[str]) -> Iterator[Found]:
    """Yield the experiments with figures; in its turn each other one gets a row of empty cells and its reason."""
    for one in found:
        if one.processes:
            yield one
        else:
            rows.append([one.title, *[""] * (len(columns) - 2), str(one.reason)])


def same_text(found: Sequence[Found]) -> Answer:
    """Count equal texts and right answers; show where the other texts part, and the gap of the logits there."""
    columns = ["experiment", "arm", "texts", "equal or right", "95% interval", "first difference", "largest gap"]
    rows, drawn = [], []
    for one in _measured(found, rows, columns):
        if one.experiment.kind == named.SAMPLES:
            rows += [*_sampled(one)]
        else:
            for arm in one.experiment.arms:
                if (own := one.of_arm(arm)) and not (arm == one.experiment.arms[0] and "right" not in own[0]):
                    good = sum(row["right"] if "right" in row else row["same"] for row in own)
                    low, high = share_interval(good, len(own))
                    parted = [row for row in own if "position" in row]
                    place = f"token {median(row['position'] for row in parted):.0f}" if parted else ""
                    odd = sum(not row["explained"] for row in parted)
                    gap = f"{max(row['gap'] for row in parted):.2f}" if parted else ""
                    gap += f", {odd} unexplained" if odd else ""
                    rows.append([one.title, arm, str(len(own)), str(good), f"{low:.1%} to {high:.1%}", place, gap])
                    drawn.append((f"{one.title}, {arm}", Interval(good / len(own), low, high)))
    return Answer(columns, rows, drawn)


def share_interval(successes: int, of: int) -> tuple[float, float]:
    """Return the 95% interval of a share (Wilson, JASA 22, 1927)."""
    low, high = stats.binomtest(successes, of).proportion_ci(method="wilson")
    return float(low), float(high)


def variation(own: Sequence[Sequence[int]], other: Sequence[Sequence[int]], draws: int = 499) -> tuple[float, float]:
    """Return how far two groups of sampled texts lie apart, and the p-value of that by permuting the groups.

    The distance is the total variation of the tokens' frequencies at a position, averaged over the positions; all
    texts have one length.
    """
    texts = np.array([*own, *other])
    said = np.hstack([column[:, None] == np.unique(column) for column in texts.T]).astype(float)

    def distance(group: Any, rest: Any) -> Any:
        return np.abs(said[group].mean(0) - said[rest].mean(0)).sum() / 2 / texts.shape[1]

    numbers, rng = np.arange(len(texts)), np.random.default_rng(0)
    groups = numbers[: len(own)], numbers[len(own) :]
    drawn: dict[str, Any] = {"n_resamples": draws, "alternative": "greater", "vectorized": False, "rng": rng}
    found = stats.permutation_test(groups, distance, **drawn)
    return float(found.statistic), float(found.pvalue)


def _sampled(one: Found) -> Iterable[list[str]]:
    base, *others = one.experiment.arms
    for arm in others:
        distances, chances = [], []
        for prompt in sorted({row["prompt"] for row in one.of_arm(base)}):
            texts = [[row["ids"] for row in one.of_arm(name) if row["prompt"] == prompt] for name in (base, arm)]
            distance, chance = variation(*texts)
            distances.append(distance)
            chances.append(chance)
        told = f"variation {median(distances):.3f}, least p {min(chances):.2f} of {len(chances)}"
        yield [one.title, arm, str(len(one.of_arm(arm))), told, "", "", ""]


def policies(found: Sequence[Found]) -> Answer:
    """Compare every policy with the best fixed tree."""
    columns = [
        "setting",
        "prompts",
        f"{named.FIXED} over plain",
        *LEARNED,
        "processes, `auto`",
        "oracle, `auto`'s share",
    ]
    rows, drawn = [], []
    for one in _measured(found, rows, columns):
        fixed = one.over(named.FIXED, named.PLAIN)
        learned = {arm: one.over(arm, named.FIXED) for arm in LEARNED}
        auto, oracle = learned[named.AUTO], one.over(named.ORACLE, named.FIXED)
        alone = "" if auto is None else one.of_processes(named.AUTO, named.FIXED)
        cells = [*map(_speed, learned.values()), alone, _gap(auto, oracle)]
        rows.append([one.title, str(one.prompts), _speed(fixed), *cells])
        drawn += [(f"{one.title}, {arm}", value) for arm, value in learned.items() if value]
    return Answer(columns, rows, drawn)


def _gap(policy: Interval | None, oracle: Interval | None) -> str:
    """Return the oracle over the best fixed tree, and the share of that gap that a policy takes."""
    if policy is None or oracle is None:
        return ""
    share = f", {(policy.ratio - 1) / (oracle.ratio - 1):.0%}" if oracle.ratio > 1.03 else ""
    return f"{oracle.ratio:.2f}{share}"


def engines(found: Sequence[Found]) -> Answer:
    """Compare every engine with stock `generate` and compiled plain decoding, and its speed with its tau."""
    columns = ["target, arm", "over stock", "over plain", "tau", "over plain / tau", "first token, ms", "peak MiB"]
    columns.append("accepted at 1, 2, 3")
    peaks = {(one.experiment.target, row["arm"]): row["mib"] for one in found if one.experiment.kind == named.MEMORY
             for own in one.processes for row in own.data["rows"]}  # fmt: skip
    rows, drawn, phases = [], [], []
    for one in _measured([one for one in found if one.experiment.kind != named.MEMORY], rows, columns):
        for arm in one.experiment.arms:
            stock, plain = one.over(arm, named.STOCK), one.over(arm, named.PLAIN)
            if plain is None:
                continue
            title, mean = f"{one.title}, {arm}", one.tau(arm)
            first = 1e3 * median(row["first"] for row in one.of_arm(arm))
            peak = peaks.get((one.experiment.target, arm))
            is_told = first and not any(own.watch.reasons_against_times for own in one.processes)
            cells = [f"{mean:.2f}", f"{plain.ratio / mean:.2f}", f"{first:.0f}" if is_told else ""]
            cells.append("" if peak is None else f"{peak:.0f}")
            rows.append([title, _speed(stock), _speed(plain), *cells, _positions(one.of_arm(arm))])
            if stock is not None:
                drawn.append((title, stock))
        if one.experiment.arms[0] == named.STOCK:
            phases.append(f"{one.title}: {_phases(one.of_arm(named.AUTO))}")
    note = f"Where the seconds of `auto` go. {'. '.join(phases)}."
    return Answer(columns, rows, drawn, note if phases else "")


def _phases(rows: Sequence[Row]) -> str:
    shares = {"prompt": "first", "draft": "draft", "verification": "verify"}
    total = sum(row["seconds"] for row in rows)
    parts = {phase: sum(row[name] for row in rows) / total for phase, name in shares.items()}
    return ", ".join(f"{phase} {part:.0%}" for phase, part in {**parts, "rest": 1 - sum(parts.values())}.items())


def budgets(found: Sequence[Found]) -> Answer:
    """Compare chains and trees of one block head by their nodes, measured and priced for GPUs."""
    columns = ["nodes", "chain", "tree", "tau, chain", "tau, tree"]
    columns += [f"planted {gpu.name}: {kind}" for gpu in GPUS for kind in ("chain", "tree")]
    pays: dict[str, int] = dict.fromkeys(("here", *(f"at planted costs of an {gpu.name}" for gpu in GPUS)), 0)
    rows, drawn = [], []
    for one in _measured(found, rows, columns):
        for nodes in named.BUDGETS:
            arms = [f"{kind} of {nodes}" for kind in ("chain", "tree")]
            pairs = [(arm, one.over(arm, named.PLAIN)) for arm in arms]
            taus = ["" if value is None else f"{one.tau(arm):.2f}" for arm, value in pairs]
            planted = [None if value is None else gpu.block_speed(*_counted(one.of_arm(arm)))
                       for gpu in GPUS for arm, value in pairs]  # fmt: skip
            measured = [None if value is None else value.ratio for _, value in pairs]
            for where, gain in zip(pays, [measured[1], *planted[1::2]], strict=True):
                pays[where] = nodes if gain is not None and gain > 1 else pays[where]
            priced = ["" if gain is None else f"{gain:.2f}" for gain in planted]
            rows.append([str(nodes), *(_speed(value) for _, value in pairs), *taus, *priced])
            drawn += [(arm, value) for arm, value in pairs if value]
    told = ", ".join(f"{where} to {nodes}" if nodes else f"{where} never" for where, nodes in pays.items())
    note = f"Break-even, in nodes: trees are faster than plain decoding {told}."
    return Answer(columns, rows, drawn, note if drawn else "")


def never_slower(found: Sequence[Found]) -> Answer:
    """Compare every arm that should lose with plain decoding."""
    columns = ["setting", "arm", "over plain", "processes", f"at least {LEAST}"]
    rows, drawn = [], []
    for one in _measured(found, rows, columns):
        for arm in one.experiment.arms[1:]:
            value = one.over(arm, named.PLAIN)
            if value is not None:
                verdict = "yes" if value.ratio >= LEAST else "**no**"
                alone = one.of_processes(arm, named.PLAIN)
                rows.append([one.title, arm, _speed(value), alone, verdict])
                drawn.append((f"{one.title}, {arm}", value))
    return Answer(columns, rows, drawn)


MAKERS: dict[int, Callable[[Sequence[Found]], Answer]] = {
    1: same_text, 2: policies, 3: engines, 4: budgets, 5: never_slower,
}  # fmt: skip
SAYS = {
    1: "Texts that equal the first arm's to the last token; right answers for GSM8K.",
    2: "Speed over the best fixed tree, which was found on other prompts. A gain has a lower end above 1. Re-SpS "
    "drafts with the head alone, others also look up the text; repaired, it learned one tree for all steps. "
    "The two simulated GPUs are limited by reading weights, so their ratios are equal.",
    3: "Speed over stock `generate` and over our compiled plain decoding; efficiency is the latter over tau. In few "
    "bits: torchao's int8, or int4 in groups of 64, with the output head in int8; plain decoding is in bfloat16.",
    4: "Speed over compiled plain decoding. Planted columns price the counted steps by a GPU's data sheet.",
    5: f"Speed over compiled plain decoding where drafting cannot pay; {LEAST} is asked of each.",
}


def write_page(page: Path, measured: Path, *, quick: bool = False) -> None:
    """Write the page and its pictures, which lie beside it.

    Raises:
        UnfitResultsError: a file was edited, lacks an arm or is of an unknown version; a table would hold two versions
            or processors.
    """
    tables = read_tables(measured) or [Table(measured, [], {})]
    asked = experiments("quick" if quick else "")
    found = [[Found.of(one, table, quick=quick) for one in asked] for table in tables]
    gained = next((own for own in found if any(one.experiment.question == 2 and one.processes for one in own)), [])
    lines = ["# Benchmarks", ""]
    if quick:
        lines += ["**This proves nothing**: five prompts in one process, on a machine that may be busy.", ""]
    lines += [verdict([one for one in gained if one.experiment.question == 2 and one.experiment.is_timed]), "", _HEAD]
    if any(0 < one.prompts < FEW_PROMPTS for one in chain.from_iterable(found)):
        lines[-1] += f" Intervals over fewer than {FEW_PROMPTS} prompts are too narrow."
    for number, question in QUESTIONS.items():
        lines += ["", f"## {number}. {question}", SAYS[number]]
        missing = {one.experiment.name for one in found[0]}
        missing -= {one.experiment.name for own in found for one in own if one.processes}
        pictures = iter([page.with_name(f"question-{number}.svg")])
        for place, (table, own) in enumerate(zip(tables, found, strict=True)):
            rows = [one for one in own if one.experiment.question == number]
            rows = [one for one in rows if one.processes or (not place and one.experiment.name in missing)]
            if rows:
                caption = (
                    f"Measured: version `{table.version}` on {table.processor}, in bfloat16." if table.files else ""
                )
                lines += [caption, *_answer(MAKERS[number](rows), rows, question, pictures)]
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")


_HEAD = """[The protocol](../training/PROTOCOL.md) was made before any run. Speeds are total tokens over total seconds,
with paired 95% intervals over requests and processes, of one version each: `make evidence-drift` checks another."""


def _answer(answer: Answer, rows: Sequence[Found], question: str, pictures: Iterator[Path]) -> Iterator[str]:
    """Yield the table of one version with its notes; that of the newest version has the picture."""
    if answer.bars and (picture := next(pictures, None)):
        picture.write_text(bars(answer.bars, question), encoding="utf-8")
        yield f"![{question}]({picture.name})"
    yield ""
    words = 1 + (answer.columns[1] == "arm")
    rules = ["---"] * words + ["---:"] * (len(answer.columns) - words)
    yield from (re.sub(r"\|  (?=\|)", "|", table_row(cells)) for cells in (list(answer.columns), rules, *answer.rows))
    if answer.note:
        yield from ("", answer.note)
    left_out: dict[str, dict[str, None]] = {}
    for arm, reason in (pair for one in rows for pair in one.left_out.items()):
        left_out.setdefault(reason, {})[arm] = None
    if left_out:
        told = (f"{', '.join(arms)}: {reason}" for reason, arms in left_out.items())
        yield from ("", f"Not measured: {'; '.join(told)}.")


def verdict(found: Sequence[Found]) -> str:
    """Say whether a learned policy gains over the best fixed tree, and what to do if none does."""
    gains = {(one.title, arm): value for one in found if one.prompts >= LEAST_PROMPTS for arm in LEARNED
             if (value := one.over(arm, named.FIXED)) is not None}  # fmt: skip
    if not gains:
        return "Whether a policy gains over the best fixed tree was not measured."
    settings = Counter(arm for _, arm in gains)
    clear = Counter(arm for (_, arm), value in gains.items() if value.low > 1)
    told = ", ".join(f"{arm} in {clear[arm]} of {count} settings" for arm, count in settings.items())
    if not clear:
        advice = "find that tree with `resps bench --shapes`, and pass it as `policy`; `auto` needs no search"
        return f"**No learned policy gains over the best fixed tree here**: {advice}."
    if not clear.keys() - {named.AUTO}:
        return f'**No trained policy gains over the best fixed tree here; pass `policy="auto"`**, which gains: {told}.'
    won = ", ".join(f"{arm} in {clear[arm]} of {count} settings" for arm, count in settings.items() if clear[arm])
    return f'Gains over the best fixed tree: {won}, no other. Pass `policy="auto"`, which needs no search or training.'


def _speed(value: Interval | None) -> str:
    return "" if value is None else str(value)


def _positions(rows: Sequence[Row]) -> str:
    """Return the shares of steps after the prefill that accepted at least one, two, three drafted tokens."""
    _, steps = _counted(rows)
    accepted: Counter[int] = Counter()
    for step, count in steps.items():
        accepted[int(step.partition("/")[2])] += count
    total = sum(accepted.values())
    if not total or not any(accepted.keys()):
        return ""
    return ", ".join(f"{sum(n for k, n in accepted.items() if k >= least) / total:.2f}" for least in (1, 2, 3))


def _counted(rows: Sequence[Row]) -> tuple[int, dict[str, int]]:
    """Count the tokens of the steps after the prefill, and the steps of each kind."""
    steps: Counter[str] = Counter()
    for row in rows:
        steps.update(row.get("steps", {}))
    return sum(count * (1 + int(step.partition("/")[2])) for step, count in steps.items()), dict(steps)
