"""How far a call has come: by its slowest row, since it ends with that one."""

from ..telemetry.report import StepRecord


class RowProgress:
    """Counts the tokens of each row of a call.

    Args:
        lag_tokens: a row may lag behind the mean by so many before it counts as slower: it may have had bad luck.
    """

    def __init__(self, lag_tokens: float) -> None:
        self._lag_tokens = lag_tokens
        self._written: list[int] = []  # tokens of each row since the call began

    @property
    def row_count(self) -> int:
        """Rows of the call, finished ones included; 0 before its first step."""
        return len(self._written)

    def begin_call(self) -> None:
        self._written = []

    def add(self, record: StepRecord) -> float:
        """Tokens by which the unfinished rows advanced in this step."""
        if len(self._written) != len(record.emitted):
            self._written = [0] * len(record.emitted)
        writing = [row for row, count in enumerate(record.emitted) if count]
        before = self._of(writing)
        for row in writing:
            self._written[row] += record.emitted[row]
        return self._of(writing) - before

    def _of(self, rows: list[int]) -> float:
        """Tokens of the slowest row plus the allowed lag, but at most the mean over rows."""
        written = [self._written[row] for row in rows]
        return min(min(written) + self._lag_tokens, sum(written) / len(written)) if written else 0.0
