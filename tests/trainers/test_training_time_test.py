import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from transformers_resps import DraftHead, DraftHeadConfig
from transformers_resps.trainers.muon import orthogonalise
from transformers_resps.trainers.soft_cross_entropy import Teacher, soft_cross_entropy
from transformers_resps.trainers.training_time_test import unroll


LENGTH, STEPS = 11, 4


def small_head(**overrides):
    torch.manual_seed(0)
    config = DraftHeadConfig(
        **{
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "feature_layers": [1, 2, 3],
            "vocab_size": 60,
            "draft_vocab_size": 20,
            "initializer_range": 0.3,
            **overrides,
        }
    )
    return DraftHead(config).double()


def dense_levels(head, features, embeddings, steps):
    """Every level over all earlier entries with an explicit `[(k + 1) t]` mask, as in the paper's figure."""
    length = features.shape[1]
    order = torch.arange(length)
    hidden, keys, values, outputs = head.fuse(features), {}, {}, []
    for level in range(steps):
        tokens = F.pad(embeddings[:, level + 1 :], (0, 0, 0, level + 1))
        columns = torch.arange((level + 1) * length)
        mask = (columns < length) & (columns <= order[:, None])
        mask |= (columns >= length) & (columns % length == order[:, None])

        def attend(layer, q, k, v, mask=mask):
            keys[layer] = torch.cat([keys[layer], k], dim=2) if layer in keys else k
            values[layer] = torch.cat([values[layer], v], dim=2) if layer in values else v
            repeats = q.shape[1] // k.shape[1]
            all_keys = keys[layer].repeat_interleave(repeats, dim=1)
            all_values = values[layer].repeat_interleave(repeats, dim=1)
            scores = (q @ all_keys.mT) * q.shape[-1] ** -0.5
            return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ all_values

        hidden = head(head.feedback(hidden) if level else hidden, tokens, order[None] + level, attend)
        outputs.append(head.norm(hidden))
    return torch.stack(outputs)


@pytest.mark.parametrize("start", [0, 4])
@pytest.mark.parametrize(
    "overrides", [{}, {"num_hidden_layers": 2, "num_key_value_heads": 4}, {"feedback_post_norm": True}]
)
def test_levels_equal_a_dense_mask(start, overrides):
    head = small_head(**overrides)
    features = torch.randn(2, LENGTH, 96, dtype=torch.double)
    embeddings = torch.randn(2, LENGTH, 32, dtype=torch.double)
    expected = dense_levels(head, features, embeddings, STEPS)[:, :, start:]
    actual = unroll(head, features, embeddings, STEPS, start)
    torch.testing.assert_close(actual, expected)


def test_gradients_equal_those_of_a_dense_mask():
    head = small_head()
    features = torch.randn(1, LENGTH, 96, dtype=torch.double)
    embeddings = torch.randn(1, LENGTH, 32, dtype=torch.double)
    probe = torch.randn(STEPS, 1, LENGTH, 32, dtype=torch.double)
    gradients = []
    for levels in (dense_levels, unroll):
        head.zero_grad()
        (levels(head, features, embeddings, STEPS) * probe).sum().backward()
        gradients.append([p.grad.clone() for n, p in head.named_parameters() if "lm_head" not in n])
    torch.testing.assert_close(gradients[0], gradients[1])


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


@pytest.mark.parametrize("shape", [(24, 24), (24, 30), (24, 72), (96, 32)])
def test_muon_makes_singular_values_what_the_quintic_makes_of_them(shape):
    """Each singular value goes through the polynomial by itself: that is all the iteration does."""
    torch.manual_seed(0)
    matrix = torch.randn(shape) * torch.logspace(0, -3, shape[1])
    left, values, right = torch.linalg.svd(matrix.double() / matrix.double().norm(), full_matrices=False)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    torch.testing.assert_close(orthogonalise(matrix), (left * values @ right).float(), atol=1e-3, rtol=0)
