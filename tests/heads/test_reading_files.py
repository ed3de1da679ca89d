"""Files: damaged, missing, from the Hub's cache, and pickles that would run code."""

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from tests.conftest import build_target
from transformers_resps.heads import DraftHead

from .cases import CASES
from .published import LAYERS, random_tensors, save, write_config


BASE = CASES[2]


class RunsOnLoad:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return Path.touch, (Path(self.path),)  # type: ignore[return-value]

    def __init__(self, path: str) -> None:
        self.path = path


def test_a_pickle_that_would_run_code_is_refused_and_not_run(target: PreTrainedModel, tmp_path: Path) -> None:
    trap = tmp_path / "it-ran"
    write_config(tmp_path, BASE.config)
    torch.save({"fc.weight": RunsOnLoad(str(trap))}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds more than tensors.*could run code"):
        DraftHead.from_pretrained(tmp_path, target=target)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(RunsOnLoad(str(trap))))
    with pytest.raises(ValueError, match="could run code"):
        DraftHead.from_pretrained(tmp_path, target=target)
    assert not trap.exists()


def tear(path: Path, keep: float) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep)])


def as_bin(folder: Path, value: object) -> Path:
    (folder / "model.safetensors").unlink()
    torch.save(value, folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated": lambda folder: tear(folder / "model.safetensors", 0.9),
    "garbage": lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 64),
    "empty": lambda folder: tear(folder / "model.safetensors", 0),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "no config": lambda folder: (folder / "config.json").unlink(),
    "config is no JSON": lambda folder: (folder / "config.json").write_text("{"),
    "missing shard": lambda folder: (folder / "model-00002.safetensors").unlink(),
    "torn .bin": lambda folder: tear(as_bin(folder, random_tensors(BASE)), 0.5),
}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", "not a whole safetensors file"),
        ("garbage", "not a whole safetensors file"),
        ("empty", "not a whole safetensors file"),
        ("no weights", "no weights"),
        ("no config", "no config.json"),
        ("config is no JSON", "is not JSON"),
        ("missing shard", "lacks the file model-00002.safetensors, which its index names"),
        ("torn .bin", "damaged"),
    ],
)
def test_a_damaged_checkpoint_is_named(kind: str, message: str, target: PreTrainedModel, tmp_path: Path) -> None:
    save(tmp_path, random_tensors(BASE), shards=2 if "shard" in kind else 1)
    write_config(tmp_path, BASE.config)
    DAMAGE[kind](tmp_path)
    with pytest.raises(ValueError, match=message):
        DraftHead.from_pretrained(tmp_path, target=target)


def test_a_head_comes_from_the_hubs_cache_when_offline(target: PreTrainedModel, tmp_path: Path) -> None:
    repository = tmp_path / "models--someone--head"
    commit = "0" * 40
    BASE.write(repository / "snapshots" / commit, random_tensors(BASE), BASE)
    (repository / "refs").mkdir()
    (repository / "refs" / "v1").write_text(commit)
    for where in {"revision": "v1"}, {"revision": commit}:
        head = DraftHead.from_pretrained("someone/head", target=target, cache_dir=tmp_path, **where)
        assert head.config.name_or_path == "someone/head"
    with pytest.raises(ValueError, match="offline"):
        DraftHead.from_pretrained("someone/head", target=target, cache_dir=tmp_path, revision="v2")
    with pytest.raises(ValueError, match="neither a folder nor a Hub id"):
        DraftHead.from_pretrained("./not/there/at/all", target=target)
    with pytest.raises(ValueError, match="is a file"):
        DraftHead.from_pretrained(repository / "refs" / "v1", target=target)


def test_a_state_dict_in_place_of_files_is_held_to_the_same(target: PreTrainedModel) -> None:
    """It passed for any target, and what it lacked was newly initialized."""
    head = DraftHead.from_target(target, 16)
    given = {"config": head.config, "state_dict": head.state_dict()}
    read = DraftHead.from_pretrained(None, target=target, **given)
    assert all(torch.equal(read.state_dict()[name], tensor) for name, tensor in head.state_dict().items())
    assert DraftHead.from_pretrained(None, norm_before_residual=True, **given).config.norm_before_residual
    stranger = build_target(num_hidden_layers=LAYERS, vocab_size=65)
    with pytest.raises(ValueError, match="it needs vocab_size 64 .this target: 65"):
        DraftHead.from_pretrained(None, target=stranger, **given)
    given["state_dict"] = {name: tensor for name, tensor in head.state_dict().items() if name != "norm.weight"}
    with pytest.raises(ValueError, match="the given state dict lacks .'norm.weight'"):
        DraftHead.from_pretrained(None, target=target, **given)


def test_a_state_dict_needs_a_config_and_no_files(target: PreTrainedModel, tmp_path: Path) -> None:
    head = DraftHead.from_target(target, 16)
    for name, given in (
        (None, {}),
        (None, {"config": head.config}),
        (None, {"state_dict": head.state_dict()}),
        (tmp_path, {"config": head.config, "state_dict": head.state_dict()}),
    ):
        with pytest.raises(ValueError, match="Got the name .*Pass a name alone, or None with `config="):
            DraftHead.from_pretrained(name, target=target, **given)
