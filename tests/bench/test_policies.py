"""What `--policy` names, in every command."""

from pathlib import Path

import pytest
from transformers import PreTrainedModel

from transformers_resps import DraftHead, FixedPolicy, TreeShape
from transformers_resps.bench.models import load_policies
from transformers_resps.bench.names import short_name
from transformers_resps.bench.policies import read_policy


@pytest.mark.parametrize(
    ("text", "tree"), [("8,4,2", TreeShape(8, 4, 2)), ("1,0,1,6", TreeShape(1, 0, 1, lookup=6))], ids=str
)
def test_numbers_name_a_tree(text: str, tree: TreeShape) -> None:
    assert str(read_policy(text, None)) == f"FixedPolicy({tree})"


def test_without_a_name_it_is_the_heads_own_tree_and_without_a_head_auto(tiny_head: DraftHead) -> None:
    assert str(read_policy(None, tiny_head)) == f"FixedPolicy({tiny_head.default_shape})"
    assert read_policy(None, None) == read_policy("auto", tiny_head) == "auto"


@pytest.mark.parametrize("name", ["plain-name", "8,4,2"])
def test_a_folder_names_the_policy_in_it_whatever_it_is_called(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FixedPolicy(TreeShape(5, 2, 2)).save_pretrained(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert str(read_policy(name, None)) == "FixedPolicy(5/2/2)"


@pytest.mark.parametrize(
    ("text", "why"), [("8,x", "'8,x' is no shape"), ("8,4", "is no shape"), ("no/where", "no/where")]
)
def test_what_names_nothing_is_refused(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        read_policy(text, None)


def test_a_folder_of_a_run_is_called_after_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("gsm8k-run/policy", "policy-run/policy-unfinished", "mine"):
        FixedPolicy(TreeShape(5, 2, 2)).save_pretrained(tmp_path / folder)
    assert short_name("you/policy") == "you" and short_name("you/chat-policy") == "chat-policy"
    assert short_name(str(tmp_path / "mine")) == "mine" and short_name("runs/head/checkpoint-20") == "runs"
    monkeypatch.chdir(tmp_path / "gsm8k-run" / "policy")
    assert short_name(".") == short_name("../policy/") == "gsm8k-run"
    assert short_name("policy") == "policy", "nothing stands before it"


def test_two_policies_never_have_one_name(
    tmp_path: Path, tiny_target: PreTrainedModel, tiny_head: DraftHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folders = ["old/gsm8k/policy", "new/gsm8k", "chat/policy", "policy-run/policy"]
    for folder in folders:
        FixedPolicy(TreeShape(5, 2, 2)).save_pretrained(folder)
    found = load_policies(["auto", *folders], tiny_target, tiny_head)
    assert list(found) == ["auto", "policy old/gsm8k/policy", "policy new/gsm8k", "policy chat", "policy-run"]
    for same in ("chat/policy", "chat/policy/", "./chat/policy"):
        with pytest.raises(ValueError, match="twice. Pass each policy once"):
            load_policies(["chat/policy", same], tiny_target, tiny_head)


def test_the_benchmark_says_where_its_trees_go(tiny_target: PreTrainedModel, tiny_head: DraftHead) -> None:
    with pytest.raises(ValueError, match="`--policy 8,4,2` is a tree.* Pass `--shapes 8,4,2`"):
        load_policies(["8,4,2"], tiny_target, tiny_head)
