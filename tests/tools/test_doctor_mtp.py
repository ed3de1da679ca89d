"""Each misreading of MTP layers is found, named and mended; layers that are read as trained are left alone."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.tokenizers import letter_tokenizer
from tests.tools.diagnoses import Pair, diagnose, fit
from tests.tools.test_doctor import V, loss_of, pair_of, periodic_texts, train_target
from transformers_resps.assistants import MtpHead
from transformers_resps.heads.unrolled import unroll
from transformers_resps.tools.cli import main
from transformers_resps.tools.doctor import DEPTHS
from transformers_resps.trainers.features import FrozenTarget


def train(generator: torch.Generator) -> tuple[PreTrainedModel, MtpHead]:
    """A target and an MTP layer that reads states alone, not tokens: from a wrong state it drafts nothing.

    All norms are as uneven as real ones, so that one more or less shows.
    """
    target: Any = train_target(generator, last_norm=torch.randn(32, generator=generator).exp())
    head: Any = MtpHead.fresh(target, own_output_head=True).train()
    layer = head.layers[0]
    for norm in (layer.enorm, layer.hnorm, layer.norm):
        norm.weight.data.mul_(torch.randn(32, generator=generator).exp())
    layer.head.weight.data.add_(0.1 * torch.randn(V, 32, generator=generator))
    of_states = torch.arange(64) >= 32
    layer.eh_proj.weight.register_hook(lambda slope: slope * of_states)
    frozen = FrozenTarget(target, head.feature_layers)

    def loss() -> torch.Tensor:
        texts = periodic_texts(16, generator)
        return loss_of(unroll(head.bind(target, head), frozen.run(texts).features, texts, DEPTHS), layer.head, texts)

    fit(head, loss)
    return target, head.eval()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return pair_of(tmp_path_factory.mktemp("mtp"), train, 12)


@pytest.mark.parametrize(
    ("fault", "cure"),
    [
        ({}, {}),
        ({"feature_layer": 4}, {"feature_layer": 5}),
        ({"fed": "before"}, {"fed": "after"}),
        ({"fed_back": "before"}, {"fed_back": "after"}),
        ({"fed_back": "target"}, {"fed_back": "after"}),
        ({"hidden_first": True}, {"hidden_first": False}),
        ({"zero_centred": True}, {"zero_centred": False}),
        ({"own_output_head": False}, {"own_output_head": True}),
        ({"hidden_first": True, "fed_back": "target"}, {"fed_back": "after", "hidden_first": False}),
    ],
    ids=str,
)
def test_a_planted_misreading_is_found_and_its_cure_named(
    fault: dict[str, Any], cure: dict[str, Any], pair: Pair
) -> None:
    target, folder, answers = pair
    found = diagnose(target, MtpHead.from_pretrained(folder, target, **fault), answers)
    assert found.overrides == cure and found.is_healthy is (not fault)
    assert all(f"{key}={value!r}" in found.verdict for key, value in cure.items())
    assert ("MtpHead.from_pretrained(" in found.verdict) is bool(fault)


def test_the_command_takes_mtp_layers_as_it_takes_heads(
    pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target, folder, _ = pair
    target.save_pretrained(tmp_path)
    letter_tokenizer().save_pretrained(tmp_path)
    command = ["doctor", str(tmp_path), str(folder), "--device", "cpu", "--max-new-tokens", "8", "--answers", "4"]
    main([*command, "--set", 'fed="before"'])
    printed = capsys.readouterr().out
    assert re.search(r"^  layer +fed +fed back +order +norms +output head +depth 1 ", printed, re.MULTILINE)
    assert re.search(r"^>[ *]5 +before norm +after norm +token, state +w +own +\d\.\d+", printed, re.MULTILINE)
