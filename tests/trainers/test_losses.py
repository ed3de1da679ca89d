"""The loss and the unrolled levels against the textbook."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import build_target
from transformers_resps import DraftHead, DraftHeadConfig
from transformers_resps.assistants import MtpHead
from transformers_resps.drafting import DraftCache
from transformers_resps.heads.unrolled import unroll
from transformers_resps.trainers.losses import Teacher, pack, soft_cross_entropy


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


def test_what_is_added_to_the_logits_is_learned_with_them():
    """As if states and rows were side by side."""
    torch.manual_seed(0)
    shapes = (2, 9, 8), (13, 8), (2, 9, 3), (13, 3)
    hidden, weight, states, rows = (torch.randn(*shape, dtype=torch.double, requires_grad=True) for shape in shapes)
    teacher, factors = Teacher(torch.randn(9, 8), torch.randn(13, 8)), torch.rand(2, 9)
    side_by_side = torch.cat([hidden, states], dim=-1), torch.cat([weight, rows], dim=-1)
    expected = soft_cross_entropy(*side_by_side, teacher, factors, 4)
    found = soft_cross_entropy(hidden, weight, teacher, factors, 4, added=(states, rows))
    torch.testing.assert_close(found, expected)
    leaves = [hidden, weight, states, rows]
    torch.testing.assert_close(torch.autograd.grad(found[0], leaves), torch.autograd.grad(expected[0], leaves))


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


LENGTH, STEPS = 11, 4


def small_head(**overrides):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"feature_layers": [1, 2, 3], "vocab_size": 60, "draft_vocab_size": 20, "initializer_range": 0.3}
    return DraftHead(DraftHeadConfig(**sizes | overrides)).double()


def dense_levels(head, embed, features, tokens, steps):
    """Every level over all earlier entries with an explicit `[(k + 1) t]` mask, as in the paper's figure."""
    length = features.shape[1]
    order = torch.arange(length)
    hidden, keys, values, outputs = head.fuse(features), {}, {}, []
    for level in range(steps):
        embeddings = embed(F.pad(tokens[:, level + 1 :], (0, level + 1)))
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

        hidden = head(head.feedback(hidden) if level else hidden, embeddings, head.rope(order[None] + level), attend)
        outputs.append(head.norm(hidden))
    return torch.stack(outputs)


SLOTS = {"all": None, "a part": [[2, 3, 7, 9], [0, 1, 9, 10]]}


@pytest.mark.parametrize("slots", SLOTS.values(), ids=SLOTS)
@pytest.mark.parametrize(
    "overrides", [{}, {"num_hidden_layers": 2, "num_key_value_heads": 4}, {"feedback_post_norm": True}]
)
def test_levels_and_gradients_equal_those_of_a_dense_mask(overrides, slots):
    head, target = small_head(**overrides), build_target(vocab_size=60).double()
    features = torch.randn(2, LENGTH, 96, dtype=torch.double)
    tokens = torch.randint(60, (2, LENGTH))
    wanted = None if slots is None else torch.tensor(slots)
    rows = (slice(None),) if wanted is None else (torch.arange(2)[:, None], wanted)
    found, gradients = [], []
    for levels in (
        dense_levels(head, target.get_input_embeddings(), features, tokens, STEPS)[:, *rows],
        unroll(head.bind(target, head), features, tokens, STEPS, wanted),
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


def chains(model, features, tokens, levels):
    """Every slot's levels by the cache that drafting uses: a prefix, then one token at a time; `[levels, t, h]`."""
    length, found = tokens.shape[1], []
    padded = F.pad(tokens, (0, levels))
    for slot in range(length):
        caches, states, outputs = {}, model.fuse(features[:, : slot + 1]), []
        hidden, order = states, torch.arange(slot + 1)
        for level in range(levels):
            depth = min(level, model.depths - 1)
            fresh = depth not in caches
            cache = caches.setdefault(depth, DraftCache())
            if fresh:  # over the whole prefix
                read, start = padded[:, level + 1 : slot + level + 2], 0
            else:
                read, start = padded[:, slot + level + 1 :][:, :1], slot + level
                hidden, order = hidden[:, -1:], order[-1:]
            cache.reserve(start + read.shape[1])
            entries = cache.attend(start, start + read.shape[1])
            output = model.run(depth, read, hidden, model.places(order[None] + level), entries)
            outputs.append(model.normed(output[0, -1], depth))
            hidden = model.feedback(output, hidden)
        found.append(torch.stack(outputs))
    return torch.stack(found, dim=1)


@torch.no_grad()
@pytest.mark.parametrize(
    "settings",
    [{}, {"fed_back": "before", "fed": "before"}, {"fed_back": "target"}, {"depths": 3}]
    + [{"depths": 3, "fed_back": "target"}, {"layer_types": ("sliding_attention",)}],
    ids=str,
)
def test_the_levels_of_mtp_layers_are_those_of_a_drafted_chain(settings):
    kind = "mistral" if "layer_types" in settings else "llama"
    target = build_target(kind, initializer_range=0.3, **({"sliding_window": 4} if kind == "mistral" else {}))
    head = MtpHead.fresh(target, **settings)
    torch.manual_seed(0)
    for parameter in head.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    features, tokens = torch.randn(2, LENGTH, 32), torch.randint(3, 64, (2, LENGTH))
    slots = torch.tensor([[2, 3, 7], [0, 1, 7]])
    found = unroll(head.bind(target, head), features, tokens, 3, slots)
    for text in range(2):
        wanted = chains(head.bind(target), features[text : text + 1], tokens[text : text + 1], 3)
        torch.testing.assert_close(found[:, text], wanted[:, slots[text]], atol=1e-4, rtol=1e-4)
