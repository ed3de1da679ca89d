"""What a command line names."""

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from tests.assistants.kinds import pair_of
from tests.drafting.test_block_drafter import block_head
from transformers_resps import DraftHead, FixedPolicy, MtpHead, TreeShape
from transformers_resps.heads import BlockHead
from transformers_resps.tools.loading import load_policy, load_source, short_name


@pytest.mark.parametrize(
    ("text", "tree"), [("8,4,2", TreeShape(8, 4, 2)), ("1,0,1,6", TreeShape(1, 0, 1, lookup=6))], ids=str
)
def test_numbers_name_a_tree(text: str, tree: TreeShape) -> None:
    assert str(load_policy(text, None)) == f"FixedPolicy({tree})"


def test_without_a_name_it_is_the_heads_own_tree_and_without_a_head_auto(tiny_head: DraftHead) -> None:
    assert str(load_policy(None, tiny_head)) == f"FixedPolicy({tiny_head.default_shape})"
    assert load_policy(None, None) == load_policy("auto", tiny_head) == "auto"


@pytest.mark.parametrize("kind", ["DraftHead", "MtpHead", "saved MtpHead", "CausalDrafter"])
def test_a_name_loads_whatever_drafts_and_the_target_keeps_it(kind: str, tmp_path: Path) -> None:
    target, head = pair_of(kind.split()[-1], tmp_path)
    if kind == "DraftHead":
        head = DraftHead.from_target(target)
    elif kind != "MtpHead":
        head = MtpHead.from_target(target) if kind == "saved MtpHead" else head
    if kind != "MtpHead":
        head.save_pretrained(tmp_path / "drafts")
    name = "mtp" if kind == "MtpHead" else str(tmp_path / "drafts")
    source = load_source(name, target)
    gc.collect()
    assert type(source).__name__ == kind.split()[-1] and source is load_source(name, target)
    assert str(load_policy(None, source)) == f"FixedPolicy({source.default_shape})"
    assert target.generate(torch.tensor([[3, 4]]), assistant_model=source, max_new_tokens=2).shape == (1, 4)


@pytest.mark.parametrize("make", [block_head, DraftHead.from_target])
def test_a_head_of_any_kind_is_loaded_at_a_revision(
    make: Callable[..., DraftHead | BlockHead], tiny_target: PreTrainedModel, tmp_path: Path
) -> None:
    make(tiny_target, feature_layers=[0, 1]).save_pretrained(tmp_path)
    assert type(load_source(str(tmp_path), tiny_target, "main")) is type(load_source(str(tmp_path), tiny_target))


def test_no_name_is_no_drafter_and_a_missing_one_is_refused(tiny_target: PreTrainedModel) -> None:
    assert load_source(None, tiny_target) is None
    with pytest.raises((ValueError, OSError), match="no/where"):
        load_source("no/where", tiny_target)


@pytest.mark.parametrize("name", ["plain-name", "8,4,2"])
def test_a_folder_names_the_policy_in_it_whatever_it_is_called(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FixedPolicy(TreeShape(5, 2, 2)).save_pretrained(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert str(load_policy(name, None)) == "FixedPolicy(5/2/2)"


@pytest.mark.parametrize(
    ("text", "why"), [("8,x", "'8,x' is no shape"), ("8,4", "is no shape"), ("no/where", "no/where")]
)
def test_what_names_nothing_is_refused(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        load_policy(text, None)


def test_a_folder_of_a_run_is_called_after_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("gsm8k-run/policy", "policy-run/policy-unfinished", "mine"):
        FixedPolicy(TreeShape(5, 2, 2)).save_pretrained(tmp_path / folder)
    assert short_name("you/policy") == "you" and short_name("you/chat-policy") == "chat-policy"
    assert short_name(str(tmp_path / "mine")) == "mine" and short_name("runs/head/checkpoint-20") == "runs"
    monkeypatch.chdir(tmp_path / "gsm8k-run" / "policy")
    assert short_name(".") == short_name("../policy/") == "gsm8k-run"
    assert short_name("policy") == "policy", "nothing stands before it"
