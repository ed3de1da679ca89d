"""How far the answers are, on a terminal and in a log."""

import pytest
import torch

from runs.progress import PromptProgress


def test_the_bar_moves_within_a_batch_and_a_log_gets_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    now, model = [0.0], torch.nn.Identity()
    with PromptProgress(10, 2, is_terminal=True, clock=lambda: now[0]) as progress:
        with progress.watch(model, 4, most_steps=8):
            for _ in range(6):
                model(torch.zeros(1))
            assert progress.shown == 2 + 3
        assert progress.shown == 2 + 4
        now[0] = 2.0
        progress.add(4, 100)
    model(torch.zeros(1))
    assert progress.shown == 6
    printed = capsys.readouterr()
    assert "50 tokens/s" in printed.err and not printed.out
    with PromptProgress(10, 2, is_terminal=False, clock=lambda: now[0]) as progress:
        now[0] = 6.0
        progress.add(4, 100)
    printed = capsys.readouterr()
    assert printed.out == "6/10 prompts, 25 tokens/s, 0:00:04 left\n" and not printed.err
