"""`docs/benchmarks.md` from results files: five questions, a table and a picture each, empty cells with reasons."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import chain
from pathlib import Path
from statistics import median

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
_NOT_RUN = "not measured here"


@dataclass(frozen=True, slots=True)
class Found:
    """The results of one experiment on one processor.

    Attributes:
        rows: of each process; empty where no figure may be shown.
        reason: why; else `None`.
        left_out: arms that were not measured, with reasons.
        processor: its name.
    """

    experiment: Experiment
    rows: list[list[Row]]
    reason: str | None
    left_out: dict[str, str]
    processor: str

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
    """What stands below one question: columns, rows of cells, and bars of the picture."""

    columns: Sequence[str]
    rows: list[list[str]]
    bars: list[tuple[str, Speed]]


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
                    gap = f"{max(row['gap'] for row in parted):.2f}" if parted else ""
                    share = f"{low:.1%} to {high:.1%}"
                    rows.append([one.experiment.title, arm, str(len(own)), str(good), share, place, gap])
                    bars.append((f"{one.experiment.title}, {arm}", Speed(good / len(own), low, high, low, high)))
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
        yield [one.experiment.title, arm, str(len(one.of(arm))), told, "", "", ""]


def policies(found: Sequence[Found]) -> Answer:
    """Every policy over the best fixed tree."""
    columns = ["setting", "prompts", f"{named.FIXED} over plain", *LEARNED, "processes, `auto`"]
    rows, bars = [], []
    for one in found:
        if not one.rows:
            rows.append(_empty(one, columns))
            continue
        fixed = one.over(named.FIXED, named.PLAIN)
        learned = {arm: one.over(arm, named.FIXED) for arm in LEARNED}
        auto = learned[named.AUTO]
        apart = "" if auto is None else f"{auto.lowest:.2f} to {auto.highest:.2f}"
        cells = [_speed(value) for value in learned.values()]
        rows.append([one.experiment.title, str(one.prompts), _speed(fixed), *cells, apart])
        bars += [(f"{one.experiment.title}, {arm}", value) for arm, value in learned.items() if value]
    return Answer(columns, rows, bars)


def engines(found: Sequence[Found]) -> Answer:
    """Every engine over stock `generate` and over compiled plain decoding, and what of tau became speed."""
    columns = [
        "target, arm",
        "over stock",
        "over plain",
        "tau",
        "over plain / tau",
        "first token, ms",
        "accepted at 1, 2, 3",
    ]
    rows, bars = [], []
    for one in found:
        if not one.rows:
            rows.append(_empty(one, columns))
            continue
        for arm in one.experiment.arms:
            stock, plain = one.over(arm, named.STOCK), one.over(arm, named.PLAIN)
            if stock is None or plain is None:
                continue
            mean = tau(one.rows, arm)
            first = 1e3 * median(row["first"] for row in one.of(arm))
            cells = [f"{mean:.2f}", f"{plain.ratio / mean:.2f}", f"{first:.0f}", _positions(one.of(arm))]
            title = f"{one.experiment.title}, {arm}"
            rows.append([title, _speed(stock), _speed(plain), *cells])
            bars.append((title, stock))
    return Answer(columns, rows, bars)


def budgets(found: Sequence[Found]) -> Answer:
    """Chains and trees of one block head by their nodes, measured and priced for GPUs."""
    columns = ["nodes", "chain", "tree", "tau, chain", "tau, tree"]
    columns += [f"planted {gpu.name}: {kind}" for gpu in GPUS for kind in ("chain", "tree")]
    rows, bars = [], []
    for one in found:
        if not one.rows:
            rows.append(_empty(one, columns))
            continue
        for nodes in named.BUDGETS:
            arms = [f"{kind} of {nodes}" for kind in ("chain", "tree")]
            speeds = [one.over(arm, named.PLAIN) for arm in arms]
            taus = [
                "" if value is None else f"{tau(one.rows, arm):.2f}" for arm, value in zip(arms, speeds, strict=True)
            ]
            planted = ["" if value is None else f"{gpu.block_speed(*_counted(one.of(arm))):.2f}"
                       for gpu in GPUS for arm, value in zip(arms, speeds, strict=True)]  # fmt: skip
            rows.append([str(nodes), *map(_speed, speeds), *taus, *planted])
            bars += [(arm, value) for arm, value in zip(arms, speeds, strict=True) if value]
    return Answer(columns, rows, bars)


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
                rows.append([one.experiment.title, arm, _speed(value), apart, verdict])
                bars.append((f"{one.experiment.title}, {arm}", value))
    return Answer(columns, rows, bars)


MAKERS: dict[int, Callable[[Sequence[Found]], Answer]] = {
    1: same_text, 2: policies, 3: engines, 4: budgets, 5: never_slower,
}  # fmt: skip
SAYS = {
    1: "Texts that equal the first arm's to the last token; right answers for GSM8K.",
    2: "Speed over the best fixed tree, which was found on other prompts. A gain has a lower end above 1.",
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
    found = [
        Found.read(one, folder, code, page, quick=quick) for folder in folders for one in experiments(quick=quick)
    ]
    lines = [*_head(found, code, quick=quick)]
    for number, question in QUESTIONS.items():
        own = [one for one in found if one.experiment.question == number]
        answer = MAKERS[number](own)
        picture = page.with_name(f"question-{number}.svg")
        lines += ["", f"## {number}. {question}", "", SAYS[number], ""]
        if answer.bars:
            picture.write_text(draw(answer.bars, question), encoding="utf-8")
            lines += [f"![{question}]({picture.name})", ""]
        lines += _table(answer)
        left_out = {reason: arm for one in own for arm, reason in one.left_out.items()}
        if left_out:
            lines += ["", "Not measured: " + "; ".join(f"{arm}: {reason}" for reason, arm in left_out.items()) + "."]
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _head(found: Sequence[Found], code: str, *, quick: bool) -> Iterable[str]:
    yield "# Benchmarks"
    yield ""
    yield f"<!-- evidence of code {code} -->"
    if quick:
        yield "**This proves nothing**: five prompts in one process, on a machine that may be busy."
        yield ""
    yield verdict([one for one in found if one.experiment.question == 2])
    yield ""
    yield "[The protocol](../training/PROTOCOL.md) was written before the runs: arms, prompts, what counts as quiet,"
    yield "statistic. Speeds are total tokens over total seconds, with a paired 95% interval over requests and"
    yield "processes. An empty cell names its reason. `make evidence` measures all of it on your machine."
    for processor in dict.fromkeys(one.processor for one in found if one.rows):
        yield f"Measured on {processor}, two models in bfloat16."
    if any(0 < one.prompts < FEW_PROMPTS for one in found):
        yield f"Intervals over fewer than {FEW_PROMPTS} prompts are too narrow."


def verdict(found: Sequence[Found]) -> str:
    """Say whether a learned policy gains over the best fixed tree, and what to do if none does."""
    gains = {(one.experiment.title, arm): value for one in found for arm in LEARNED
             if (value := one.over(arm, named.FIXED)) is not None}  # fmt: skip
    if not gains:
        return "Whether a policy gains over the best fixed tree was not measured."
    clear = [f"{arm} {value} ({title})" for (title, arm), value in gains.items() if value.low > 1]
    if not clear:
        return (
            "No learned policy gains over the best fixed tree here. Find that tree with `resps bench --shapes`, and "
            "pass it as `policy`; `auto` needs no search."
        )
    return (
        f"Over the best fixed tree these gain: {'; '.join(clear)}. The other {len(gains) - len(clear)} cells do not."
    )


def _speed(value: Speed | None) -> str:
    return "" if value is None else str(value)


def _empty(one: Found, columns: Sequence[str]) -> list[str]:
    return [one.experiment.title, *[""] * (len(columns) - 2), str(one.reason)]


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
    cells = [list(answer.columns), ["---", *["---:"] * (len(answer.columns) - 1)], *answer.rows]
    return [f"| {' | '.join(row)} |" for row in cells]


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
