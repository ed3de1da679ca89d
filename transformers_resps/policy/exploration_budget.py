"""How many seconds drafting may lose against plain decoding."""

from dataclasses import dataclass

from .guard_config import GuardConfig


@dataclass(frozen=True, slots=True)
class StepLimits:
    """Seconds that one step may lose if nothing of it is accepted.

    Attributes:
        total: with drafting and verifying a tree of the head.
        tree: the same, for a policy that can learn from drafting alone.
        lookup: with verifying a looked-up chain.
    """

    total: float
    tree: float
    lookup: float


class ExplorationBudget:
    """Bounds what exploration loses against a known baseline.

    Drafting earns what its tokens would have taken plainly and pays what it took; a small share of all time is added.
    A step is taken only if the budget covers its worst outcome: that nothing is accepted. This is the rule of
    conservative exploration (Wu et al., "Conservative Bandits", 2016, arXiv 1602.04282), with plain decoding as the
    baseline.

    Bound: if no step loses more than `limits` gave for it, a call of `n` tokens, as measured by its plain seconds,
    loses at most what it began with, `share` of its seconds, and the largest step's extra: `trial_steps`, and
    `confident_steps` where the policy is confident. It begins with `start_steps`, or with up to `max_carried_steps`
    that earlier calls have won.

    Args:
        config: the numbers.

    Attributes:
        seconds: what may be lost now; negative while more was lost than was there.
    """

    def __init__(self, config: GuardConfig) -> None:
        self._config = config
        self.seconds = 0.0

    def begin_call(self, plain_seconds: float) -> None:
        """Start a call: losses are forgiven, and little of the gains is carried over."""
        least, most = self._config.start_steps * plain_seconds, self._config.max_carried_steps * plain_seconds
        self.seconds = min(max(self.seconds, least), most)

    def limits(self, room: int, plain_seconds: float, *, is_confident: bool, probes_head: bool) -> StepLimits:
        """What the next step may lose.

        Args:
            room: tokens that the text may still gain.
            plain_seconds: of a plain step.
            is_confident: whether the policy's estimates rest on outcomes.
            probes_head: whether it learns from drafting alone; verifying then waits for confidence.
        """
        config = self._config
        trial = min(config.trial_steps, config.trial_steps_per_token * room) * plain_seconds
        confident = min(config.confident_steps, config.confident_steps_per_token * room) * plain_seconds
        lookup = self.seconds + confident  # a lookup's record also grows in plain steps
        tree = self.seconds + (confident if is_confident else 0.0)
        total = tree + trial
        return StepLimits(total, tree if probes_head else total, lookup)

    def settle(self, gained_seconds: float) -> None:
        """Add what a step that drafted gained over plain decoding, or lost if negative."""
        self.seconds += gained_seconds

    def end_step(self, step_seconds: float, plain_seconds: float) -> None:
        """Add the share of a step's time; limit what is kept."""
        most = self._config.max_earned_steps * plain_seconds
        self.seconds = min(self.seconds + self._config.share * step_seconds, most)

    def open(self, plain_seconds: float) -> None:
        """The first plain step was timed."""
        self.seconds += self._config.start_steps * plain_seconds

    def forgive(self, plain_seconds: float) -> None:
        """Forget losses: what they say no longer holds."""
        self.seconds = max(self.seconds, self._config.start_steps * plain_seconds)

    def excuse(self, lost_seconds: float) -> None:
        """Forget losses as far as plain steps would have lost these seconds, too."""
        if self.seconds < 0.0:
            self.seconds = min(self.seconds + max(lost_seconds, 0.0), 0.0)

    def rescale(self, factor: float) -> None:
        """All steps take `factor` times as long now."""
        self.seconds *= factor

    def reprice(self, plain_seconds: float) -> None:
        """Plain steps take only so long now: gains were earned at another price."""
        self.seconds = min(self.seconds, self._config.max_repriced_steps * plain_seconds)
