"""What `ThroughputPolicy` remembers from step to step, beside acceptance and costs."""

from ..telemetry.report import StepRecord


_MEMORY = 0.95  # weight of the past when a step is added: about the last twenty count
_MAX_RATE = 2.0  # limit of lambda, in plain rates: in replay as good as none, and 1 to 8% better after copied text
_FIRST_GAIN = 0.5  # assumed gain of asking a head that was never asked, in tokens per step
_NEWEST = 0.15  # weight of the newest step in what asking gains
_FIRST_PROBE, _LAST_PROBE = 8, 128  # steps between probes of a head that does not pay


class ThroughputMemory:
    """The rate of tokens so far, what asking the head gains, and when a head that does not pay is probed again.

    Attributes:
        head_was_right: whether the head predicted a token of the last step that asked it, in most rows.
    """

    def __init__(self) -> None:
        self.head_was_right = True
        self._tokens, self._seconds = 0.0, 0.0  # decayed sums
        self._gains = [_FIRST_GAIN, _FIRST_GAIN]  # mean gain of asking the head, by `head_was_right`
        self._probe_in, self._probe_every = 0, _FIRST_PROBE  # steps

    def add(self, record: StepRecord) -> None:
        """Take in a finished step."""
        self._tokens = self._tokens * _MEMORY + record.mean_emitted
        self._seconds = self._seconds * _MEMORY + max(record.step_seconds, 0.0)

    def rate(self, plain_seconds: float) -> float:
        """Tokens per second (lambda): at least the rate of plain steps, and at most twice that."""
        rate = self._tokens / self._seconds if self._seconds > 0 else 0.0
        return min(max(rate, 1.0 / plain_seconds), _MAX_RATE / plain_seconds) if plain_seconds > 0 else rate

    def note_gain(self, gain: float) -> None:
        """Note the estimated gain of asking the head, in tokens. It is less noisy than outcomes, which correct it."""
        self._gains[self.head_was_right] += _NEWEST * (gain - self._gains[self.head_was_right])

    def asks_head(self, lookup_hit: float, *, has_lookup: bool) -> bool:
        """Whether asking the head pays after a step like the last one, or is due for another probe.

        Args:
            lookup_hit: probability that the lookup's first token is right, which the head then gains nothing from.
            has_lookup: whether looked-up nodes are verified; the head is then not probed.
        """
        if self._gains[self.head_was_right] * (1.0 - lookup_hit) > 0:
            self._probe_every = self._probe_in = _FIRST_PROBE
            return True
        self._probe_in -= 1
        if self._probe_in > 0 or has_lookup:
            return False
        self._probe_every = min(2 * self._probe_every, _LAST_PROBE)
        self._probe_in = self._probe_every
        return True
