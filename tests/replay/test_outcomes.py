"""The oracle against trying everything, and held outcomes against single steps."""

import itertools

import pytest
import torch

from transformers_resps.replay import OutcomeTable, TextOutcomes


def random_table(seed: int, texts: int, actions: int, length: int) -> OutcomeTable:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(texts):
        left = length - torch.arange(length)[:, None]
        emitted = torch.randint(1, 4, (length, actions), generator=generator).minimum(left)
        made.append(
            TextOutcomes(torch.zeros(length, 1), emitted, 0.5 + torch.rand(length, actions, generator=generator))
        )
    return OutcomeTable(made)


def try_everything(table: OutcomeTable, text: int, choices: tuple[int, ...]) -> float:
    place, stop, seconds = int(table.starts[text]), int(table.stops[text]), 0.0
    for action in itertools.chain(choices, itertools.repeat(choices[-1])):
        if place >= stop:
            return seconds
        seconds, place = seconds + float(table.seconds[place, action]), place + int(table.emitted[place, action])
    raise AssertionError


def test_the_oracle_equals_trying_every_sequence_of_actions() -> None:
    table = random_table(0, texts=3, actions=3, length=7)
    for text in range(3):
        every = [try_everything(table, text, choices) for choices in itertools.product(range(3), repeat=7)]
        assert float(table.best_seconds[text]) == pytest.approx(min(every))
        fixed = [try_everything(table, text, (action,)) for action in range(3)]
        assert table.fixed_seconds[text].tolist() == pytest.approx(fixed)
    together = table.fixed_seconds.sum(0)
    assert together[table.best_fixed] == together.min() >= table.fixed_seconds.min(-1).values.sum()
    assert table.fixed_seconds.min(-1).values.sum() >= table.best_seconds.sum()
    assert table.best_fixed_rate == pytest.approx(21 / float(together.min()))


def test_held_outcomes_are_those_of_single_steps_in_a_row() -> None:
    table = random_table(1, texts=2, actions=2, length=9)
    held = table.held(3)
    for place, action in itertools.product(range(18), range(2)):
        here, stop, steps = place, 9 if place < 9 else 18, []
        while here < stop and len(steps) < 3:
            steps.append((int(table.emitted[here, action]), float(table.seconds[here, action])))
            here += steps[-1][0]
        assert float(held.emitted[place, action]) == sum(tokens for tokens, _ in steps)
        assert float(held.seconds[place, action]) == pytest.approx(sum(seconds for _, seconds in steps))
        rates = [tokens / seconds for tokens, seconds in steps]
        assert float(held.mean_rates[place, action]) == pytest.approx(sum(rates) / len(rates))
