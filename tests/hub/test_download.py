"""Heads and policies by their id: which commit, whole or not at all, and without the network."""

import pytest
import torch
from huggingface_hub import constants, hf_hub_download
from transformers import AutoConfig, AutoModel

from tests.training.publishing.tiny import TARGET, tiny_target
from transformers_resps import AutoPolicy, DraftHead, DraftHeadConfig, FixedPolicy, TreeShape
from transformers_resps.data import prompt_fingerprint, training_prompts_of, write_training_prompts
from transformers_resps.hub.upload import Destination, upload
from transformers_resps.policies.guard import BaselineGuard
from transformers_resps.policies.resps import ReSpSConfig, ReSpSPolicy
from transformers_resps.policies.throughput import ThroughputPolicy


HEAD, POLICY = "tester/head", "tester/policy"


@pytest.fixture
def head(hub) -> DraftHead:
    """A head, pushed."""
    torch.manual_seed(1)
    head = DraftHead.from_target(tiny_target(), draft_vocab_size=48)
    head.push_to_hub(HEAD)
    return head


def same(first: DraftHead, second: DraftHead) -> bool:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def other(head: DraftHead) -> DraftHead:
    torch.nn.init.ones_(head.fc.weight)
    return head


def test_a_head_comes_back_bit_for_bit(head):
    loaded = DraftHead.from_pretrained(HEAD, target=tiny_target())
    assert same(loaded, head) and loaded.name_or_path == HEAD


def test_the_auto_classes_of_transformers_find_a_head(head):
    assert isinstance(AutoConfig.from_pretrained(HEAD), DraftHeadConfig)
    assert same(AutoModel.from_pretrained(HEAD), head)


def test_the_cache_may_lie_in_a_folder_named_snapshots(head, tmp_path):
    assert same(DraftHead.from_pretrained(HEAD, cache_dir=tmp_path / "snapshots" / "hf"), head)


def test_an_old_commit_and_a_branch_can_be_asked_for(head, hub):
    old = hub.repositories[HEAD].branches["main"]
    before = {name: value.clone() for name, value in head.state_dict().items()}
    other(head).push_to_hub(HEAD)
    head.push_to_hub(HEAD, revision="next")
    assert torch.equal(DraftHead.from_pretrained(HEAD, revision=old).fc.weight, before["fc.weight"])
    assert same(DraftHead.from_pretrained(HEAD), head)
    assert same(DraftHead.from_pretrained(HEAD, revision="next"), head)


def test_a_branch_that_moves_during_a_download_gives_one_commit_not_a_mixture(head, hub):
    """The weights are those of the commit whose config was read; and both passes over them are of that commit."""
    before = head.fc.weight.detach().clone()
    torch.manual_seed(2)
    larger = DraftHead.from_target(tiny_target(), draft_vocab_size=60)

    def move(request: str) -> None:
        if "config.json" in request and request.startswith("GET"):
            hub.before = lambda request: None
            larger.push_to_hub(HEAD)

    hub.before = move
    loaded = DraftHead.from_pretrained(HEAD)
    assert hub.before is not move and loaded.config.draft_vocab_size == 48
    assert torch.equal(loaded.fc.weight, before)


def test_the_card_of_a_pushed_head_names_its_target_and_is_never_overwritten(head, hub):
    card = hub.repositories[HEAD].files["README.md"].decode()
    assert f"base_model: {TARGET}\n" in card and "base_model_relation: adapter\n" in card and "- eagle3\n" in card
    hub.repositories[HEAD].commit(hub.repositories[HEAD].files | {"README.md": b"by hand"})
    other(head).push_to_hub(HEAD)
    assert hub.repositories[HEAD].files["README.md"] == b"by hand"


def test_the_card_of_a_pushed_guard_names_the_target_of_the_policy_inside(hub):
    BaselineGuard(ThroughputPolicy(target={"name_or_path": TARGET})).push_to_hub(POLICY)
    assert f"base_model: {TARGET}\n" in hub.repositories[POLICY].files["README.md"].decode()


@pytest.mark.parametrize("policy", [FixedPolicy(TreeShape(4, 2, 2)), ReSpSPolicy(ReSpSConfig(9), seed=5)], ids=repr)
def test_a_policy_comes_back_by_its_id(hub, policy):
    policy.push_to_hub(POLICY, private=True)
    loaded = AutoPolicy.from_pretrained(POLICY)
    assert type(loaded) is type(policy) and loaded.to_config() == policy.to_config()
    assert all(torch.equal(loaded.state_tensors()[name], value) for name, value in policy.state_tensors().items())
    assert type(policy).from_pretrained(POLICY, revision="main").to_config() == policy.to_config()


def test_an_old_policy_can_be_asked_for(hub):
    FixedPolicy(TreeShape(4, 2, 2)).push_to_hub(POLICY)
    old = hub.repositories[POLICY].branches["main"]
    FixedPolicy(TreeShape(9, 2, 2)).push_to_hub(POLICY)
    assert AutoPolicy.from_pretrained(POLICY, revision=old).shape == TreeShape(4, 2, 2)
    assert AutoPolicy.from_pretrained(POLICY).shape == TreeShape(9, 2, 2)


@pytest.mark.parametrize("revision", ["nowhere", "0" * 40])
def test_a_revision_that_is_not_there_is_named(head, hub, revision):
    FixedPolicy(TreeShape(4, 2, 2)).push_to_hub(POLICY)
    with pytest.raises(OSError, match="revision"):
        DraftHead.from_pretrained(HEAD, revision=revision)
    with pytest.raises(ValueError, match="neither a local folder nor a repository"):
        AutoPolicy.from_pretrained(POLICY, revision=revision)


def test_a_private_head_needs_the_token(head, hub, monkeypatch):
    hub.repositories[HEAD].private = True
    with pytest.raises(OSError, match="needs `token=`"):
        DraftHead.from_pretrained(HEAD, token=False)
    assert same(DraftHead.from_pretrained(HEAD), head)


def test_a_busy_hub_is_asked_again(head, hub, pauses):
    hub.fault("GET /large", (429, {"Retry-After": "2"}))
    assert same(DraftHead.from_pretrained(HEAD), head)
    assert 3.0 in pauses


def test_a_cut_download_goes_on(head, hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    hub.fault("GET /large", "truncate")
    assert same(DraftHead.from_pretrained(HEAD), head)


def test_a_download_cut_for_good_leaves_nothing_that_looks_whole(head, hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    hub.fault("GET /large", "drop", times=99)
    with pytest.raises(ConnectionError, match="could not be downloaded"):
        DraftHead.from_pretrained(HEAD)
    assert not list((tmp_path / "cache").rglob("model.safetensors"))
    hub.faults.clear()
    assert same(DraftHead.from_pretrained(HEAD), head)


def test_weights_damaged_on_the_way_are_fetched_again(head, hub):
    """Of the right size and a valid safetensors file: huggingface_hub itself lets them pass."""
    hub.corrupted_byte = -1
    hub.fault("GET /large", "corrupt")
    assert same(DraftHead.from_pretrained(HEAD), head)
    assert not hub.faults[0].times


def test_weights_that_stay_damaged_are_refused_and_never_used(head, hub, monkeypatch):
    hub.corrupted_byte = -1
    hub.fault("GET /large", "corrupt", times=99)
    for _ in range(2):  # the cache does not make them good
        with pytest.raises(ValueError, match="is damaged: its hash differs"):
            DraftHead.from_pretrained(HEAD)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="Try again online"):
        DraftHead.from_pretrained(HEAD)


def test_a_damaged_config_of_a_policy_is_refused(hub):
    FixedPolicy(TreeShape(4, 2, 2)).push_to_hub(POLICY)
    hub.corrupted_byte = -1
    hub.fault("GET .*config.json", "corrupt", times=99)
    with pytest.raises(ValueError, match="is damaged: its hash differs"):
        AutoPolicy.from_pretrained(POLICY)


def test_offline_what_was_downloaded_loads_and_what_was_not_says_so(head, hub, monkeypatch):
    FixedPolicy(TreeShape(4, 2, 2)).push_to_hub(POLICY)
    DraftHead.from_pretrained(HEAD)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.requests)
    assert same(DraftHead.from_pretrained(HEAD), head)
    with pytest.raises(ValueError, match="offline"):
        AutoPolicy.from_pretrained(POLICY)
    with pytest.raises(ValueError, match="offline"):
        DraftHead.from_pretrained("tester/never-seen")
    assert len(hub.requests) == asked


def test_a_cache_that_lacks_the_weights_is_not_taken_for_whole(head, hub, monkeypatch):
    hf_hub_download(HEAD, "config.json")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="no weights.*whether you are offline"):
        DraftHead.from_pretrained(HEAD)


def test_the_training_prompts_of_the_loaded_commit_are_fetched_for_the_benchmark(head, hub, tmp_path, monkeypatch):
    for words in (["first"], ["second"]):
        write_training_prompts(tmp_path, words)
        upload({"training_prompts.json": tmp_path / "training_prompts.json"}, Destination(HEAD), "Publish")
        if words == ["first"]:
            DraftHead.from_pretrained(HEAD)
    assert training_prompts_of(HEAD) == {prompt_fingerprint("first")}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert training_prompts_of(HEAD) == {prompt_fingerprint("first")}


def test_unknown_training_prompts_are_told_and_not_compared(head, caplog):
    DraftHead.from_pretrained(HEAD)
    assert training_prompts_of(HEAD) is None
    assert f"{HEAD} has no training_prompts.json" in caplog.text
