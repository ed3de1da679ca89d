"""What names a pair of models: sizes, and hashes that change with the weights."""

import torch
from transformers import PreTrainedModel

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
