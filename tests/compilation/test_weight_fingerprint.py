"""What compiled code takes for granted: every change of a weight is noticed, and nothing else."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from transformers_resps.compilation.compiled import WeightFingerprint


def module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2, dtype=torch.bfloat16)).eval()


def _add_in_place(one: nn.Module) -> None:
    with torch.no_grad():
        one[0].weight.add_(1.0)  # type: ignore[index, union-attr]


def _replace(one: nn.Module) -> None:
    one[0].weight = nn.Parameter(one[0].weight.detach().clone())  # type: ignore[index, union-attr]


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "load_state_dict": lambda one: one.load_state_dict(one.state_dict()),
    "to another dtype": lambda one: one.double(),
    "in place": _add_in_place,
    "through data": lambda one: one[2].weight.data.mul_(2),  # type: ignore[index, union-attr]
    "another parameter": _replace,
    "training mode": lambda one: one.train(),
    "gradients": lambda one: one.requires_grad_(False),
    "a buffer": lambda one: one[1].running_mean.add_(1.0),  # type: ignore[index, union-attr]
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_noticed(name: str) -> None:
    one = module()
    before = WeightFingerprint(one)
    assert WeightFingerprint(one) == before
    CHANGES[name](one)
    assert WeightFingerprint(one) != before


def test_a_forward_changes_nothing_and_a_setting_counts() -> None:
    one = module()
    before = WeightFingerprint(one, "sdpa")
    one[0](torch.randn(2, 4))
    assert WeightFingerprint(one, "sdpa") == before
    assert WeightFingerprint(one, "eager") != before
    assert before != "sdpa"


def test_weights_that_are_not_numbers_are_equal_to_themselves() -> None:
    one = nn.Linear(2, 2)
    one.weight.data.fill_(float("nan"))
    assert WeightFingerprint(one) == WeightFingerprint(one)
