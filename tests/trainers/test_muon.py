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
    torch.testing.assert_close(orthogonalise(matrix), (left * values @ right).float(), atol=2e-3, rtol=0)


def test_the_iteration_of_other_devices_gives_what_eigenvalues_give_on_a_cpu(monkeypatch):
    torch.manual_seed(0)
    for matrix in (torch.randn(24, 40), torch.randn(40, 24)):
        expected = orthogonalise(matrix)
        with monkeypatch.context() as patched:
            patched.setattr("transformers_resps.trainers.muon._has_eigenvalues", lambda matrix: False)
            torch.testing.assert_close(orthogonalise(matrix), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_matrix_without_a_direction_stops_nothing(value):
    direction = orthogonalise(torch.full((4, 6), value))
    assert torch.equal(direction, torch.zeros(4, 6)) if value == 0.0 else direction.isnan().all()
