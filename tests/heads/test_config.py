"""Every head has one config, and what no head can have is refused by the name of its field."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from transformers_resps import DraftHead
from transformers_resps.heads.config import default_feature_layers

from .published import D


@pytest.mark.parametrize(("depth", "layers"), [(28, [2, 14, 25]), (32, [2, 16, 29]), (36, [2, 18, 33])])
def test_the_default_layers_are_those_of_eagle_3(depth: int, layers: list[int]) -> None:
    assert default_feature_layers(depth) == layers


@pytest.mark.parametrize("depth", range(1, 8))
def test_shallow_targets_have_distinct_default_layers_too(depth: int) -> None:
    layers = default_feature_layers(depth)
    assert layers == sorted(set(layers)) and 0 <= layers[0] <= layers[-1] <= depth


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "grin"}, "activation 'grin'"),
        ({"rope_parameters": {"rope_type": "spiral"}}, "kind 'spiral'"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 0}}, "rope_theta=0"),
        ({"num_hidden_layers": 2}, "lacks.*layers.1"),
        ({"hidden_size": "32"}, "`hidden_size='32'`, but it must be a positive integer"),
        ({"vocab_size": None}, "`vocab_size=None`, but it must be a positive integer"),
        ({"default_tree": [8, 3]}, "default_tree"),
    ],
    ids=str,
)
def test_a_saved_config_that_no_head_can_have_is_refused(
    change: dict[str, Any], message: str, target: PreTrainedModel, tmp_path: Path
) -> None:
    DraftHead.from_target(target, D).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        DraftHead.from_pretrained(tmp_path, target=target)


def test_a_saved_config_that_leaves_out_the_layers_of_a_deeper_head_is_refused(
    target: PreTrainedModel, tmp_path: Path
) -> None:
    DraftHead.from_target(target, D, num_hidden_layers=2).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["num_hidden_layers"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="unexpected.*layers.1"):
        DraftHead.from_pretrained(tmp_path, target=target)
