"""How far the answers are, on a terminal and in a log."""

import pytest
import torch

from runs.progress import PromptProgress


def test_a_terminal_gets_a_bar_and_a_log_one_line_for_each_batch(capsys: pytest.CaptureFixture[str]) -> None:
    now, model = [0.0], torch.nn.Identity()
    for is_terminal in (True, False):
        now[0] = 0.0
        with PromptProgress(10, 2, is_terminal=is_terminal, clock=lambda: now[0]) as progress:
            with progress.watch(model, 4, most_steps=8):
                model(torch.zeros(1))
            now[0] = 2.0
            progress.add(4, 100)
        printed = capsys.readouterr()
        if is_terminal:
            assert "6/10" in printed.err and "50 tokens/s" in printed.err and not printed.out
        else:
            assert printed.out == "6/10 prompts, 50 tokens/s, 0:00:02 left\n" and not printed.err
