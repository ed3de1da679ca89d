"""Replayed texts know the shapes that their actions stand for."""

import dataclasses

import pytest
import torch

from tests.trainers.policies import FEATURES, GRID, task
from transformers_resps import ReSpSPolicy, TreeShape
from transformers_resps.policies import ActionGrid, ReSpSConfig
from transformers_resps.replay import OutcomeTable, TextOutcomes
from transformers_resps.trainers import ReplayRollouts


OTHER = ActionGrid((*GRID.shapes[:2], TreeShape(16, 4, 4)))


def texts(grid: ActionGrid | None) -> TextOutcomes:
    return dataclasses.replace(TextOutcomes(torch.zeros(2, FEATURES), torch.ones(2, 3), torch.ones(2, 3)), grid=grid)


def test_a_policy_of_another_grid_of_the_same_size_is_refused() -> None:
    policy = ReSpSPolicy(ReSpSConfig(FEATURES, OTHER))
    for grid, known in ((OTHER, True), (None, True), (GRID, False)):
        rollouts = ReplayRollouts(OutcomeTable([texts(grid)]))
        if known:
            rollouts.collect(policy, 1, 1, torch.Generator())
            continue
        with pytest.raises(ValueError, match="3 shapes, but is used with another grid of 3, which lacks 1 of them"):
            rollouts.collect(policy, 1, 1, torch.Generator())
    task(1, 0).collect(policy, 1, 1, torch.Generator())


def test_texts_of_two_grids_make_no_table() -> None:
    with pytest.raises(ValueError, match="of 2 grids.*one grid"):
        OutcomeTable([texts(GRID), texts(OTHER)])
