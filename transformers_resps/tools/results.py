"""Summarise timed answers as rates with intervals, a table, advice, and the file `results.json`.

training/benchmarking/RESULTS.md describes the file. Every rate is total tokens over total seconds.
"""

import json
import os
import platform
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

from ..calibration import device_name
from ..compilation.kernels import machine_line
from ..telemetry.report import StepRecord, Timing, bootstrap_interval, rate
from .quiet import NOISE_OPTION, BusyMachineError, spread_of


SCHEMA_VERSION = 2
ALL = "all"
PLAIN = "plain"
COMPILED = ", compiled"  # suffix of the name of a method whose forwards are compiled
COMPILED_PLAIN = PLAIN + COMPILED
INVARIANT = ", invariant"  # suffix of the name of a method in the invariant mode
SAME_TEXT_INVARIANT = f"`{INVARIANT}`: texts are compared with `{PLAIN}{INVARIANT}`, and its own with `{PLAIN}`."
NAMED_NODES = 8  # the advice states the cost of verifying a tree of this size
MIN_PROMPTS = 8  # a bootstrap over fewer prompts gives too narrow intervals
MAX_SPREAD = 0.25  # maximum interquartile range, over the median, of plain decoding's rates

_DIGITS = 7  # significant digits of the saved numbers: enough for a second in microseconds
_MIN_ANSWERS = 8  # the spread of fewer answers is not checked
_MIN_TOKENS = 8  # shorter answers do not count for the spread
_INTERRUPTED = 5.0  # maximum ratio of an answer's seconds per forward to the median of its method
_OF_MEMORY = ("GLIBC_TUNABLES", "THP_MEM_ALLOC_ENABLE", "LD_PRELOAD")  # variables that change how memory is allocated
_SPEED = ("tokens/s", "ratio to plain", "95% interval", "tau")
_EFFICIENCY = {
    "efficiency": "ratio / tau",
    "compiled_ratio": "ratio to compiled plain",
    "compiled_efficiency": "that / tau",
}


class Cell(NamedTuple):
    """One turn of a conversation, at one temperature and in one repeat. Each method answers it once."""

    prompt: str
    turn: int
    temperature: float
    repeat: int


@dataclass(frozen=True, slots=True)
class AnswerTiming:
    """How long one method took to answer one turn of one prompt."""

    method: str
    prompt: str  # `dataset/row`
    repeat: int  # number from 0; also the seed of sampling
    tokens: int  # tokens of the answer, up to the end token
    target_forwards: int  # forwards of the target, prefill included
    seconds: float
    turn: int = 1  # number of the turn in the conversation
    temperature: float = 0.0
    prefill_seconds: float = 0.0  # until the first token or, if unknown, until the target's second forward
    peak_mib: int | None = None  # result of `peak_mib`; `None` if unknown

    @property
    def cell(self) -> Cell:
        return Cell(self.prompt, self.turn, self.temperature, self.repeat)

    @property
    def dataset(self) -> str:
        return self.prompt.rpartition("/")[0]


@dataclass(frozen=True, slots=True)
class Run:
    """One answer: its tokens, steps and timing."""

    timing: AnswerTiming
    token_ids: Tensor  # [t]
    steps: Sequence[StepRecord] = ()  # the prefill first; empty if the method reports no steps


@dataclass(frozen=True, slots=True)
class Interval:
    """A ratio, or a share, with the ends of its 95% interval."""

    ratio: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.ratio:.2f} ({self.low:.2f} to {self.high:.2f})"


def grouped(timings: Iterable[AnswerTiming], key: Callable[[AnswerTiming], Hashable]) -> list[list[AnswerTiming]]:
    """Group timings by `key`, in the order in which the keys first occur."""
    groups: dict[Hashable, list[AnswerTiming]] = defaultdict(list)
    for timing in timings:
        groups[key(timing)].append(timing)
    return list(groups.values())


def ratio(timings: Sequence[AnswerTiming], method: str, base: str) -> float:
    """Return the tokens per second of `method` over those of `base`, on the turns that both methods answered."""
    own, other = (rate(requests) for requests in _paired(timings, method, base))
    return own / other


def compare(processes: Sequence[Sequence[AnswerTiming]], method: str, base: str) -> Interval:
    """Return the speed of `method` relative to `base`, as `ratio` does, with a bootstrap interval.

    Each item of `processes` has the timings of one process. The bootstrap draws processes and prompts with
    replacement, the same ones for both methods. A prompt's turns and repeats in one process are drawn together.
    """
    own, other = zip(*(_paired(timings, method, base) for timings in processes), strict=True)
    value = rate(chain.from_iterable(own)) / rate(chain.from_iterable(other))
    return Interval(value, *bootstrap_interval(own, other))


def _paired(timings: Sequence[AnswerTiming], method: str, base: str) -> list[list[Timing]]:
    """Return, for `method` and `base`, each prompt's total tokens and seconds over the turns that both answered."""
    both = {m.cell for m in timings if m.method == method} & {m.cell for m in timings if m.method == base}
    kept = sorted((m for m in timings if m.cell in both), key=lambda m: m.prompt)
    prompts = (grouped((m for m in kept if m.method == name), lambda m: m.prompt) for name in (method, base))
    return [[Timing(sum(m.tokens for m in one), sum(m.seconds for m in one)) for one in own] for own in prompts]


def tau_of(timings: Iterable[AnswerTiming]) -> float:
    """Return the number of tokens per target forward, over all timings."""
    own = list(timings)
    return sum(m.tokens for m in own) / sum(m.target_forwards for m in own)


def summarise(timings: Sequence[AnswerTiming], method: str) -> dict[str, Any]:
    """Compute the table row of `method`, over all prompts and repeats (see training/benchmarking/RESULTS.md)."""
    own = [m for m in timings if m.method == method]
    speed, tau = compare([timings], method, PLAIN), tau_of(own)
    repeats = [rate(part) for part in grouped(own, lambda m: m.repeat)]
    temperatures = {m.temperature for m in own}
    is_compared = any(m.method == COMPILED_PLAIN for m in timings)
    compiled = ratio(timings, method, COMPILED_PLAIN) if is_compared else None
    return {
        "method": method,
        "tokens_per_second": rate(own),
        **asdict(speed),
        "tau": tau,
        "efficiency": speed.ratio / tau,
        "compiled_ratio": compiled,
        "compiled_efficiency": None if compiled is None else compiled / tau,
        "spread": max(repeats) / min(repeats) - 1,
        "peak_mib": max((m.peak_mib for m in own if m.peak_mib is not None), default=None),
        "temperature": temperatures.pop() if len(temperatures) == 1 else None,
    }


def summarise_steps(runs: Sequence[Run]) -> dict[str, float]:
    """Return one method's entry in `steps` of the results: mean tree size, and seconds per token by part of a step."""
    answers = [run.steps for run in runs]
    tokens, seconds = sum(run.timing.tokens for run in runs), sum(run.timing.seconds for run in runs)
    decoding = [step for steps in answers for step in steps[1:]]
    prefill = sum(steps[0].step_seconds for steps in answers)
    draft, verify = sum(step.draft_seconds for step in decoding), sum(step.verify_seconds for step in decoding)
    return {
        "mean_nodes": sum(step.verified for step in decoding) / len(decoding) if decoding else 1.0,
        "prefill_seconds": prefill / tokens,
        "draft_seconds": draft / tokens,  # the policy's decisions and drafting
        "verify_seconds": verify / tokens,
        # acceptance, caches, and `generate` outside the loop
        "rest_seconds": (seconds - prefill - draft - verify) / tokens,
    }


def summary_rows(
    timings: Sequence[AnswerTiming], names: Sequence[str], estimates: Sequence[AnswerTiming] = ()
) -> dict[str, Any]:
    """Return two parts of the results: `summaries` (rows by dataset and temperature) and `pooled` (rows over all).

    `timings` has only turns that every method answered. Rows are in the order of `names`, then those of `estimates`.
    """
    every = [*timings, *estimates]
    summaries: dict[str, list[dict[str, Any]]] = {}
    for dataset in [*dict.fromkeys(m.dataset for m in timings), ALL]:
        own = grouped((m for m in every if dataset in (ALL, m.dataset)), lambda m: m.temperature)
        summaries[dataset] = [row for part in own for row in _rows(part, names)]
    return {"summaries": summaries, "pooled": _rows(every, names)}


def _rows(timings: Sequence[AnswerTiming], names: Sequence[str]) -> list[dict[str, Any]]:
    present = dict.fromkeys(m.method for m in timings)
    ordered = [name for name in names if name in present] + [name for name in present if name not in names]
    return [{**summarise(timings, name), "measured": name in names} for name in ordered]


def plain_spread(timings: Iterable[AnswerTiming]) -> float | None:
    """Return the interquartile range of plain decoding's rates over their median; `None` for fewer than four rates.

    To measure only noise, each rate is divided by the mean over repeats of the same text, because prompts differ.
    Prefills, incomplete repeats and answers of fewer than eight tokens are ignored.
    """
    told = [m for m in timings if m.method == PLAIN and m.tokens >= _MIN_TOKENS]
    texts = grouped(told, lambda m: (m.prompt, m.turn, m.temperature))
    whole = min(map(len, texts), default=0)
    rates = [[(m.tokens - 1) / (m.seconds - m.prefill_seconds) for m in own[:whole]] for own in texts]
    return spread_of([value / (sum(own) / whole if whole > 1 else 1.0) for own in rates for value in own])


def check_spread(timings: Sequence[AnswerTiming]) -> None:
    """Raise `BusyMachineError` if `plain_spread` is too large, or if the forwards of one answer took far too long.

    Rates are total tokens over total seconds, so one answer on a busy core could distort the rate of a method.
    """
    answers = sum(m.method == PLAIN for m in timings)
    if answers < _MIN_ANSWERS:
        return
    told = [m for m in timings if m.tokens >= _MIN_TOKENS and m.target_forwards > 1]
    for part in grouped(told, lambda m: m.method):
        seconds = [(m.seconds - m.prefill_seconds) / (m.target_forwards - 1) for m in part]
        if max(seconds) > _INTERRUPTED * median(seconds) > 0:
            raise BusyMachineError(
                f"The machine is noisy: forwards of one answer took {max(seconds) / median(seconds):.0f} times as "
                "long as others of its method. Measure again when no other process uses the cores, "
                f"{NOISE_OPTION}."
            )
    spread = plain_spread(timings)
    if spread is not None and spread > MAX_SPREAD:
        raise BusyMachineError(
            f"The machine is noisy: plain decoding's rates spread by {spread:.0%} (interquartile range over median, "
            f"{answers} answers), more than {MAX_SPREAD:.0%}. Measure again when it is quiet, {NOISE_OPTION}."
        )


@dataclass(frozen=True, slots=True)
class Standing:
    """Speed of one method relative to plain decoding and to the fastest method."""

    name: str
    effort: int  # rank of the work to set up this method
    to_plain: Interval  # rate over the rate of plain decoding
    to_fastest: Interval  # rate over the rate of the fastest method


def advice_of(efforts: Mapping[str, int], timings: Sequence[AnswerTiming], verify_cost: float) -> str:
    """Say which method of `efforts` to use; `verify_cost`: plain steps as long as verifying `NAMED_NODES` nodes."""
    others = [name for name in efforts if name != PLAIN]
    if not timings:
        return advise([], verify_cost, 0)
    rates = {name: rate(m for m in timings if m.method == name) for name in others}
    fastest = max(rates, key=lambda name: rates[name], default=PLAIN)
    standings = [
        Standing(name, efforts[name], compare([timings], name, PLAIN), compare([timings], name, fastest))
        for name in others
    ]
    return advise(standings, verify_cost, len({m.prompt for m in timings}))


def advise(standings: Sequence[Standing], verify_cost: float, prompts: int) -> str:
    """Return advice on which method to use, from the `standings` of all methods except plain decoding.

    A ratio whose 95% interval contains 1 counts as no difference. With fewer than two `prompts` there is no interval.
    """
    if prompts < 2:
        little = "one prompt says" if prompts else "no prompt was answered, which says"
        return f"NOT ENOUGH EVIDENCE: {little} nothing about others. Measure {MIN_PROMPTS} or more with --limit."
    said = _choice(standings, verify_cost)
    if standings and prompts < MIN_PROMPTS:
        return (
            f"NOT ENOUGH EVIDENCE: {prompts} prompts say little about others. Measure {MIN_PROMPTS} or more with "
            f"--limit; on these: {said}"
        )
    return said


def _choice(standings: Sequence[Standing], verify_cost: float) -> str:
    if not standings:
        return "Nothing was compared with plain decoding: choose with --methods, --policy or --shapes."
    fastest = max(standings, key=lambda standing: standing.to_plain.ratio)
    if fastest.to_plain.low <= 1:
        verdict = "Decode plainly: nothing is faster beyond noise on this machine"
        if fastest.to_plain.high < 1:
            verdict = "Speculation does not pay on this machine"
        cost = f"verification of {NAMED_NODES} nodes costs {verify_cost:.1f} plain steps"
        return f"{verdict}: {cost}, and the fastest, {fastest.name}, reaches {fastest.to_plain}."
    # a method not surely faster than plain decoding equals the fastest only because its interval is wide
    equal = [s for s in standings if s is fastest or (s.to_fastest.high >= 1 and s.to_plain.low > 1)]
    simplest = min(equal, key=lambda s: (s.effort, -s.to_plain.ratio))
    gain = simplest.to_plain
    times = f"{gain.ratio:.2f} times plain decoding ({gain.low:.2f} to {gain.high:.2f})"
    if simplest is fastest:
        return f"Use {fastest.name}: {times}."
    return (
        f"{simplest.name[:1].upper()}{simplest.name[1:]} is as good as anything here: {times}; {fastest.name}, with "
        f"{fastest.to_plain.ratio:.2f}, is not faster beyond noise."
    )


def markdown_table(results: dict[str, Any]) -> str:
    """Return the results as a Markdown table, by dataset, temperature and method, with estimates in italics."""
    several = len(results["settings"]["temperatures"]) > 1
    left = ["dataset", *(["temperature"] if several else []), "method"]
    known = {
        name for row in chain.from_iterable(results["summaries"].values()) for name in row if row[name] is not None
    }
    told = {name: heading for name, heading in _EFFICIENCY.items() if name in known}
    peak = ["peak MiB"] if "peak_mib" in known else []
    right = [*_SPEED, *told.values(), "nodes", *peak, "same text"]
    lines = [table_row([*left, *right]), table_row(["---"] * len(left) + ["---:"] * len(right))]
    for dataset, rows in results["summaries"].items():
        for row in rows:
            steps = results["steps"].get(row["method"])
            nodes = f"{steps['mean_nodes']:.1f}" if steps and row["measured"] else ""
            same = same_text(row, results) if dataset == ALL else ""
            cells = [dataset, *([f"{row['temperature']:g}"] if several else [])]
            values = [row.get(name) if row["measured"] or name == "compiled_ratio" else None for name in told]
            efficiency = ["" if value is None else f"{value:.2f}" for value in values]
            held = [str(row.get("peak_mib") or "")] if peak else []
            lines.append(table_row([*cells, *summary_cells(row), *efficiency, nodes, *held, same]))
    if results.get("not_compiled"):
        lines += ["", f"{COMPILED_PLAIN}: not measured. {results['not_compiled']}"]
    if results.get("same_text_invariant"):
        lines += ["", SAME_TEXT_INVARIANT]
    return "\n".join(lines)


def summary_cells(row: dict[str, Any]) -> list[str]:
    """Return five cells of a row of `summaries`: method, tokens per second, ratio to plain, its interval, tau."""
    return [
        method_cell(row),
        f"{row['tokens_per_second']:.1f}",
        f"{row['ratio']:.2f}",
        "" if row["method"] == PLAIN else f"{row['low']:.2f} to {row['high']:.2f}",
        f"{row['tau']:.2f}" if row["measured"] else "",
    ]


def method_cell(row: dict[str, Any]) -> str:
    """Return the name of a row's method, in italics if its figures are estimates."""
    return str(row["method"]) if row["measured"] else f"*{row['method']}*"


def same_text(row: dict[str, Any], results: dict[str, Any]) -> str:
    """Return how many answers of a row's method equal those of plain decoding in the same mode, as "9 of 10".

    Return "" if several temperatures were measured, because the results have only one count for all of them.
    """
    if not row["measured"] or len(results["settings"]["temperatures"]) > 1:
        return ""
    method, same = row["method"], results["same_text"]
    return f"{results.get('same_text_invariant', {}).get(method, same[method])} of {same.get(PLAIN, 0)}"


def table_row(cells: list[str]) -> str:
    """Return one row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def machine(target: Any) -> dict[str, Any]:
    """Describe the machine for the results: device, kernels, dtype, threads, versions and memory settings."""
    return {
        "device": device_name(target.device),
        "machine": machine_line(),
        "dtype": str(target.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "environment": {name: os.environ[name] for name in _OF_MEMORY if name in os.environ},
        "huge_page_mib": huge_page_mib(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "transformers-resps": version("transformers-resps"),
        },
    }


def huge_page_mib(process: Path = Path("/proc/self")) -> int | None:
    """Return how many MiB of this process are in huge pages; `None` if unknown."""
    return _mib(process / "smaps_rollup", "AnonHugePages:")


def peak_mib(device: torch.device, process: Path = Path("/proc/self")) -> int | None:
    """Return the most MiB used since `reset_peak`: by tensors on a GPU, else by the process; `None` if unknown."""
    return (
        torch.cuda.max_memory_allocated(device) >> 20 if device.type == "cuda" else _mib(process / "status", "VmHWM:")
    )


def reset_peak(device: torch.device, process: Path = Path("/proc/self")) -> None:
    """Reset the memory peak that `peak_mib` returns; does nothing where the system cannot reset it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            (process / "clear_refs").write_text("5")  # see proc(5)


def _mib(file: Path, name: str) -> int | None:
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) >> 10 for line in lines if line.startswith(name)), None)


def write_results(file: Path, results: Mapping[str, Any]) -> Path:
    """Write results, rounded to seven digits, atomically: an interruption leaves the old file or the new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".tmp")
    parts = (f"{json.dumps(name)}: {_compact(rounded(part))}" for name, part in results.items())
    unfinished.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
    unfinished.replace(file)
    return file


def _compact(part: Any) -> str:
    """Return JSON without blanks; in a list of objects each object has its own line."""
    if isinstance(part, list) and part and all(isinstance(item, dict) for item in part):
        return "[\n" + ",\n".join(map(_compact, part)) + "\n]"
    return json.dumps(part, separators=(",", ":"))


def rounded(part: Any) -> Any:
    """Round all floats in JSON values to seven significant digits."""
    return json.loads(json.dumps(part), parse_float=lambda text: float(f"{float(text):.{_DIGITS}g}"))
