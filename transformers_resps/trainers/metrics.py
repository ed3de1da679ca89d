"""What is logged while a head is trained: agreement per draft level, speed, time left."""

import time
from collections.abc import Callable

import torch
from torch import Tensor


class LevelMeter:
    """Loss and top-1 agreement with the target's pick, by level, since the last reset.

    Tokens whose pick is outside the draft vocabulary count as misses: they are misses when decoding.
    """

    def __init__(self, levels: int) -> None:
        self._levels = levels
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._sums = torch.zeros(3, self._levels, dtype=torch.float64)  # losses, hits, predicted tokens
        self._tokens = 0

    def add(self, losses: Tensor, hits: Tensor, predicted: Tensor, tokens: int) -> None:
        """Add a batch: per level `[k]` the summed loss, hits and predicted tokens; and the tokens of the batch."""
        self._sums += torch.stack([losses, hits, predicted]).detach().to("cpu", torch.float64)
        self._tokens += tokens

    def read(self, over_processes: Callable[[Tensor], Tensor] = lambda sums: sums) -> tuple[dict[str, float], int]:
        """`loss_1`, `accuracy_1`, `accuracy_2`, ... for levels counted from 1, and the tokens of all batches.

        Args:
            over_processes: adds up a tensor over all processes.
        """
        everything = over_processes(torch.cat([self._sums.flatten(), torch.tensor([float(self._tokens)])]))
        losses, hits, predicted = everything[:-1].view_as(self._sums)
        agreement = (hits / predicted.clamp(min=1)).tolist()
        first_loss = float(losses[0] / predicted[0].clamp(min=1))
        return {"loss_1": round(first_loss, 4)} | {
            f"accuracy_{level}": round(share, 4) for level, share in enumerate(agreement, start=1)
        }, int(everything[-1])


class Pace:
    """The speed of a run since the last line of metrics, and when it will end."""

    def __init__(self) -> None:
        self._since: tuple[float, int] | None = None  # seconds and step

    def start(self, step: int) -> None:
        """Note when the first step that is measured begins; later calls do nothing."""
        self._since = self._since or (time.monotonic(), step)

    def pause(self, seconds: float) -> None:
        """Leave out seconds in which nothing was trained."""
        if self._since is not None:
            self._since = self._since[0] + seconds, self._since[1]

    def read(self, tokens: int, step: int, max_steps: int) -> dict[str, float]:
        """`tokens_per_second` and `minutes_left` after the `tokens` since the last line; empty after no step."""
        now = time.monotonic()
        (before, first), self._since = self._since or (now, step), (now, step)
        if step <= first:
            return {}
        left = (max_steps - step) * (now - before) / (step - first)
        return {"tokens_per_second": round(tokens / (now - before), 1), "minutes_left": round(left / 60, 1)}
