"""What steps cost on one machine, as a table that is used only where it was measured.

A table and not a line, because costs are not even monotone: on some CPUs two nodes cost more than eight in fp32.
"""

import json
import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from ..head import DraftHead
from ..policy import CostModel, RunningCosts
from ..target.prepacking import is_prepacked
from .device import device_name


Range = tuple[float, float]  # seconds: lower and upper quartile of the repeats


@dataclass(frozen=True)
class CostTable(CostModel):
    """What the steps of decoding cost on one machine: medians in seconds. `calibrate` measures one.

    Attributes:
        verify: context positions -> nodes -> seconds of a target forward; one node is a plain step.
        draft: level width -> seconds of one head level; empty without a head.
        identity: device, dtype, threads, versions, target, attention and head that the table is valid for.
        overhead: seconds of a step outside its forwards: acceptance, caches, policy.
        plain: context positions -> seconds of a forward of plain `generate`, with the attention and cache of
            Transformers; empty in tables of earlier versions.
        verify_range: context positions -> nodes -> first and third quartile of the repeats of which `verify` holds the
            median, in seconds; like the next two empty in tables of earlier versions.
        draft_range: likewise of `draft`.
        plain_range: likewise of `plain`.

    Raises:
        ValueError: no forward is in the table, a size is below 1, or a cost is no positive number of seconds.
    """

    verify: dict[int, dict[int, float]]
    draft: dict[int, float]
    identity: dict[str, Any]
    overhead: float = 0.0
    plain: dict[int, float] = field(default_factory=dict)
    verify_range: dict[int, dict[int, Range]] = field(default_factory=dict)
    draft_range: dict[int, Range] = field(default_factory=dict)
    plain_range: dict[int, Range] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rows = self.verify.values() if isinstance(self.verify, dict) else [None]
        is_measured = bool(rows) and all(row and _is_row(row) for row in rows) and all(map(_is_size, self.verify))
        has_overhead = _is_time(self.overhead) or self.overhead == 0
        are_rows = _is_row(self.draft) and _is_row(self.plain)
        ranges = [self.draft_range, self.plain_range, *self.verify_range.values()]
        are_rows = are_rows and all(
            _is_row(dict(zip(row, ends, strict=True))) for row in ranges for ends in _ends(row)
        )
        if not is_measured or not are_rows or not has_overhead or not isinstance(self.identity, dict):
            raise ValueError(
                "The cost table is empty, or holds sizes below 1 or costs that are no positive numbers of seconds. "
                "Measure again with `calibrate(model, head, refresh=True)`."
            )

    def verify_seconds(self, nodes: int, context: int) -> float:
        """Seconds of a target forward over `nodes`, interpolated in nodes and context."""
        return _interpolate({length: _interpolate(row, nodes) for length, row in self.verify.items()}, context)

    def plain_seconds(self, context: int) -> float:
        """Seconds of a forward of plain `generate`; of our own plain step if nothing else was measured."""
        return _interpolate(self.plain, context) if self.plain else self.verify_seconds(1, context)

    def draft_seconds(self, width: int, levels: int) -> float:
        return levels * _interpolate(self.draft, width) if self.draft else 0.0

    def running(self, context: int) -> RunningCosts:
        """Starting costs for a `ThroughputPolicy` at `context` positions; it corrects them while it decodes."""
        costs = RunningCosts()
        nodes = min(self.verify.values(), key=len)
        verify = {count: self.verify_seconds(count, context) for count in nodes}
        costs.expect(verify, self.draft_seconds(4, 1), self.overhead)
        return costs

    def check_here(self, target: PreTrainedModel, head: DraftHead | None) -> None:
        """Check that the table was measured on this machine, with this target and head.

        Raises:
            ValueError: it was not; the message names every difference.
        """
        here = identity_of(target, head)
        odd = [
            f"{key} {self.identity.get(key)!r} (here: {here[key]!r})"
            for key in here
            if self.identity.get(key) != here[key]
        ]
        if odd:
            raise ValueError(
                f"This cost table was measured with {', '.join(odd)}. Run `calibrate(model, head)` here, which takes "
                "less than a minute."
            )

    def save(self, path: str | Path) -> None:
        """Write the table as JSON; an existing file is replaced atomically."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        written = path.with_suffix(".tmp")
        written.write_text(json.dumps(asdict(self), indent=2), encoding="utf-8")
        written.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> "CostTable":
        """Read what `save` wrote.

        Raises:
            ValueError: the file cannot be read, is no cost table, or holds a cost that is not above zero.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, TypeError) as error:
            raise ValueError(
                f"The cost table {path} cannot be read ({error}). Check the path, or run `calibrate(model, head)`."
            ) from error
        except UnicodeDecodeError as error:  # which holds the whole file
            raise ValueError(_no_table(path, error.reason)) from error
        try:
            read = json.loads(text)
            verify = {int(c): {int(n): float(s) for n, s in row.items()} for c, row in read["verify"].items()}
            draft = {int(w): float(s) for w, s in read["draft"].items()}
            plain = {int(c): float(s) for c, s in read.get("plain", {}).items()}
            ranges = {int(c): _ranges(row) for c, row in read.get("verify_range", {}).items()}
            others = (_ranges(read.get(name, {})) for name in ("draft_range", "plain_range"))
            overhead = float(read.get("overhead", 0.0))
            table = cls(verify, draft, dict(read["identity"]), overhead, plain, ranges, *others)
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
            raise ValueError(_no_table(path, repr(error)[:200])) from error
        return table


def _no_table(path: str | Path, reason: str) -> str:
    return f"{path} is no cost table ({reason}). Delete it and run `calibrate(model, head)`."


def identity_of(target: PreTrainedModel, head: DraftHead | None) -> dict[str, Any]:
    """Where a measurement holds."""
    config = target.config
    return {
        "device": device_name(target.device),
        "dtype": str(target.dtype),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "target": f"{config.name_or_path or type(target).__name__}, {target.num_parameters()} parameters",
        "attention": config.get_text_config()._attn_implementation,
        "packed": is_prepacked(target),
        "head": None if head is None else f"{head.num_parameters()} parameters, {head.dtype}",
    }


def _interpolate(row: dict[int, float], at: int) -> float:
    """Linear between the known points; beyond the last one along the line through the last two, if that rises."""
    known = sorted(row)
    if at <= known[0] or len(known) == 1:
        return row[known[0]]
    place = min(bisect_left(known, at), len(known) - 1)
    low, high = known[place - 1], known[place]
    slope = (row[high] - row[low]) / (high - low)
    return row[high] + (at - high) * max(slope, 0.0) if at > high else row[low] + (at - low) * slope


def _ranges(row: dict[str, Any]) -> dict[int, Range]:
    """As read from JSON, where sizes are texts and pairs are lists."""
    return {int(size): (float(low), float(high)) for size, (low, high) in row.items()}


def _ends(row: dict[int, Range]) -> Iterator[tuple[float, ...]]:
    """All first quartiles, then all third ones."""
    yield from zip(*row.values(), strict=True)


def _is_row(row: Any) -> bool:
    """Whether these are sizes from 1 with seconds."""
    return isinstance(row, dict) and all(_is_size(size) and _is_time(seconds) for size, seconds in row.items())


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_time(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
