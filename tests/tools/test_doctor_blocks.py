"""A misreading planted in a good block head is found, named and mended."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from tests.drafting.test_block_drafter import KINDS, block_head
from tests.tools.diagnoses import Pair, diagnose, fit
from tests.tools.test_doctor import BASE, LAYERS, LENGTH, PERIOD, pair_of, periodic_texts, train_target
from transformers_resps.drafting import Committed, DraftCall, DraftRequest
from transformers_resps.drafting.blocks import BlockSlots
from transformers_resps.heads import BlockHead
from transformers_resps.heads.block_head import BoundBlockHead
from transformers_resps.heads.unrolled import unroll_blocks
from transformers_resps.tree import TreeShape
from transformers_resps.verifying.forward import FeatureTap


SCALE, LEVELS = 32**0.5, 4


def features_of(target: PreTrainedModel, texts: Tensor) -> Tensor:
    with torch.no_grad(), FeatureTap(target, LAYERS) as tap, tap.record() as features:
        target(texts)
    return features.concatenated()


def train(generator: torch.Generator) -> tuple[PreTrainedModel, BlockHead]:
    """A target and a causal head. So small a text needs no slot to look at another, so those to come mislead it."""
    target = train_target(generator)
    head = block_head(target, feature_layers=LAYERS, embedding_scale=SCALE).train()
    anchors = torch.arange(PERIOD, LENGTH - 1 - LEVELS).expand(16, -1)

    def loss() -> Tensor:
        texts = periodic_texts(16, generator)
        features, losses = features_of(target, texts), {}
        for is_causal in (True, False):
            head.config.causal = [is_causal] * 2
            bound = head.bind(target, head)
            hidden = unroll_blocks(bound, features, texts, LEVELS, anchors - 1)
            wanted = torch.stack([texts.gather(1, anchors + 1 + depth) for depth in range(LEVELS)])
            losses[is_causal] = F.cross_entropy(bound.logits(hidden).flatten(0, 2), wanted.flatten())
        return losses[True] + (4 - losses[False]).clamp(min=0)

    fit(head, loss, steps=150)
    head.config.causal = [True, True]
    return target, head.eval()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return pair_of(tmp_path_factory.mktemp("block"), train)


@pytest.mark.parametrize(
    ("fault", "cure"),
    [
        ({}, {}),
        ({"feature_layers": [2, 3, 4]}, {"feature_layers": LAYERS}),
        ({"feature_layers": [0, 1, 2]}, {"feature_layers": LAYERS}),
        ({"shifted": True}, {"shifted": False}),
        ({"causal": [False, False]}, {"causal": [True, True]}),
        ({"rope_theta": 1e6}, {"rope_theta": BASE}),
        ({"embedding_scale": 1.0}, {"embedding_scale": SCALE}),
        ({"feature_layers": [2, 3, 4], "shifted": True}, {"feature_layers": LAYERS, "shifted": False}),
    ],
    ids=str,
)
def test_a_planted_misreading_is_found_and_its_cure_named(
    fault: dict[str, Any], cure: dict[str, Any], pair: Pair
) -> None:
    target, folder, answers = pair
    found = diagnose(target, BlockHead.from_pretrained(folder, target=target, **fault), answers)
    assert found.overrides == cure and found.is_healthy is (not fault)
    assert all(f"{key}={value!r}" in found.verdict for key, value in cure.items())
    assert "BlockHead.from_pretrained" in found.verdict or not fault


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_blocks_below_many_anchors_are_those_below_each_alone(
    pair: Pair, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, _, _ = pair
    head = block_head(target, feature_layers=LAYERS, **KINDS[kind])
    texts = periodic_texts(2, torch.Generator().manual_seed(5))
    features, bound = features_of(target, texts), head.bind(target)
    anchors = torch.tensor([[3, 9, 15], [4, 5, 20]])
    hidden = unroll_blocks(bound, features, texts, LEVELS, anchors - 1)  # [levels, b, m, h]
    filled: list[Tensor] = []
    fill = BoundBlockHead.fill

    def watched(self: BoundBlockHead, *given: Any) -> BlockSlots:
        slots = fill(self, *given)
        filled.append(slots.hidden[0])
        return slots

    monkeypatch.setattr(BoundBlockHead, "fill", watched)
    for row, own in enumerate(anchors.tolist()):
        for place, anchor in enumerate(own):
            drafter, here = head.drafter(DraftCall(target)), slice(row, row + 1)
            drafter.observe(Committed(texts[here, : anchor + 1], features[here, :anchor]))
            drafter.draft(texts[here, anchor : anchor + 1], DraftRequest(TreeShape(9, LEVELS, 2)))
            torch.testing.assert_close(hidden[:, row, place], filled[-1], atol=1e-5, rtol=1e-4)
