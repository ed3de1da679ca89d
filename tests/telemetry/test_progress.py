"""A bar that moves while a model decodes."""

import torch

from transformers_resps.telemetry.display import moving


class Bar:
    """Counts."""

    def __init__(self) -> None:
        self.n = 0

    def update(self, n: int) -> None:
        self.n += n


def test_a_bar_moves_with_the_steps_of_a_batch_and_ends_with_it() -> None:
    bar, model, seen = Bar(), torch.nn.Identity(), []
    with moving(bar, model, rows=4, most_steps=8):
        for _ in range(6):
            model(torch.zeros(1))
            seen.append(bar.n)
    assert seen == [0, 1, 1, 2, 2, 3] and bar.n == 4
    model(torch.zeros(1))
    assert bar.n == 4  # the model moves it no longer
    with moving(bar, model, rows=2, most_steps=1):
        model(torch.zeros(1))
        model(torch.zeros(1))
    assert bar.n == 6
