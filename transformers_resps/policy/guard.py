"""Never slower than plain: drafting may lose only a small share of the time, and must earn the rest back."""

from torch import Tensor

from ..telemetry import StepRecord
from ..tree import TreeShape
from .protocol import Level, Observation, Policy


_SHARE = 0.015  # of all seconds that drafting may lose for good
_FIRST_LOAN, _MOST_SAVED = 1.5, 4.0  # plain steps
_REMEASURE = 64  # drafted steps after which a plain one is timed again
_NEWEST = 0.2  # weight of the newest plain step


class Guard(Policy):
    """Lets `policy` draft while the account of seconds won and lost is positive; otherwise steps are plain.

    A drafted step pays in the seconds that its tokens would have taken plainly, and pays out what it took. A small
    share of all time is added, so drafting is probed again, ever more rarely the more it loses.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._plain_seconds: float | None = None
        self._account = 0.0  # seconds
        self._since_plain = 0
        self._drafting = False

    def __repr__(self) -> str:
        return f"Guard({self.policy!r})"

    @property
    def needs_head(self) -> bool:
        return bool(getattr(self.policy, "needs_head", True))

    def choose(self, observation: Observation) -> TreeShape:
        shape = TreeShape.plain()
        if self._plain_seconds is not None and self._since_plain < _REMEASURE and self._account > 0:
            shape = self.policy.choose(observation)
        self._drafting = not shape.is_plain
        return shape

    def grow(self, level: Level) -> bool:
        return self.policy.grow(level)

    def size(self, scores: Tensor) -> int:
        return self.policy.size(scores)

    def observe(self, record: StepRecord) -> None:
        seconds = max(record.step_seconds, 0.0)
        if not self._drafting:
            self._time_plain(seconds)
            self._since_plain = 0
        elif self._plain_seconds is not None:
            self._account += record.mean_emitted * self._plain_seconds - seconds
            self._since_plain += 1
        if self._plain_seconds is not None:
            self._account = min(self._account + _SHARE * seconds, _MOST_SAVED * self._plain_seconds)
        self.policy.observe(record)

    def _time_plain(self, seconds: float) -> None:
        if self._plain_seconds is None:
            self._plain_seconds = seconds
            self._account = _FIRST_LOAN * seconds
        else:
            self._plain_seconds += _NEWEST * (seconds - self._plain_seconds)
