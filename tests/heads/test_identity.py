"""What names a pair of models: sizes, and hashes that change with the weights."""

import copy

import pytest
import torch
from transformers import PreTrainedModel

from tests.compilation.test_few_bits import quantized
from tests.conftest import build_target
from transformers_resps import DraftHead
from transformers_resps.heads import pair_identity, parameter_fingerprint


@torch.no_grad()
def test_a_fingerprint_changes_with_every_single_parameter(tiny_target: PreTrainedModel) -> None:
    found = {parameter_fingerprint(tiny_target)}
    for parameter in tiny_target.parameters():
        parameter.mul_(1.5)
        found.add(parameter_fingerprint(tiny_target))
    assert len(found) == 1 + len(list(tiny_target.parameters()))
    assert parameter_fingerprint(tiny_target) in found


@pytest.mark.parametrize("name", ["int8", "intx 4", "int4, opaque", "nf4"])
@torch.no_grad()
def test_a_fingerprint_changes_with_the_codes_and_scales_of_every_quantized_weight(name: str) -> None:
    target = quantized(name)
    first = parameter_fingerprint(target)
    assert parameter_fingerprint(copy.deepcopy(target)) == first
    found, parts = (
        {first},
        ("qdata",) if name == "nf4" else ("qdata", "scale_and_zero" if "opaque" in name else "scale"),
    )
    for layer in target.model.layers:
        weight = layer.mlp.up_proj.weight
        for part in [weight.data] if name == "nf4" else [getattr(weight, part) for part in parts]:
            part.view(torch.uint8).bitwise_xor_(1)
            found.add(parameter_fingerprint(target))
    assert len(found) == 1 + len(target.model.layers) * len(parts)


def test_a_fingerprint_decodes_no_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    target = quantized("int8")
    monkeypatch.setattr(type(target.model.layers[0].mlp.up_proj.weight), "dequantize", None)
    assert parameter_fingerprint(target) != parameter_fingerprint(build_target())


@torch.no_grad()
def test_a_head_is_identified_by_the_weights_that_read_the_features(
    tiny_target: PreTrainedModel, tiny_head: DraftHead
) -> None:
    assert pair_identity(tiny_target, None).keys() == {"target"}
    before = pair_identity(tiny_target, tiny_head)["head"]
    assert pair_identity(tiny_target, tiny_head)["head"] == before
    tiny_head.fc.weight.mul_(1.5)
    assert pair_identity(tiny_target, tiny_head)["head"] == before | {"fingerprint": tiny_head.fingerprint()} != before
    assert "fingerprint" not in pair_identity(tiny_target, tiny_head.to(torch.float16))["head"]
