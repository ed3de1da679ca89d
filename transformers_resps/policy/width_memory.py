"""How wide trees pay where the target's recurrent layers read every path of a tree."""

_MEMORY = 0.95  # weight of the past when a step is added: about the last twenty count
_MARGIN = 1.03  # a width must be so much faster than the best one to take its place
_FIRST_TRIAL, _LAST_TRIAL = 8, 256  # drafted steps between two trials


class WidthMemory:
    """Drafts chains at first, tries other widths now and then, and keeps the one that writes the most tokens a second.

    Without kernels a further leaf costs as much as all nodes of its path, with them next to nothing: only the clock
    knows. The next wider or narrower width is tried, and less often each time that none is better.

    Args:
        most: children per node of the widest tree.
    """

    def __init__(self, most: int) -> None:
        self._widths = [1]
        while self._widths[-1] < most:
            self._widths.append(min(2 * self._widths[-1], most))
        self._tokens, self._seconds = [0.0] * len(self._widths), [0.0] * len(self._widths)  # decayed sums
        self._best = self._chosen = 0
        self._trial_in = self._trial_every = _FIRST_TRIAL

    def choose(self, most: int) -> int:
        """The width of the coming draft, at most `most`."""
        self._chosen = self._neighbour() if self._trial_in <= 0 else self._best
        return min(self._widths[self._chosen], most)

    def add(self, tokens: float, seconds: float) -> None:
        """Take in what a step of the chosen width was expected to write, which is less noisy than what it wrote, and
        how long it took.
        """
        place = self._chosen
        self._tokens[place] = self._tokens[place] * _MEMORY + tokens
        self._seconds[place] = self._seconds[place] * _MEMORY + seconds
        if place == self._best:
            self._trial_in -= 1
            return
        is_better = self._rate(place) > _MARGIN * self._rate(self._best)
        self._trial_every = _FIRST_TRIAL if is_better else min(2 * self._trial_every, _LAST_TRIAL)
        self._best, self._trial_in = place if is_better else self._best, self._trial_every

    def _neighbour(self) -> int:
        """Of the next wider width and the next narrower one, that which was timed less."""
        places = [place for place in (self._best + 1, self._best - 1) if 0 <= place < len(self._widths)]
        return min(places, key=self._seconds.__getitem__, default=self._best)

    def _rate(self, place: int) -> float:
        return self._tokens[place] / self._seconds[place] if self._seconds[place] > 0 else 0.0
