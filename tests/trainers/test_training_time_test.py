import pytest
import torch
import torch.nn.functional as F

from transformers_resps import DraftHead, DraftHeadConfig
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
