"""Features of texts with images are those that `generate` reads in its own prefill."""

import pytest
import torch
from torch import Tensor

from tests.multimodal_targets import TARGETS, MultimodalTarget
from transformers_resps.trainers import FrozenTarget
from transformers_resps.trainers.features import TargetFeatures
from transformers_resps.verifying.forward import FeatureTap


LAYERS = [1, 2, 3]
PALIGEMMA = "paligemma"  # reads whole prompts in both directions
LEFT_OUT = (PALIGEMMA, "mllama")  # the other's calls with images are refused


def read(kind: MultimodalTarget, frozen: FrozenTarget, *rows: str, seed: int = 0) -> TargetFeatures:
    """Rows padded on the right."""
    prompt = kind.prompt(*rows, seed=seed)
    pads = (prompt.pop("attention_mask") == 0).sum(1).tolist()
    for name in {"input_ids", kind.types} & prompt.keys():
        prompt[name] = torch.stack([row.roll(-pad) for row, pad in zip(prompt[name], pads, strict=True)])
    return frozen.run(prompt.pop("input_ids"), image_inputs=prompt)


def close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("kind", [kind for kind in TARGETS if kind.model_type not in LEFT_OUT], ids=str)
def test_features_of_images_are_those_of_generate_in_padded_batches_too(kind: MultimodalTarget) -> None:
    target, row = kind.build(), f"..{kind.letter}......"
    with FeatureTap(target, LAYERS) as tap, tap.record() as caught:
        target.generate(**kind.prompt(row), max_new_tokens=1, do_sample=False)
    frozen = FrozenTarget(target, LAYERS)
    alone = read(kind, frozen, row)
    assert close(alone.features, caught.concatenated())
    assert not close(alone.features, read(kind, frozen, row, seed=1).features)
    batch = read(kind, frozen, row, "." * 20, f".......{kind.letter}...").features[0]
    assert close(alone.features[0], batch[: alone.features.shape[1]])
    assert torch.equal(alone.picks[0, -1], target.lm_head(alone.hidden[0, -1]).argmax())


def test_a_target_that_reads_answers_in_both_directions_is_refused() -> None:
    (kind,) = (kind for kind in TARGETS if kind.model_type == PALIGEMMA)
    with pytest.raises(ValueError, match="PaliGemma.* reads a whole text with images in both directions.*text alone"):
        read(kind, FrozenTarget(kind.build(), LAYERS), "..I....")
