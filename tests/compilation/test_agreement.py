"""Rounding is told from wrong code."""

import pytest
import torch
from torch import Tensor

from transformers_resps.compilation.compiled import disagreement


def logits() -> Tensor:
    return torch.randn(2, 3, 500, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("dtype", "noise"), [(torch.bfloat16, 0.05), (torch.float32, 1e-4), (torch.float64, 5e-7)])
def test_rounding_of_the_dtype_agrees_and_ten_times_as_much_does_not(dtype: torch.dtype, noise: float) -> None:
    expected, errors = logits().double(), logits().flip(-1)
    assert disagreement(expected + noise * errors, expected, dtype) is None
    assert disagreement(expected + 10 * noise * errors, expected, dtype) is not None


def test_a_single_value_that_is_far_off_is_rounding_in_low_precision() -> None:
    expected = logits().bfloat16()
    found = expected.clone()
    found[0, 1, 7] += expected.abs().max()
    assert disagreement(found, expected, torch.bfloat16) is None


def test_rows_in_another_order_and_nan_disagree() -> None:
    expected = logits().bfloat16()
    assert (
        disagreement(expected.flip(1), expected, torch.bfloat16) == "differ from the eager ones by 1.1 of their norm"
    )
    assert disagreement(expected * float("nan"), expected, torch.bfloat16) is not None
