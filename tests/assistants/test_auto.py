"""What a folder holds decides what drafts: each kind loads by one call, and by its name as `assistant_model`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.conftest import build_target
from tests.drafting.test_block_drafter import block_head
from tests.heads.blocks import CASES, LAYERS, random_tensors
from transformers_resps import AutoDraftHead, BlockHead, DraftHead, FixedPolicy, TreeShape, attach
from transformers_resps.assistants import MtpHead

from .kinds import pair_of


PUBLISHED = ["z-lab, old", "DeepSpec DSpark rnn", "JetSpec", "DFlash 2, z-lab", "Muse", "speculators DFlash, reduced"]


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return attach(build_target(num_hidden_layers=LAYERS, initializer_range=0.3))


def write(name: str, folder: Path) -> None:
    case = next(case for case in CASES if case.name == name)
    case.write(folder, random_tensors(case), case)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_block_head_is_known_by_its_tensors_and_drafts_by_its_folder(
    name: str, target: PreTrainedModel, tmp_path: Path
) -> None:
    write(name, tmp_path)
    assert type(AutoDraftHead.from_pretrained(tmp_path, target=target)) is BlockHead
    prompt = torch.tensor([[1, 17, 23, 5, 42, 17, 23]])
    plain = target.generate(prompt, max_new_tokens=20, do_sample=False)
    out = target.generate(
        prompt,
        max_new_tokens=20,
        do_sample=False,
        assistant_model=str(tmp_path),
        policy=FixedPolicy(TreeShape(24, 3, 8)),
        return_dict_in_generate=True,
    )
    assert out.sequences.tolist() == plain.tolist()
    assert sum(step.drafted for step in out.speculation.steps) > 0


def test_every_kind_of_head_loads_by_one_call(tmp_path: Path) -> None:
    target, _ = pair_of("MtpHead", tmp_path / "target")
    made: dict[type, Callable[[], Any]] = {
        DraftHead: lambda: DraftHead.from_target(target),
        MtpHead: lambda: MtpHead.from_target(target),
        BlockHead: lambda: block_head(target, feature_layers=[1, 2]),
    }
    for kind, make in made.items():
        folder = tmp_path / kind.__name__
        make().save_pretrained(folder)
        assert type(AutoDraftHead.from_pretrained(folder, target=target)) is kind
    for wrong, other in ((DraftHead, BlockHead), (DraftHead, MtpHead), (BlockHead, DraftHead), (BlockHead, MtpHead)):
        with pytest.raises(ValueError, match=f"is no `{wrong.__name__}`.*`{other.__name__}.from_pretrained`"):
            wrong.from_pretrained(tmp_path / other.__name__, target=target)


def test_an_assistant_of_gemma_loads_as_a_model(tmp_path: Path) -> None:
    target, assistant = pair_of("GemmaAssistant", tmp_path)
    assistant.save_pretrained(tmp_path / "gemma")
    assert type(AutoDraftHead.from_pretrained(tmp_path / "gemma", target=target)) is type(assistant)


def test_a_whole_model_is_no_head(target: PreTrainedModel, tmp_path: Path) -> None:
    target.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a whole model"):
        AutoDraftHead.from_pretrained(tmp_path, target=target)
