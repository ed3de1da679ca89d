import pytest
import torch
import torch.nn.functional as F

from transformers_resps import DraftHead, DraftHeadConfig
from transformers_resps.trainers.losses import pack, unroll


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


SLOTS = {"all": None, "a part": [[2, 3, 7, 9], [0, 1, 9, 10]]}


@pytest.mark.parametrize("slots", SLOTS.values(), ids=SLOTS)
@pytest.mark.parametrize(
    "overrides", [{}, {"num_hidden_layers": 2, "num_key_value_heads": 4}, {"feedback_post_norm": True}]
)
def test_levels_and_gradients_equal_those_of_a_dense_mask(overrides, slots):
    head = small_head(**overrides)
    features = torch.randn(2, LENGTH, 96, dtype=torch.double)
    embeddings = torch.randn(2, LENGTH, 32, dtype=torch.double)
    wanted = None if slots is None else torch.tensor(slots)
    rows = (slice(None),) if wanted is None else (torch.arange(2)[:, None], wanted)
    found, gradients = [], []
    for levels in (
        dense_levels(head, features, embeddings, STEPS)[:, *rows],
        unroll(head, features, embeddings, STEPS, wanted),
    ):
        head.zero_grad()
        torch.manual_seed(1)
        (levels * torch.randn_like(levels)).sum().backward()
        found.append(levels.detach())
        gradients.append([p.grad.clone() for n, p in head.named_parameters() if "lm_head" not in n])
    torch.testing.assert_close(*found)
    torch.testing.assert_close(*gradients)


def test_every_text_gets_the_slots_that_its_losses_need():
    """The second text needs fewer: it gets one more than it needs."""
    rows = torch.tensor([0, 0, 0, 1])
    slots = torch.tensor([[5, 6, 7, 1], [4, 5, 6, 0], [3, 4, 5, -1]])
    packed, columns = pack(rows, slots, torch.Size([2, 9]))
    assert packed[0].tolist() == [3, 4, 5, 6, 7] and packed[1, :2].tolist() == [0, 1]
    assert torch.equal(packed, packed.sort(-1).values) and all(len(set(text)) == 5 for text in packed.tolist())
    assert torch.equal(packed[rows, columns], slots.clamp(min=0))


def test_a_batch_whose_losses_need_nothing_still_gets_a_slot():
    """Distributed training waits for a gradient of every process."""
    packed, columns = pack(torch.zeros(0, dtype=torch.long), torch.zeros(3, 0, dtype=torch.long), torch.Size([2, 9]))
    assert packed.shape == (2, 1) and columns.shape == (3, 0)
