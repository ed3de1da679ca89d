"""`docs/benchmarks.md` from results files: five questions, a table and a picture each, empty cells with reasons."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import chain
from pathlib import Path
from statistics import median
from string import ascii_uppercase

from . import experiments as named
from .experiments import QUESTIONS, Experiment, experiments
from .planted import GPUS
from .quiet import apart
from .sealed import Measured, check_together
from .statistic import Row, Speed, speed, tau, wilson


PAGE = Path("docs/benchmarks.md")
REASONS = "reasons.json"  # why an experiment has no file, beside the files
LEAST = 0.97  # that the fifth question asks of each arm
LEARNED = (named.AUTO, named.FITTED, named.PUBLISHED, named.REPAIRED)
FEW_PROMPTS = 25  # below, bootstrap intervals are too narrow
LEAST_PROMPTS = 4  # or groups of a batch; below, no gain is claimed of other prompts
_NOT_RUN = "not measured here"


@dataclass(frozen=True, slots=True)
class Found:
    """The results of one experiment on one processor.

    Attributes:
        rows: of each process; empty where no figure may be shown.
        reason: why; else `None`.
        left_out: arms that were not measured, with reasons.
        processor: its name.
        mark: after titles, where there are several processors.
    """

    experiment: Experiment
    rows: list[list[Row]]
    reason: str | None
    left_out: dict[str, str]
    processor: str
    mark: str = ""

    @property
    def title(self) -> str:
        return self.experiment.title + self.mark

    @classmethod
    def read(cls, experiment: Experiment, folder: Path, code: str, page: Path, *, quick: bool) -> "Found":
        """Read and check its files. Raises `UnfitResultsError` for one that no table may hold."""
        files = [folder / f"{experiment.name}-{number}.json" for number in range(experiment.processes)]
        there = [Measured.read(file) for file in files if file.is_file()]
        for one in there:
            one.check_code(code, page.name)
            one.check_arms(experiment.arms)
        check_together(there)
        if len(there) < len(files):
            told = folder / REASONS
            reasons = json.loads(told.read_text("utf-8")) if told.is_file() else {}
            reason = f"{len(there)} of {len(files)} processes" if there else reasons.get(experiment.name, _NOT_RUN)
            return cls(experiment, [], reason, {}, folder.name)
        rows, left_out = [one.data["rows"] for one in there], there[0].data["left_out"]
        noisy = list(chain.from_iterable(one.reasons for one in there))
        if experiment.is_timed and not experiment.neighbour and named.PLAIN in experiment.arms:
            noisy += apart([_rate(own, named.PLAIN) for own in rows])
        reason = f"not quiet: {noisy[0]}" if noisy and not quick else None
        return cls(experiment, [] if reason else rows, reason, left_out, there[0].processor)

    def over(self, arm: str, base: str) -> Speed | None:
        """Return the speed of an arm over another; `None` where one was not measured."""
        if not self.rows or any(self._is_missing(name) for name in (arm, base)):
            return None
        return speed(self.rows, arm, base)

    def of(self, arm: str) -> list[Row]:
        return [row for own in self.rows for row in own if row["arm"] == arm]

    def _is_missing(self, arm: str) -> bool:
        return arm in self.left_out or arm not in self.experiment.arms

    @property
    def prompts(self) -> int:
        return len({row["prompt"] for row in self.rows[0]}) if self.rows else 0


def _rate(rows: Iterable[Row], arm: str) -> float:
    own = [row for row in rows if row["arm"] == arm]
    return sum(row["tokens"] for row in own) / sum(row["seconds"] for row in own)


@dataclass(frozen=True, slots=True)
class Answer:
    """What stands below one question: columns, rows of cells, bars of the picture, and a sentence below the table."""

    columns: Sequence[str]
    rows: list[list[str]]
    bars: list[tuple[str, Speed]]
    note: str = ""


def same_text(found: Sequence[Found]) -> Answer:
    """How many texts are equal, where the others part, how far the logits lie apart there; right answers."""
    columns = ["experiment", "arm", "texts", "equal or right", "95% interval", "first difference", "largest gap"]
    rows, bars = [], []
    for one in found:
        if not one.rows:
            rows.append(_empty(one, columns))
        elif one.experiment.kind == named.SAMPLES:
            rows += [*_sampled(one)]
        else:
            for arm in one.experiment.arms:
                if (own := one.of(arm)) and not (arm == one.experiment.arms[0] and "right" not in own[0]):
                    good = sum(row["right"] if "right" in row else row["same"] for row in own)
                    low, high = wilson(good, len(own))
                    parted = [row for row in own if "position" in row]
                    place = f"token {median(row['position'] for row in parted):.0f}" if parted else ""
                    odd = sum(not row["explained"] for row in parted)
                    gap = f"{max(row['gap'] for row in parted):.2f}" if parted else ""
                    gap += f", {odd} unexplained" if odd else ""
                    share = f"{low:.1%} to {high:.1%}"
                    rows.append([one.title, arm, str(len(own)), str(good), share, place, gap])
                    bars.append((f"{one.title}, {arm}", Speed(good / len(own), low, high, low, high)))
    return Answer(columns, rows, bars)


def _sampled(one: Found) -> Iterable[list[str]]:
    from .statistic import permutation_p

    base, *others = one.experiment.arms
    for arm in others:
        distances, chances = [], []
        for prompt in sorted({row["prompt"] for row in one.rows[0]}):
            texts = [[row["ids"] for row in one.of(name) if row["prompt"] == prompt] for name in (base, arm)]
            distance, chance = permutation_p(*texts)
            distances.append(distance)
            chances.append(chance)
        told = f"variation {median(distances):.3f}, least p {min(chances):.2f} of {len(chances)}"
        yield [one.title, arm, str(len(one.of(arm))), told, "", "", ""]


def policies(found: Sequence[Found]) -> Answer:
    """Every policy over the best fixed tree."""
    columns = [
        "setting",
        "prompts",
        f"{named.FIXED} over plain",
        *LEARNED,
        "processes, `auto`",
        "oracle, `auto`'s share",
    ]
    rows, bars = [], []
    for one in found:
        if not one.rows:
            rows.append(_empty(one, columns))
            continue
        fixed = one.over(named.FIXED, named.PLAIN)
        learned = {arm: one.over(arm, named.FIXED) for arm in LEARNED}
        auto, oracle = learned[named.AUTO], one.over(named.ORACLE, named.FIXED)
        apart = "" if auto is None or len(one.rows) == 1 else f"{auto.lowest:.2f} to {auto.highest:.2f}"
        cells = [*map(_speed, learned.values()), apart, _gap(auto, oracle)]
        rows.append([one.title, str(one.prompts), _speed(fixed), *cells])
        bars += [(f"{one.title}, {arm}", value) for arm, value in learned.items() if value]
    return Answer(columns, rows, bars)


def _gap(policy: Speed | None, oracle: Speed | None) -> str:
    """The oracle over the best fixed tree, and how much of that gap a policy takes."""
    if policy is None or oracle is None:
        return ""
    share = f", {(policy.ratio - 1) / (oracle.ratio - 1):.0%}" if oracle.ratio > 1.03 else ""
    return f"{oracle.ratio:.2f}{share}"


def engines(found: Sequence[Found]) -> Answer:
    """Every engine over stock `generate` and over compiled plain decoding, and what of tau became speed."""
    columns = ["target, arm", "over stock", "over plain", "tau", "over plain / tau", "first token, ms", "peak MiB"]
    columns.append("accepted at 1, 2, 3")
    peaks = {f"{one.title}, {row['arm']}": row["mib"] for one in found if one.experiment.kind == named.MEMORY
             for own in one.rows for row in own}  # fmt: skip
    rows, bars, phases = [], [], []
    for one in found:
        if one.experiment.kind == named.MEMORY:
            continue
        if not one.rows:
            rows.append(_empty(one, columns))
            continue
        for arm in one.experiment.arms:
            stock, plain = one.over(arm, named.STOCK), one.over(arm, named.PLAIN)
            if stock is None or plain is None:
                continue
            title, mean = f"{one.title}, {arm}", tau(one.rows, arm)
            first, peak = 1e3 * median(row["first"] for row in one.of(arm)), peaks.get(title)
            cells = [f"{mean:.2f}", f"{plain.ratio / mean:.2f}", f"{first:.0f}" if first else ""]
            cells.append("" if peak is None else f"{peak:.0f}")
            rows.append([title, _speed(stock), _speed(plain), *cells, _positions(one.of(arm))])
            bars.append((title, stock))
        phases.append(f"{one.title}: {_phases(one.of(named.AUTO))}")
    note = f"Where the seconds of `auto` go. {'. '.join(phases)}."
    return Answer(columns, rows, bars, note if phases else "")


def _phases(rows: Sequence[Row]) -> str:
    shares = {"prompt": "first", "draft": "draft", "verification": "verify"}
    total = sum(row["seconds"] for row in rows)
    parts = {phase: sum(row[name] for row in rows) / total for phase, name in shares.items()}
    return ", ".join(f"{phase} {part:.0%}" for phase, part in {**parts, "rest": 1 - sum(parts.values())}.items())


def budgets(found: Sequence[Found]) -> Answer:
    """Chains and trees of one block head by their nodes, measured and priced for GPUs."""
    columns = ["nodes", "chain", "tree", "tau, chain", "tau, tree"]
    columns += [f"planted {gpu.name}: {kind}" for gpu in GPUS for kind in ("chain", "tree")]
    pays: dict[str, int] = dict.fromkeys(("here", *(f"at planted costs of an {gpu.name}" for gpu in GPUS)), 0)
    rows, bars = [], []
    for one in found:
        if not one.rows:
            rows.append(_empty(one, columns))
            continue
        for nodes in named.BUDGETS:
            arms = [f"{kind} of {nodes}" for kind in ("chain", "tree")]
            pairs = [(arm, one.over(arm, named.PLAIN)) for arm in arms]
            taus = ["" if value is None else f"{tau(one.rows, arm):.2f}" for arm, value in pairs]
            planted = [None if value is None else gpu.block_speed(*_counted(one.of(arm)))
                       for gpu in GPUS for arm, value in pairs]  # fmt: skip
            measured = [None if value is None else value.ratio for _, value in pairs]
            for where, ratio in zip(pays, [measured[1], *planted[1::2]], strict=True):
                pays[where] = nodes if ratio is not None and ratio > 1 else pays[where]
            priced = ["" if ratio is None else f"{ratio:.2f}" for ratio in planted]
            rows.append([str(nodes), *(_speed(value) for _, value in pairs), *taus, *priced])
            bars += [(arm, value) for arm, value in pairs if value]
    told = ", ".join(f"{where} to {nodes}" if nodes else f"{where} never" for where, nodes in pays.items())
    note = f"Break-even, in nodes: trees are faster than plain decoding {told}."
    return Answer(columns, rows, bars, note if bars else "")


def never_slower(found: Sequence[Found]) -> Answer:
    """Every arm that should lose, over plain decoding."""
    columns = ["setting", "arm", "over plain", "processes", f"at least {LEAST}"]
    rows, bars = [], []
    for one in found:
        if not one.rows:
            rows.append(_empty(one, columns))
            continue
        for arm in one.experiment.arms[1:]:
            value = one.over(arm, named.PLAIN)
            if value is not None:
                verdict = "yes" if value.ratio >= LEAST else "**no**"
                apart = f"{value.lowest:.2f} to {value.highest:.2f}"
                rows.append([one.title, arm, _speed(value), apart, verdict])
                bars.append((f"{one.title}, {arm}", value))
    return Answer(columns, rows, bars)


MAKERS: dict[int, Callable[[Sequence[Found]], Answer]] = {
    1: same_text, 2: policies, 3: engines, 4: budgets, 5: never_slower,
}  # fmt: skip
SAYS = {
    1: "Texts that equal the first arm's to the last token; right answers for GSM8K.",
    2: "Speed over the best fixed tree, which was found on other prompts. A gain has a lower end above 1. Re-SpS "
    "drafts with the head alone, others also look up the text; repaired, it learned one tree for all steps. "
    "Planted GPUs only read weights at these sizes, so both give the same ratios.",
    3: "Speed over stock `generate` and over our compiled plain decoding; efficiency is the latter over tau.",
    4: "Speed over compiled plain decoding. Planted columns price the counted steps by a GPU's data sheet.",
    5: f"Speed over compiled plain decoding where drafting cannot pay; {LEAST} is asked of each.",
}


def write_page(page: Path, measured: Path, code: str, *, quick: bool) -> None:
    """Write the page and its pictures, which lie beside it.

    Raises:
        UnfitResultsError: a file is of other code, was edited, lacks an arm, or is of another processor than its row.
    """
    folders = sorted({file.parent for file in measured.rglob("*.json")}) or [measured]
    found: list[Found] = []
    for place, folder in enumerate(folders):
        own = [Found.read(one, folder, code, page, quick=quick) for one in experiments(quick=quick)]
        mark = f", {ascii_uppercase[place]}" if len(folders) > 1 else ""
        found += [replace(one, mark=mark) for one in own if one.rows or not place]  # empty cells once
    lines = [*_head(found, code, quick=quick)]
    for number, question in QUESTIONS.items():
        own = [one for one in found if one.experiment.question == number]
        answer = MAKERS[number](own)
        picture = page.with_name(f"question-{number}.svg")
        lines += ["", f"## {number}. {question}", SAYS[number]]
        if answer.bars:
            picture.write_text(draw(answer.bars, question), encoding="utf-8")
            lines.append(f"![{question}]({picture.name})")
        lines += ["", *_table(answer)]
        lines += ["", answer.note] if answer.note else []
        left_out: dict[str, dict[str, None]] = {}
        for arm, reason in (pair for one in own for pair in one.left_out.items()):
            left_out.setdefault(reason, {})[arm] = None
        if left_out:
            told = (f"{', '.join(arms)}: {reason}" for reason, arms in left_out.items())
            lines += ["", f"Not measured: {'; '.join(told)}."]
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _head(found: Sequence[Found], code: str, *, quick: bool) -> Iterable[str]:
    yield "# Benchmarks"
    yield ""
    yield f"<!-- evidence of code {code} -->"
    if quick:
        yield "**This proves nothing**: five prompts in one process, on a machine that may be busy."
        yield ""
    yield verdict([one for one in found if one.experiment.question == 2 and one.experiment.is_timed])
    yield ""
    yield "[The protocol](../training/PROTOCOL.md) was made before any run; its limits of quiet rose later, with"
    yield "reasons. Speeds are total tokens over total seconds, with paired 95% intervals over requests and processes."
    yield "`make evidence` measures all of it on your machine."
    for processor, mark in dict.fromkeys((one.processor, one.mark) for one in found if one.rows):
        yield f"Measured on {processor}, in bfloat16{mark.replace(', ', ': ')}."
    if any(0 < one.prompts < FEW_PROMPTS for one in found):
        yield f"Intervals over fewer than {FEW_PROMPTS} prompts are too narrow."


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


def _speed(value: Speed | None) -> str:
    return "" if value is None else str(value)


def _empty(one: Found, columns: Sequence[str]) -> list[str]:
    return [one.title, *[""] * (len(columns) - 2), str(one.reason)]


def _positions(rows: Sequence[Row]) -> str:
    """Of steps after the prefill, the share that accepted at least one, two, three drafted tokens."""
    _, steps = _counted(rows)
    accepted: Counter[int] = Counter()
    for step, count in steps.items():
        accepted[int(step.partition("/")[2])] += count
    total = sum(accepted.values())
    if not total or not any(accepted.keys()):
        return ""
    return ", ".join(f"{sum(n for k, n in accepted.items() if k >= least) / total:.2f}" for least in (1, 2, 3))


def _counted(rows: Sequence[Row]) -> tuple[int, dict[str, int]]:
    """Tokens of the steps after the prefill, and how many of each kind."""
    steps: Counter[str] = Counter()
    for row in rows:
        steps.update(row.get("steps", {}))
    return sum(count * (1 + int(step.partition("/")[2])) for step, count in steps.items()), dict(steps)


def _table(answer: Answer) -> list[str]:
    words = 1 + (answer.columns[1] == "arm")
    cells = [list(answer.columns), ["---"] * words + ["---:"] * (len(answer.columns) - words), *answer.rows]
    return [re.sub(r"\|  (?=\|)", "|", f"| {' | '.join(row)} |") for row in cells]


_LABELS, _UNIT, _ROW = 430, 130, 22  # pixels


def draw(bars: Sequence[tuple[str, Speed]], title: str) -> str:
    """Draw bars with their intervals, and a line at 1, as SVG."""
    most = max(1.2, *(value.high for _, value in bars))
    unit = min(_UNIT, 420 / most)
    height, width, one = 44 + _ROW * len(bars), _LABELS + unit * most + 60, _LABELS + unit
    parts = [f'<rect width="{width:.0f}" height="{height}" rx="10" fill="#fcfbf8"/>', _words(20, 22, title)]
    for place, (label, value) in enumerate(bars):
        y = 36 + _ROW * place
        low, high, end = (_LABELS + unit * size for size in (value.low, value.high, value.ratio))
        colour = "#0b62a8" if "auto" in label else "#b9b4a9"
        parts += [
            _words(_LABELS - 8, y + 11, label.replace("`", ""), 'text-anchor="end"'),
            f'<rect x="{_LABELS}" y="{y}" width="{end - _LABELS:.1f}" height="14" rx="3" fill="{colour}"/>',
            f'<path d="M{low:.1f} {y + 7}H{high:.1f}" stroke="#1d2126" stroke-width="1.2"/>',
            _words(max(end, high) + 6, y + 11, f"{value.ratio:.2f}"),
        ]
    parts.append(f'<path d="M{one:.1f} 32V{height - 6}" stroke="#1d2126" stroke-dasharray="3 3"/>')
    frame = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" font-family="sans-serif">'
    return frame + "\n" + "\n".join(parts) + "\n</svg>\n"


def _words(x: float, y: float, words: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="#1d2126" font-size="12" {more}>{escape(words)}</text>'
