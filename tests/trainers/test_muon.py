import pytest
import torch

from transformers_resps.trainers.muon import orthogonalise


@pytest.mark.parametrize("shape", [(24, 24), (24, 30), (24, 72), (96, 32)])
def test_muon_makes_singular_values_what_the_quintic_makes_of_them(shape):
    """Each singular value goes through the polynomial by itself: that is all the iteration does."""
    torch.manual_seed(0)
    matrix = torch.randn(shape) * torch.logspace(0, -3, shape[1])
    left, values, right = torch.linalg.svd(matrix.double() / matrix.double().norm(), full_matrices=False)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    torch.testing.assert_close(orthogonalise(matrix), (left * values @ right).float(), atol=1e-3, rtol=0)
