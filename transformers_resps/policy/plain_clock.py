"""What a plain step takes, and when to time one again."""

from dataclasses import dataclass
from enum import Enum, auto

from .costs import INTERRUPTED
from .guard_config import GuardConfig


class PlainChange(Enum):
    """What a new time of a plain step means."""

    FIRST = auto()  # none was known
    MOVED = auto()  # the context is far longer or shorter, so all steps have changed by the same factor
    CHEAPER = auto()  # so much that what was known is outdated
    USUAL = auto()


@dataclass(frozen=True, slots=True)
class PlainTiming:
    """What timing a plain step showed.

    Attributes:
        change: what it means.
        factor: new over known seconds, for `MOVED`.
        excess: seconds that the tokens of trees since the last timing took longer than credited, for `USUAL`, because
            the machine had become slower; negative if faster.
    """

    change: PlainChange
    factor: float = 1.0
    excess: float = 0.0


class PlainClock:
    """Knows the seconds of a plain step.

    Args:
        config: the numbers.
        seconds: of a plain step, if known; else 0.

    Attributes:
        seconds: of a plain step by now; 0 before one was timed.
    """

    def __init__(self, config: GuardConfig, seconds: float = 0.0) -> None:
        self._config = config
        self.seconds = seconds
        self._context = self._timed_at = 0  # positions: of this step, and where a plain step was timed last
        self._moved = False  # from there to another context, since this call began
        self._trees = 0  # drafted since a plain step was timed
        self._gained = 0.0  # tokens that they gained

    def begin_call(self, context: int) -> None:
        """Start a call whose context has so many positions."""
        self._gained = 0.0
        self._moved = self._timed_at > 0 and abs(context - self._timed_at) > self._config.far_positions

    def begin_step(self, context: int) -> None:
        self._context = context

    @property
    def is_due(self) -> bool:
        """Whether the next step should be plain, to be timed."""
        return self._trees >= self._config.max_trees_between or self._moved

    def count_plain(self) -> None:
        """A step verified no tree."""
        self._trees = 0

    def count_tree(self, gained: float) -> None:
        """A step verified a tree, which gained so many tokens."""
        self._trees += 1
        self._gained += gained

    def expire(self) -> None:
        """What is known is outdated: make the next step plain."""
        self._trees = self._config.max_trees_between

    def time(self, seconds: float) -> PlainTiming:
        """Take in what a forward over the root alone took, with all but drafting around it."""
        self._timed_at = self._context
        gained, self._gained = self._gained, 0.0
        known = self.seconds
        if self._moved and min(seconds, known) > 0.0:
            self.seconds, self._moved = seconds, False
            return PlainTiming(PlainChange.MOVED, factor=seconds / known)
        if known <= 0:
            self.seconds = max(seconds, 0.0)
            return PlainTiming(PlainChange.FIRST)
        if 0.0 < seconds < self._config.outdated * known:
            self.seconds = seconds
            return PlainTiming(PlainChange.CHEAPER)
        seconds = min(seconds, INTERRUPTED * known)
        weight = self._config.plain_down if seconds < known else self._config.plain_up
        self.seconds += weight * (seconds - known)
        return PlainTiming(PlainChange.USUAL, excess=gained * (seconds - known))
