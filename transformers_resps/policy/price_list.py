"""What verifying more nodes costs, against what they are worth."""

from collections.abc import Sequence

from .costs import RunningCosts


_MAX_AGE = 8  # steps for which a list is reused: reading it every time takes a third of a decision


class PriceList:
    """Seconds of verifying 1, 2, ... nodes, as `RunningCosts` last told them.

    Args:
        max_nodes: the longest tree that has a price.
    """

    def __init__(self, max_nodes: int) -> None:
        self._max_nodes = max_nodes
        self._seconds: list[float] = []
        self._steps_left = self._known_sizes = 0

    def refresh(self, costs: RunningCosts) -> None:
        """Read the costs again if the list is old, or a tree of another size was timed since. Call it once a step."""
        self._steps_left -= 1
        if self._steps_left <= 0 or costs.sizes != self._known_sizes:
            self._seconds = [costs.verify_seconds(nodes) for nodes in range(1, self._max_nodes + 1)]
            self._steps_left, self._known_sizes = _MAX_AGE, costs.sizes

    def best_prefix(self, worth: Sequence[float], nodes_before: int, rate: float) -> tuple[int, float]:
        """How many nodes to add to a tree, from the first.

        Args:
            worth: expected tokens of each node.
            nodes_before: nodes that the tree has.
            rate: tokens that a second is worth.

        Returns:
            The number of nodes, and their expected tokens less what verifying them costs.
        """
        seconds = self._seconds[nodes_before - 1 :]
        gain, best_gain, best = rate * seconds[0], 0.0, 0
        for count, (value, total) in enumerate(zip(worth, seconds[1:], strict=False), start=1):
            gain += value
            if gain - rate * total > best_gain:
                best_gain, best = gain - rate * total, count
        return best, best_gain
