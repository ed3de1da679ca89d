"""Running averages per draft level. Knows numbers only."""

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
        self.tokens = 0

    def add(self, losses: Tensor, hits: Tensor, predicted: Tensor, tokens: int) -> None:
        """Add a batch: per level `[k]` the summed loss, hits and predicted tokens; and the tokens of the batch."""
        self._sums += torch.stack([losses, hits, predicted]).detach().to("cpu", torch.float64)
        self.tokens += tokens

    def read(self) -> dict[str, float]:
        """`loss_1`, `top1_1`, `top1_2`, ... for levels counted from 1."""
        losses, hits, predicted = self._sums
        agreement = (hits / predicted.clamp(min=1)).tolist()
        first_loss = float(losses[0] / predicted[0].clamp(min=1))
        return {"loss_1": round(first_loss, 4)} | {
            f"top1_{level}": round(share, 4) for level, share in enumerate(agreement, start=1)
        }
