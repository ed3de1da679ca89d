"""Costs of a decoding step in seconds: measured in advance (`CostTable`) or learned (`RunningCosts`)."""

import json
import math
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..tree import TreeShape


Range = tuple[float, float]  # first and third quartile of repeated measurements, in seconds


class CostModel(ABC):
    """Estimates the seconds of a step: of its draft, of the target's forward, and of everything else (`overhead`)."""

    overhead: float  # seconds of a step outside the forwards of target and head: acceptance, caches, policy

    @abstractmethod
    def verify_seconds(self, nodes: int, context: int) -> float:
        """Return the seconds of a target forward over `nodes` nodes, after `context` cached positions."""

    @abstractmethod
    def draft_seconds(self, width: int, levels: int) -> float:
        """Return the seconds of drafting `levels` levels of `width` nodes; 0 for no levels."""

    def step_seconds(self, shape: TreeShape, context: int) -> float:
        verify = self.verify_seconds(shape.total_tokens + shape.lookup, context)
        return self.draft_seconds(shape.top_k, shape.depth) + verify + self.overhead


@dataclass(frozen=True)
class CostTable(CostModel):
    """Measured costs of decoding steps on one machine: medians in seconds, as `calibrate` returns them.

    Each size is measured, because costs may fall with size: on some CPUs two nodes cost more than eight in fp32.

    Attributes:
        verify: context positions -> nodes -> seconds of a target forward; one node is a plain step.
        draft: nodes per level -> seconds of one level of a draft; empty without a head.
        identity: device, dtype, threads, versions, target, attention and head for which the table is valid.
        overhead: seconds of a step outside the forwards of target and head: acceptance, caches, policy.
        plain: context positions -> seconds of a forward of plain `generate`, with Transformers' attention and cache.
        verify_range: like `verify`, with (first, third) quartile; likewise `draft_range` and `plain_range`.
        draft_start: nodes per level -> fixed seconds of a draft, whatever its depth; 0 in older tables, which lack it.

    Raises:
        ValueError: the table has no forward, a size is below 1, or a cost is not a positive number. The start of a
            draft or its levels may cost 0, but not both.
    """

    verify: dict[int, dict[int, float]]
    draft: dict[int, float]
    identity: dict[str, Any]
    overhead: float = 0.0
    plain: dict[int, float] = field(default_factory=dict)
    verify_range: dict[int, dict[int, Range]] = field(default_factory=dict)
    draft_range: dict[int, Range] = field(default_factory=dict)
    plain_range: dict[int, Range] = field(default_factory=dict)
    draft_start: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        is_measured = isinstance(self.verify, dict) and bool(self.verify) and all(map(_is_size, self.verify))
        rows = [_first_levels(self.draft, self.draft_start), self.plain]
        rows += self.verify.values() if is_measured else ()
        ranges = [self.draft_range, self.plain_range, *self.verify_range.values()]
        if (
            not (is_measured and all(self.verify.values()) and all(map(_is_row, rows)))
            or not all(_is_size(size) and all(map(_is_cost, ends)) for row in ranges for size, ends in row.items())
            or not _is_cost(self.overhead)
            or not isinstance(self.identity, dict)
        ):
            raise ValueError(
                "The cost table is empty, or holds sizes below 1 or costs that are no positive numbers of seconds. "
                "Measure again with `calibrate(model, head, refresh=True)`."
            )

    def verify_seconds(self, nodes: int, context: int) -> float:
        return _interpolated({length: _interpolated(row, nodes) for length, row in self.verify.items()}, context)

    def plain_seconds(self, context: int) -> float:
        """Return the seconds of a forward of plain `generate`; if not measured, those of verifying one node."""
        return _interpolated(self.plain, context) if self.plain else self.verify_seconds(1, context)

    def draft_seconds(self, width: int, levels: int) -> float:
        if not self.draft or levels == 0:
            return 0.0
        start = _interpolated(self.draft_start, width) if self.draft_start else 0.0
        return start + levels * _interpolated(self.draft, width)

    def running(self, context: int, top_k: int = 4) -> "RunningCosts":
        """Make the costs with which a `ThroughputPolicy` starts at a context of `context` positions.

        Decoding then corrects them. `top_k` is the policy's first number of children per node: 4 on a CPU, else 10.
        """
        sizes = min(self.verify.values(), key=len)
        verify = {nodes: self.verify_seconds(nodes, context) for nodes in sizes}
        first, second = (self.draft_seconds(top_k, levels) for levels in (1, 2))
        widths = {width: self.draft_seconds(width, 2) / second for width in (top_k, *self.draft)} if second > 0 else {}
        return RunningCosts(verify, second - first, self.overhead, 2 * first - second, widths)

    def check_here(self, here: Mapping[str, Any]) -> None:
        """Raise `ValueError` if `here`, the result of `calibration.identity_of`, differs from the table's identity."""
        known = self.identity
        odd = [f"{key} {known.get(key)!r} (here: {value!r})" for key, value in here.items() if known.get(key) != value]
        if odd:
            raise ValueError(
                f"This cost table was measured with {', '.join(odd)}. Run `calibrate(model, head)` here, which takes "
                "less than a minute."
            )

    def save(self, path: str | Path) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        written = path.with_suffix(".tmp")
        written.write_text(json.dumps(asdict(self), indent=2), encoding="utf-8")
        written.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> "CostTable":
        """Load a saved table; raises `ValueError` if the file cannot be read or is no table."""
        try:
            saved = json.loads(Path(path).read_text(encoding="utf-8"))
            optional = ("plain", "verify_range", "draft_range", "plain_range", "draft_start")
            rows: dict[str, Any] = {name: _numbered(saved.get(name, {})) for name in optional}
            needed = _numbered(saved["verify"]), _numbered(saved["draft"]), dict(saved["identity"])
            return cls(*needed, float(saved.get("overhead", 0.0)), **rows)
        except OSError as error:
            raise ValueError(
                f"The cost table {path} cannot be read ({error}). Check the path, or run `calibrate(model, head)`."
            ) from error
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
            reason = repr(error)[:200]  # a `UnicodeDecodeError` contains the whole file
            raise ValueError(
                f"{path} is no cost table ({reason}). Delete it and run `calibrate(model, head)`."
            ) from error


def _numbered(saved: Any) -> Any:
    """Convert a row from JSON, where keys are strings: sizes to integers, costs to floats, ranges to tuples."""
    if isinstance(saved, dict):
        return {int(size): _numbered(part) for size, part in saved.items()}
    if not isinstance(saved, list):
        return float(saved)
    low, high = map(float, saved)
    return low, high


def _first_levels(draft: Any, start: Any) -> Any:
    """Map nodes per level to the seconds of a one-level draft, its fixed `start` included; `None` if invalid."""
    is_priced = all(isinstance(row, dict) and all(map(_is_cost, row.values())) for row in (draft, start))
    if not is_priced or not start.keys() <= draft.keys():
        return None
    return {width: seconds + start.get(width, 0.0) for width, seconds in draft.items()}


def _interpolated(row: dict[int, float], at: int) -> float:
    """Interpolate `row` linearly at size `at`; beyond the last size, extrapolate if the last two costs rise."""
    known = sorted(row)
    if at <= known[0] or len(known) == 1:
        return row[known[0]]
    index = min(bisect_left(known, at), len(known) - 1)
    low, high = known[index - 1], known[index]
    slope = (row[high] - row[low]) / (high - low)
    return row[high] + (at - high) * max(slope, 0.0) if at > high else row[low] + (at - low) * slope


def _is_row(row: Any) -> bool:
    return isinstance(row, dict) and all(_is_size(size) and _is_cost(cost) and cost for size, cost in row.items())


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_cost(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


# After a forward, the costs of all sizes grow by `_SPEED` times its surprise (measured over expected seconds, minus
# one), and the cost of its own size grows by another `_OWN` times the surprise.
_SPEED, _OWN = 0.3, 0.1
INTERRUPTED = 1.5  # Time beyond this multiple of the known duration is attributed to other processes.
_HIGHER, _LOWER = 0.15, 0.5  # Weights of a new measurement above or below the mean.
_OUTDATED_PLAIN = 0.6  # A tree that takes less than this share of a plain step shows that the plain time is outdated.
# Guessed cost of one more node, in plain steps: with one row, and how much each further row adds to it. Most machines
# are close: SmolLM2 on two Zen 4 cores needs 0.01 for one row and 0.2 in a batch of eight.
_GUESSED_SLOPE, _GUESSED_ROW = 0.04, 0.02
_RUINOUS_SLOPE = 1.2  # If a node costs this many plain steps (on no known machine), the guess is not used.
_ROUNDING = 1e-9  # Rounding may make a difference of times negative by this many seconds.
_LEARNED = 10  # The mean of drafts weighs the first 10 equally; each later draft has weight 0.1.
_LEARNED_WIDTH = 20  # The same for the relative cost of a width, which changes less.
_INERTIA = 0.1  # Weight of the old price of a level in a new fit, beside the variance of the drafts' depths.
# Factor on the unknown price of a level, so that deeper drafts are tried. If the start of a draft costs half a plain
# step, a guarded policy then reaches 2.8 instead of 1.2 times the plain rate; elsewhere it is no slower.
_UNTRIED = 0.5
_FORGETTING = 0.99  # Factor on the price of lookup at each step without it, so that lookup is tried again.


class RunningCosts(CostModel):
    """Costs learned while decoding: moving averages of measured seconds, interpolated between measured node counts.

    Costs hold for the current context and drafter, so `context` is ignored. A larger tree is never cheaper than a
    smaller one, but a plain step may cost more than a small tree: attention without a mask takes another code path,
    which is slower on CPUs for long sequences (SmolLM2 after 768 positions: 47 ms plain, 39 ms for four nodes).

    Each measurement rescales the costs of all sizes, because machines have slow moments. Otherwise a tree measured in
    a slow moment would look expensive and never be tried again.

    Known costs may be passed: `verify` maps nodes to the seconds of a target forward, and a draft costs
    `start_seconds` plus `level_seconds` per level, times the factor in `widths` for its width.
    """

    def __init__(
        self,
        verify: Mapping[int, float] | None = None,
        level_seconds: float = 0.0,
        overhead: float = 0.0,
        start_seconds: float = 0.0,
        widths: Mapping[int, float] | None = None,
    ) -> None:
        self.overhead = 0.0
        self.lookup_seconds = 0.0  # seconds that lookup adds to a plain step, outside the forward
        self._looks, self._look_seconds = 0, 0.0  # number and mean seconds of lookups that found nothing
        self._plain_rest: float | None = None  # seconds of a plain step outside its forward
        self._verify: dict[int, float] = {}  # nodes -> seconds of the target's forward
        self._draft = _DraftPrice()
        self._guessed_slope = _GUESSED_SLOPE
        self._curve: Sequence[float] = ()  # cache of `verify_curve`
        for nodes, seconds in (verify or {}).items():
            self.add(nodes, 0, seconds, 0.0, seconds)
        if start_seconds + level_seconds > 0:
            self._draft = _DraftPrice(_LEARNED, 1.0, start_seconds + level_seconds, level_seconds, 1.0, level_seconds)
            self._draft.widths = {width: (_LEARNED_WIDTH, factor) for width, factor in (widths or {}).items()}
        self.overhead = overhead

    def copy(self) -> "RunningCosts":
        return deepcopy(self)

    def rescaled(self, factor: float) -> "RunningCosts":
        copied = self.copy()
        copied._rescale(factor)
        return copied

    def _rescale(self, factor: float) -> None:
        self._verify = {nodes: seconds * factor for nodes, seconds in self._verify.items()}
        self._curve = ()

    def add(
        self,
        nodes: int,
        levels: int,
        verify_seconds: float,
        draft_seconds: float,
        step_seconds: float,
        *,
        width: int = 1,
        rows: int = 1,
        looks_up: bool = False,
        has_looked: bool = False,
    ) -> None:
        """Learn from one step of `rows` rows; ignore it if a time is negative, because the clock was set back.

        `width` is the number of nodes per level. `has_looked`: lookup ran; `looks_up`: only its nodes were verified.
        """
        rest = step_seconds - verify_seconds - draft_seconds
        if min(verify_seconds, draft_seconds) < 0.0 or rest < -_ROUNDING:
            return
        self._guessed_slope = _GUESSED_SLOPE + _GUESSED_ROW * (rows - 1)
        self._time(nodes, verify_seconds)
        if levels:
            self._draft.add(levels, draft_seconds, width)
        else:
            self._add_rest(step_seconds - verify_seconds, looks_up=looks_up)
            if has_looked and not looks_up:
                self._looks += 1
                known = self._look_seconds
                newest = min(draft_seconds, INTERRUPTED * known) if known > 0.0 else draft_seconds
                self._look_seconds = _mean(known or None, newest)
        self.overhead = _mean(self.overhead or None, max(rest, 0.0))

    def _add_rest(self, seconds: float, *, looks_up: bool) -> None:
        if not looks_up:
            self._plain_rest = _mean(self._plain_rest, seconds)
            self.lookup_seconds *= _FORGETTING
        elif self._plain_rest is not None:
            most = self.lookup_seconds + (INTERRUPTED - 1.0) * self.step_seconds(TreeShape.plain(), 0)
            longer = min(max(seconds - self._plain_rest, 0.0), most)
            self.lookup_seconds = _mean(self.lookup_seconds or None, longer)

    @property
    def look_seconds(self) -> float:
        """Mean seconds of a lookup that finds nothing; 0 until ten were measured."""
        return self._look_seconds if self._looks >= _LEARNED else 0.0

    def _time(self, nodes: int, seconds: float) -> None:
        known = self._verify.get(nodes, 0.0)
        if known > 0.0:
            surprise = self.uninterrupted(nodes, seconds) / known - 1.0
            self._rescale(1.0 + _SPEED * surprise)
            self._verify[nodes] *= 1.0 + _OWN * surprise
        else:
            self._verify[nodes] = seconds
        if nodes > 1:
            newest = self._verify[nodes]
            for fewer in self._verify:
                if 1 < fewer < nodes or (fewer == 1 and newest < _OUTDATED_PLAIN * self._verify[1]):
                    self._verify[fewer] = min(self._verify[fewer], newest)
        self._curve = ()

    def uninterrupted(self, nodes: int, seconds: float) -> float:
        """Limit `seconds`, measured for a forward over `nodes` nodes, to `INTERRUPTED` times the learned seconds."""
        known = self._verify.get(nodes, 0.0)
        return min(seconds, INTERRUPTED * known) if known > 0.0 else seconds

    @property
    def knows_plain(self) -> bool:
        return bool(self._verify)

    @property
    def knows_trees(self) -> bool:
        return self.largest_tree > 1

    @property
    def knows_head(self) -> bool:
        return self._draft.levels > 0

    @property
    def largest_tree(self) -> int:
        """Number of nodes in the largest measured tree; 1 before the first."""
        return max(self._verify, default=1)

    def verify_seconds(self, nodes: int, context: int = 0) -> float:
        return self.verify_curve(nodes)[nodes - 1]

    def verify_curve(self, most: int) -> Sequence[float]:
        """List the seconds of forwards over 1, 2, ... nodes, up to `most` or more; from 2 nodes on they never fall."""
        if len(self._curve) < most:
            self._curve = list(self._drawn_to(most))
        return self._curve

    def _drawn_to(self, most: int) -> Iterator[float]:
        trees = sorted(nodes for nodes in self._verify if nodes > 1)
        least = self._verify[trees[0]] if trees else 0.0
        plain = self._verify.get(1, least)
        yield plain
        low, less = 1, min(plain, least) if trees else plain
        for high in trees:
            more = max(less, self._verify[high]) if low > 1 else self._verify[high]
            yield from (less + (nodes - low) / (high - low) * (more - less) for nodes in range(low + 1, high))
            yield more
            low, less = high, more
        slope = self._slope(trees)
        yield from (less + (nodes - low) * slope for nodes in range(low + 1, most + 1))

    def _slope(self, trees: list[int]) -> float:
        """Return the seconds that each node beyond the largest measured tree is assumed to cost."""
        known = trees if len(trees) > 1 else sorted(self._verify)
        if not known:
            return 0.0
        low, high = known[0], known[-1]
        measured = max(self._verify[high] - self._verify[low], 0.0) / max(high - low, 1)
        if high - low < 4 and measured < _RUINOUS_SLOPE * self._verify[low]:
            guessed = self._guessed_slope * self._verify[low]
            return guessed if low == 1 else max(guessed, measured)  # a plain step lacks a mask
        return measured

    def draft_seconds(self, width: int, levels: int) -> float:
        """Return the seconds of drafting `levels` levels; 0 before the first draft."""
        return self._draft.at(levels) * self._draft.of_width(width) if levels else 0.0

    def level_seconds(self, width: int) -> float:
        """Return the seconds of a further level; until two depths were measured, half a level's mean seconds."""
        return self._draft.slope * self._draft.of_width(width) * (1.0 if self._draft.variance else _UNTRIED)


@dataclass(slots=True)
class _DraftPrice:
    """Fits the seconds of a draft as `start + slope * levels` by decaying least squares; neither number is negative.

    The first ten drafts have equal weights, because one may be slow, and too high a price would prevent more drafts.
    Drafts of a single depth do not determine the slope: at first the start is 0, later the old slope is kept. The
    fit is for the first measured width (nodes per level); for another width it is multiplied by a learned factor.
    """

    drafts: int = 0
    levels: float = 0.0  # mean levels of a draft; 0 before the first
    seconds: float = 0.0  # mean seconds of a draft
    slope: float = 0.0
    variance: float = 0.0  # variance of the levels
    covariance: float = 0.0  # covariance of levels and seconds
    widths: dict[int, tuple[int, float]] = field(default_factory=dict)  # width -> number of drafts, and factor

    def at(self, levels: int) -> float:
        return self.seconds + self.slope * (levels - self.levels)

    def of_width(self, width: int) -> float:
        """Return the cost factor of a width; an unmeasured width is assumed to cost as much per node as a narrower."""
        if width in self.widths or not self.widths:
            return self.widths.get(width, (0, 1.0))[1]
        narrower = [known for known in self.widths if known < width]
        nearest = max(narrower) if narrower else min(self.widths)
        return self.widths[nearest][1] * max(width / nearest, 1.0)

    def add(self, levels: int, seconds: float, width: int) -> None:
        known = self.at(levels)
        if not self.widths or known <= 0.0:
            self.widths.setdefault(width, (_LEARNED_WIDTH, 1.0))
        elif width != next(iter(self.widths)) and self._learn_width(width, seconds / known) == 1:
            return  # the first draft of a width only sets its factor
        seconds /= self.of_width(width)
        self.drafts += 1
        if self.drafts == 1:
            self.levels, self.seconds, self.slope = levels, seconds, seconds / levels
            return
        known = self.at(levels)
        # A much faster draft shows that other processes slowed earlier drafts
        newest = max(1.0 / min(self.drafts, _LEARNED), _LOWER if seconds * INTERRUPTED < known else 0.0)
        deeper = levels - self.levels
        longer = (min(seconds, INTERRUPTED * known) if known > 0.0 else seconds) - self.seconds
        self.levels += newest * deeper
        self.seconds += newest * longer
        self.variance = (1.0 - newest) * (self.variance + newest * deeper * deeper)
        self.covariance = (1.0 - newest) * (self.covariance + newest * deeper * longer)
        slope = (self.covariance + _INERTIA * self.slope) / (self.variance + _INERTIA)
        self.slope = min(max(slope, 0.0), self.seconds / self.levels)

    def _learn_width(self, width: int, ratio: float) -> int:
        """Update the factor of `width` with a draft's `ratio` to the first width's cost; return its draft count."""
        drafts, factor = self.widths.get(width, (0, self.of_width(width)))
        most = INTERRUPTED * factor if drafts else factor
        least = min(width / next(iter(self.widths)), 1.0) / INTERRUPTED
        drafts = min(drafts + 1, _LEARNED_WIDTH)
        self.widths[width] = drafts, factor + (max(min(ratio, most), least) - factor) / drafts
        return drafts


def _mean(old: float | None, new: float) -> float:
    if old is None:
        return new
    weight = _LOWER if new < old else _HIGHER
    return old + weight * (new - old)
