import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from transformers_resps.trainers.losses import Teacher, soft_cross_entropy


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_loss_and_gradients_equal_the_textbook_formula(softcap, biased):
    torch.manual_seed(0)
    hidden = torch.randn(3, 9, 8, dtype=torch.double, requires_grad=True)
    weight = torch.randn(13, 8, dtype=torch.double, requires_grad=True)
    biases = torch.randn(2, 13) if biased else (None, None)
    teacher = Teacher(torch.randn(9, 8), torch.randn(13, 8), scale=1.5, softcap=softcap, bias=biases[0])
    factors = torch.rand(3, 9) * (torch.rand(3, 9) > 0.3)
    target_logits = (teacher.hidden @ teacher.weight.T + (biases[0] if biased else 0)) * 1.5
    if softcap is not None:
        target_logits = softcap * torch.tanh(target_logits / softcap)
    probabilities = target_logits.softmax(-1)
    logits = hidden @ weight.T + (biases[1].double() if biased else 0)
    rows = -(probabilities * logits.log_softmax(-1)).sum(-1)
    expected = (rows * factors).sum()
    wanted = torch.autograd.grad(expected, [hidden, weight])

    total, losses, hits = soft_cross_entropy(
        hidden, weight, teacher, factors, chunk_size=4, bias=biases[1].double() if biased else None
    )
    got = torch.autograd.grad(total * 1.0, [hidden, weight])
    counted = factors != 0
    torch.testing.assert_close(total, expected, check_dtype=False, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(losses, (rows * counted).sum(-1), check_dtype=False, atol=1e-4, rtol=1e-5)
    assert hits.tolist() == ((logits.argmax(-1) == probabilities.argmax(-1)) & counted).sum(-1).tolist()
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


def test_fp32_gradients_equal_those_of_float64_up_to_rounding():
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 70, 16), torch.randn(300, 16)
    teacher = Teacher(torch.randn(70, 16), torch.randn(300, 16))
    factors = torch.rand(2, 70)
    exact = [part.double().requires_grad_() for part in (hidden, weight)]
    probabilities = (teacher.hidden.double() @ teacher.weight.double().T).softmax(-1)
    rows = -(probabilities * (exact[0] @ exact[1].T).log_softmax(-1)).sum(-1)
    wanted = torch.autograd.grad((rows * factors).sum(), exact)
    leaves = [part.requires_grad_() for part in (hidden, weight)]
    total = soft_cross_entropy(*leaves, teacher, factors)[0]
    for got, expected in zip(torch.autograd.grad(total, leaves), wanted, strict=True):
        assert (got - expected).norm() < 1e-6 * expected.norm()
    torch.testing.assert_close(total, (rows * factors).sum().float(), atol=0, rtol=1e-6)


def test_autocast_multiplies_in_bf16_and_sums_in_fp32():
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 40, 16, requires_grad=True), torch.randn(300, 16)
    biases = torch.randn(2, 300)
    teacher = Teacher(torch.randn(40, 16), torch.randn(300, 16), bias=biases[0])
    call = (hidden, weight, teacher, torch.rand(2, 40), 16, biases[1])
    exact = soft_cross_entropy(*call)
    gradient = torch.autograd.grad(exact[0], hidden)[0]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = soft_cross_entropy(*call)
    assert rounded[0].dtype is torch.float32 and not torch.equal(rounded[0], exact[0])
    torch.testing.assert_close(rounded[:2], exact[:2], atol=0, rtol=1e-2)
    got = torch.autograd.grad(rounded[0], hidden)[0]
    assert got.dtype is torch.float32 and (got - gradient).norm() < 0.01 * gradient.norm()


def test_no_tensor_of_all_positions_and_the_draft_vocabulary_is_ever_made():
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.numel = max(self.numel, result.numel())
            return result

    hidden = torch.randn(4, 300, 8, requires_grad=True)
    weight = torch.randn(200, 8, requires_grad=True)
    teacher = Teacher(torch.randn(300, 8), torch.randn(200, 8))
    with Largest() as largest:
        soft_cross_entropy(hidden, weight, teacher, torch.ones(4, 300), chunk_size=32)[0].backward()
    assert largest.numel == max(32 * 200, hidden.numel())
