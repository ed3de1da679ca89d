"""Whether published figures still hold for the present code: ratios of the page, measured again and compared."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers_resps.tools.results import Interval

from .experiments import AUTO, PLAIN, STOCK, Experiment
from .page import Found, Table, published
from .sealed import Version


HELD, MOVED = "held", "MOVED"
NOT_PUBLISHED, NOT_MEASURED = "not published for this processor", "not measured"


@dataclass(frozen=True, slots=True)
class Ratio:
    """One arm over stock `generate`, now and as it was published.

    Attributes:
        experiment: its name.
        title: of the target and the arm.
        now: of the present code; `None` where it could not be measured.
        before: of the page, on the same prompts; `None` without published figures of this processor.
        version: that was published.
        reason: why it was not measured.
    """

    experiment: str
    title: str
    now: Interval | None
    before: Interval | None
    version: Version | None
    reason: str

    @property
    def is_compared(self) -> bool:
        return self.now is not None and self.before is not None

    @property
    def verdict(self) -> str:
        if self.now is None:
            return f"{NOT_MEASURED}: {self.reason}"
        if self.before is None:
            return NOT_PUBLISHED
        return HELD if self.before.low <= self.now.ratio <= self.before.high else MOVED

    def __str__(self) -> str:
        now = "" if self.now is None else f" {self.now.ratio:.2f} now,"
        before = "" if self.before is None else f" {self.before} published of {self.version}:"
        return f"{self.title} over stock:{now}{before} {self.verdict}"


def drift_of(measured: Table, tables: Sequence[Table], checked: Sequence[Experiment]) -> list[Ratio]:
    """Return the ratios of the experiments that are checked, beside the newest published ones of this processor."""
    found = []
    for experiment in checked:
        here = Found.of(experiment, measured)
        own = [table for table in tables if table.files and table.processor == measured.processor]
        before = published(experiment.name, own)
        prompts = {row["prompt"] for row in here.of_arm(STOCK)}
        for arm in (PLAIN, AUTO):
            found.append(
                Ratio(
                    experiment.name,
                    f"{experiment.title}, compiled {arm}",
                    here.over(arm, STOCK),
                    None if before is None else before.over(arm, STOCK, prompts or None),
                    None if before is None else before.processes[0].version,
                    here.reason or here.left_out.get(arm, ""),
                )
            )
    return found


def compared(ratios: Sequence[Ratio], here: Version, processor: str) -> Iterator[str]:
    """Yield a line for each ratio, and what to do."""
    yield f"Drift of version {here} on {processor}:"
    yield from map(str, ratios)
    if not any(one.before for one in ratios):
        yield (
            f"No figures of {processor} are published, so there is nothing to compare with. `make evidence` measures "
            "them, in four and a half hours."
        )
    moved = dict.fromkeys(one.experiment for one in ratios if one.verdict == MOVED)
    if moved:
        yield f'Measure anew before a release: make evidence EVIDENCE_OPTIONS="--only {" ".join(moved)}"'
    elif all(one.is_compared for one in ratios):
        yield "Every ratio lies within its published interval: the page stands for this version, too."
