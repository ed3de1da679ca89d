"""What no block head can be, and what cannot be read, is refused by name before any work."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.conftest import build_target
from transformers_resps.heads import BlockHead, BlockHeadConfig

from .blocks import BODY, CASES, LAYERS, MASK, SPARK, Block, deepspec, plainly, random_tensors, speculators, zlab


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"windows": [4, None], "block_size": 5}, "a window of 4 positions.*blocks have 5 slots"),
        ({"mask_token_id": 64, "vocab_size": 64}, "the mask token 64.*rows 0 to 63"),
        ({"correction": "domino"}, "the correction 'domino'.*known are"),
        ({"correction": "vanilla"}, "a correction needs a rank"),
        ({"correction_rank": 4}, "a correction needs a rank"),
        ({"correction": "selector", "correction_rank": 4}, "a selector its number of candidates"),
        ({"causal": [True]}, "one value for each of its 2 layers"),
        ({"block_size": 1}, "2 slots at least"),
        ({"feature_layers": [3, 2]}, "distinct and ascending"),
        ({"confidence": True, "confidence_with_markov": True}, "a Markov correction"),
        ({"conv_kernel_size": 2, "conv_group_size": 7, "hidden_size": 32}, "must divide the width 32"),
        ({"draft_vocab_size": 16}, "a draft vocabulary needs an output head of its own"),
        ({"num_hidden_layers": 0}, "`num_hidden_layers=0`"),
        ({"shifted": 1}, "`shifted=1`.*True or False"),
        ({"rope_parameters": {"rope_type": "spiral"}}, "RoPE of the kind 'spiral'"),
    ],
    ids=str,
)
def test_a_config_that_no_head_can_have_is_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        BlockHeadConfig(**fields)


def body(**more: Tensor) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: tensors | more


PART = torch.zeros(2, 2)
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Tensor], str]] = {
    "fused": (zlab(), {"layers.0.self_attn.qkv_proj.weight": PART}, "fused projections.*qkv_proj"),
    "gated": (zlab(), {"layers.0.self_attn.g_proj.weight": PART}, "gates its attention.*g_proj"),
    "per-feature norms": (zlab(), {"aux_hidden_norms.0.weight": PART}, "norms each feature alone"),
    "MLA": (zlab(), {"layers.0.self_attn.kv_a_proj_with_mqa.weight": PART}, "MLA attention"),
    "sinks": (zlab(), {"layers.0.self_attn.attention_sink_bias": PART}, "attention sinks"),
    "packed": (zlab(), {"layers.0.mlp.up_proj.weight_packed": PART}, "is quantised.*weight_packed"),
    "quantised": (zlab() | {"quantization_config": {"bits": 4}}, {}, "is quantised.*quantization_config"),
    "Domino": (zlab(projector_type="domino"), {"prefix_gru.weight_ih_l0": PART}, "is a Domino head"),
    "Domino of SpecForge": (zlab(), {"logit_head.prefix_gru.weight_ih_l0": PART}, "is a Domino head"),
    "LiLiCorr": (zlab(), {"lilicorr.factors": PART}, "is a LiLiCorr head"),
    "Gemma": (deepspec(), {"layers.0.pre_feedforward_layernorm.weight": PART}, "has the layers of Gemma"),
    "unknown kind": (speculators("xpress"), {}, "unknown kind.*speculators_model_type.*'xpress'"),
    "unknown projector": (zlab(projector_type="spiral"), {}, "unknown kind.*projector_type.*'spiral'"),
    "unknown correction": (deepspec(**SPARK, markov_head_type="lstm"), {}, "unknown kind.*'lstm'"),
    "unknown part": (zlab(), {"layers.0.extra.weight": PART}, r"unexpected \['layers.0.extra.weight'\]"),
    "no mask": (zlab(mask_token_id=None), {}, "states no `mask_token_id`. Pass `mask_token_id=`"),
    "no block size": (deepspec(block_size=None), {}, "states no `block_size`"),
    "another depth": (zlab() | {"num_target_layers": 9}, {}, "target of 9 layers, but this target has 8"),
    "another vocabulary": (zlab() | {"vocab_size": 65}, {}, "vocab_size 65"),
    "a mask beyond the table": (zlab(mask_token_id=64), {}, "the mask token 64"),
    "other layers": (zlab(target_layer_ids=[1, 3]), {}, r"reads 3 layers.*\[2, 4\]"),
    "layers beyond the target": (zlab(target_layer_ids=[1, 3, 8]), {}, "hidden states.*0 to 8"),
    "one layer type": (zlab(layer_types=["full_attention"]), {}, "2 layers and `layer_types`"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_cannot_be_read_is_refused_by_name(name: str, target: PreTrainedModel, tmp_path: Path) -> None:
    config, more, reason = REFUSED[name]
    case = Block(name, plainly, config)
    case.write(tmp_path, random_tensors(case) | more, case)
    with pytest.raises(ValueError, match=reason):
        BlockHead.from_pretrained(tmp_path, target=target)


def test_a_pickle_beside_the_tensors_is_refused(target: PreTrainedModel, tmp_path: Path) -> None:
    case = CASES[0]
    case.write(tmp_path, random_tensors(case), case)
    (tmp_path / "mask_embedding.pt").write_bytes(b"never opened")
    with pytest.raises(ValueError, match=r"mask_embedding.pt, a pickle, which could run code"):
        BlockHead.from_pretrained(tmp_path, target=target)


def test_a_head_of_another_width_is_refused(tmp_path: Path) -> None:
    case = CASES[0]
    case.write(tmp_path, random_tensors(case), case)
    with pytest.raises(ValueError, match="is 32 wide and reads features of 48"):
        BlockHead.from_pretrained(tmp_path, target=build_target(num_hidden_layers=LAYERS, hidden_size=48))


def test_without_a_target_the_file_must_say_enough(tmp_path: Path) -> None:
    case = CASES[0]
    case.write(tmp_path, random_tensors(case), case)
    head = BlockHead.from_pretrained(tmp_path)
    assert head.config.vocab_size == BODY["vocab_size"] and head.config.mask_token_id == MASK
    with pytest.raises(ValueError, match="which it does not know.*`BlockHead`|BlockHead.from_pretrained got"):
        BlockHead.from_pretrained(tmp_path, maskt_token_id=3)


def test_layers_that_a_file_leaves_out_are_those_of_its_publisher(tmp_path: Path) -> None:
    """z-lab's formula spreads them over the head's own depth: for 2 layers the first and the last but three."""
    config = zlab(target_layer_ids=None)
    case = Block("default ids", plainly, config, layers=[2, 6])
    case.write(tmp_path, random_tensors(case), case)
    assert BlockHead.from_pretrained(tmp_path, target=build_target(num_hidden_layers=LAYERS)).feature_layers == [2, 6]
