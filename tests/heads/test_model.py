"""The head computes what its parts compute, and generating leaves it as it was."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from transformers_resps import attach, prepack
from transformers_resps.drafting import DraftCache
from transformers_resps.drafting.text import PlaceWindow, Positions
from transformers_resps.heads import BoundHead, DraftHead
from transformers_resps.verifying.prepacking import PackedWeight, PrepackedLinear


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("padded", [False, True])
def test_the_newest_output_alone_is_the_last_of_all_outputs(
    tiny_target: PreTrainedModel, layers: int, padded: bool
) -> None:
    head = DraftHead.from_target(tiny_target, draft_vocab_size=48, num_hidden_layers=layers).eval()
    hidden, embeddings = torch.randn(2, 2, 9, 32).unbind()
    mask = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril() if padded else None
    if mask is not None:
        mask[0, :, 1:, 0] = False
    outputs = []
    with torch.no_grad():
        for wanted in (slice(None), slice(-1, None)):
            cache = DraftCache()
            attend = cache.attend(0, 9, mask=mask)
            outputs.append(head(hidden, embeddings, head.rope(torch.arange(9)[None]), attend, wanted))
            follow = cache.attend(9, 10)
            outputs.append(head(hidden[:, :1], embeddings[:, :1], head.rope(torch.tensor([[9]])), follow))
    torch.testing.assert_close(outputs[2], outputs[0][:, -1:])
    torch.testing.assert_close(outputs[3], outputs[1])  # what was kept is the same


@pytest.mark.parametrize("rope_type", ["default", "dynamic"])
def test_angles_are_those_of_the_head_wherever_a_text_goes_on(
    tiny_head: DraftHead, tiny_target: PreTrainedModel, rope_type: str
) -> None:
    tiny_head.config.rope_parameters = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 2.0}
    head = DraftHead(tiny_head.config)
    window = PlaceWindow(head.bind(tiny_target))
    for start, end in [(0, 3), (3, 9), (9, 300), (250, 260), (299, 700), (2, 4)]:
        for part, own in zip(
            Positions(window, range(start, end), slice(0, end - start)).places,
            head.rope(torch.arange(start, end)[None]),
            strict=True,
        ):
            assert torch.equal(part, own)


NEEDS_ONEDNN = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


def state_of(head: DraftHead) -> list[Any]:
    """Class and attributes of every module of the head; of the head itself without what it remembers of itself."""
    parts = [(name, type(part), dict(vars(part))) for name, part in head.named_modules()]
    for remembered in ("_packed", "_fingerprint"):
        parts[0][2].pop(remembered)
    return parts


def drafted_by(head: DraftHead) -> set[type[nn.Module]]:
    """Gathers the classes of the layers that multiply for this head."""
    found: set[type[nn.Module]] = set()
    for part in (head.fc, *head.layers[0].modules()):
        if isinstance(part, nn.Linear):
            part.register_forward_hook(lambda module, *_: found.add(type(module)))
    return found


@NEEDS_ONEDNN
def test_generating_multiplies_by_packed_weights_and_leaves_the_heads_modules_as_they_were(
    tiny_target: PreTrainedModel, tiny_head: DraftHead, prompt: dict[str, torch.Tensor]
) -> None:
    model, found, before = attach(tiny_target), drafted_by(tiny_head), state_of(tiny_head)
    for _ in range(2):
        model.generate(**prompt, max_new_tokens=8, assistant_model=tiny_head)
    assert found == {PrepackedLinear}
    assert state_of(tiny_head) == before
    assert not any(isinstance(part, PrepackedLinear) for part in tiny_head.modules())


@NEEDS_ONEDNN
def test_weights_are_packed_once_for_all_calls_and_again_after_training(
    tiny_target: PreTrainedModel,
    tiny_head: DraftHead,
    prompt: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    packed: list[torch.Tensor] = []
    pack = PackedWeight._pack
    monkeypatch.setattr(PackedWeight, "_pack", lambda self, weight: packed.append(weight) or pack(self, weight))
    model, linear = attach(tiny_target), [part for part in tiny_head.modules() if isinstance(part, nn.Linear)]
    for _ in range(3):
        model.generate(**prompt, max_new_tokens=8, assistant_model=tiny_head)
    assert len(packed) == len({id(weight) for weight in packed}) == len(linear)
    with torch.no_grad():
        tiny_head.fc.weight.mul_(2)
    model.generate(**prompt, max_new_tokens=8, assistant_model=tiny_head)
    assert packed[len(linear) :] == [tiny_head.fc.weight]


def packed_weights() -> list[PackedWeight]:
    return [one for one in gc.get_objects() if type(one) is PackedWeight]


@NEEDS_ONEDNN
@torch.no_grad()
def test_packed_weights_die_with_their_head(tiny_target: PreTrainedModel, tiny_head: DraftHead) -> None:
    earlier = weakref.WeakSet(packed_weights())
    head = DraftHead(tiny_head.config)
    bound = BoundHead(head, tiny_target)
    bound.fuse(torch.zeros(1, 2, head.config.features_width))
    kept = [weakref.ref(packed) for packed in packed_weights() if packed not in earlier]
    assert kept
    del bound
    gc.collect()
    assert all(packed() is not None for packed in kept), "the next call would pack again"
    del head
    gc.collect()
    assert all(packed() is None for packed in kept)


@torch.no_grad()
def test_a_head_that_its_user_prepacked_or_bound_unpacked_computes_with_its_own_layers(
    tiny_target: PreTrainedModel, tiny_head: DraftHead
) -> None:
    features = torch.randn(1, 2, tiny_head.config.features_width)
    plain, found = tiny_head.fuse(features), drafted_by(tiny_head)
    assert torch.equal(BoundHead(tiny_head, tiny_target, tiny_head).fuse(features), plain)
    assert found == {nn.Linear}
    assert prepack(tiny_head).packed_view() is tiny_head
