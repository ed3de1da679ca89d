"""Every published layout computes what its own code computes."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.conftest import build_target
from transformers_resps.drafting import DraftCache
from transformers_resps.heads import BoundHead, DraftHead

from .cases import CASES, FLAT, MODELOPT_FLAGS, eagle_config, nested, specforge
from .published import LAYERS, Published, random_tensors, reference_logits, rename, save, write_config


TOKENS = torch.tensor([1, 17, 23, 5, 42, 17, 23, 60, 9, 11])


def our_logits(head: DraftHead, target: PreTrainedModel, features: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """As the engine runs it: a prefix, then one drafted level after it."""
    bound = BoundHead(head, target)
    cache = DraftCache()
    length = features.shape[1]
    positions = torch.arange(length + 1)[None]
    embedded = bound.embed(tokens[None])
    attend = cache.attend(0, length)
    hidden = head(head.fuse(features), embedded[:, :length], head.rope(positions[:, :length]), attend)
    last = head.rope(positions[:, length:])
    deeper = head(head.feedback(hidden[:, -1:]), embedded[:, length:], last, cache.attend(length, length + 1))
    return bound.logits(hidden)[0], bound.logits(deeper)[0]


@torch.no_grad()
def features_of(target: PreTrainedModel, layers: list[int]) -> Tensor:
    states = list(target(TOKENS[None], output_hidden_states=True).hidden_states)
    inner: list[Tensor] = []
    handle = target.model.layers[-1].register_forward_hook(lambda *call: inner.append(call[-1]))
    target(TOKENS[None])
    handle.remove()
    states[-1] = inner[0] if isinstance(inner[0], Tensor) else inner[0][0]  # before the final norm
    return torch.cat([states[layer] for layer in layers], dim=-1)


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_a_published_head_computes_what_its_publisher_computes(
    case: Published, target: PreTrainedModel, tmp_path: Path
) -> None:
    tensors = random_tensors(case)
    case.write(tmp_path, tensors, case)
    head = DraftHead.from_pretrained(tmp_path, target=target)

    assert head.config.source is not None and head.config.source["format"] == case.format
    assert head.config.feature_layers == case.layers
    assert head.dtype == target.dtype
    features = features_of(target, case.layers)[:, :-2]
    embedding = tensors["embed_tokens.weight"] if case.hidden != 32 else target.get_input_embeddings().weight
    output = tensors.get("lm_head.weight", target.get_output_embeddings().weight)
    wanted = reference_logits(case, tensors, features[0], embedding, output, TOKENS[1:])
    for ours, theirs in zip(our_logits(head, target, features, TOKENS[1:]), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)
    if not case.full_vocabulary:
        assert head.draft_token_ids.tolist() == tensors["t2d"].nonzero().squeeze(-1).tolist()
    assert not head.training and head.config.tie_word_embeddings is False


@pytest.mark.parametrize("case", CASES[:1] + CASES[2:3], ids=str)
def test_without_a_target_the_file_decides_the_dtype(case: Published, tmp_path: Path) -> None:
    case.write(tmp_path, random_tensors(case), case)
    if case.format == "eagle":
        with pytest.raises(ValueError, match="Pass `target=`, or `feature_layers="):
            DraftHead.from_pretrained(tmp_path)
    head = DraftHead.from_pretrained(tmp_path, feature_layers=case.layers[::-1])
    assert head.dtype == case.dtype and head.config.feature_layers == case.layers


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ({"rope_theta": 123.0}, {"rope_parameters": {"rope_type": "default", "rope_theta": 123.0}}),
        ({"feature_layers": [7, 1, 3]}, {"feature_layers": [1, 3, 7]}),
        ({"norm_before_residual": True}, {"norm_before_residual": True}),
        ({"feedback_post_norm": True}, {"feedback_post_norm": True}),
        ({"default_tree": [8, 2, 4]}, {"default_tree": [8, 2, 4]}),
    ],
    ids=str,
)
def test_what_the_doctor_suggests_can_be_passed(
    override: dict[str, Any], wanted: dict[str, Any], target: PreTrainedModel, tmp_path: Path
) -> None:
    for folder, write in (("published", CASES[2].write), ("ours", None)):
        if write is not None:
            write(tmp_path / folder, random_tensors(CASES[2]), CASES[2])
        else:
            DraftHead.from_target(target, 16).save_pretrained(tmp_path / folder)
        head = DraftHead.from_pretrained(tmp_path / folder, target=target, **override)
        assert {key: getattr(head.config, key) for key in wanted} == wanted


def test_vllm_and_sglang_spellings_of_the_draft_vocabulary(target: PreTrainedModel, tmp_path: Path) -> None:
    case = CASES[2]
    tensors = random_tensors(case)
    ids = tensors["t2d"].nonzero().squeeze(-1)
    spellings: list[tuple[str, Callable[[], dict[str, Tensor]]]] = [
        ("vllm", lambda: rename(tensors, "t2d", d2t="draft_id_to_target_id")),
        ("sglang", lambda: rename(tensors, "t2d", "d2t") | {"hot_token_id": ids}),
        ("mask only", lambda: rename(tensors, "d2t")),
        ("absolute", lambda: tensors | {"d2t": ids}),
        ("prefixed", lambda: {f"model.{name}": tensor for name, tensor in tensors.items()}),
    ]
    for folder, spelled in spellings:
        write_config(tmp_path / folder, case.config)
        save(tmp_path / folder, spelled())
        head = DraftHead.from_pretrained(tmp_path / folder, target=target)
        assert torch.equal(head.draft_token_ids, ids), folder


@pytest.mark.parametrize(
    ("fields", "window"),
    [
        ({"sliding_window": 128}, 128),
        ({"sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"]}, 128),  # of the target
        ({"sliding_window": 128, "use_sliding_window": False}, None),
        ({"sliding_window": 128, "layer_types": ["full_attention"]}, None),
    ],
    ids=str,
)
def test_a_published_head_keeps_its_window(
    fields: dict[str, Any], window: int | None, target: PreTrainedModel, tmp_path: Path
) -> None:
    write_config(tmp_path, CASES[2].config | fields)
    save(tmp_path, random_tensors(CASES[2]))
    assert DraftHead.from_pretrained(tmp_path, target=target).config.sliding_window == window


def test_a_window_can_be_changed_and_is_kept_in_our_own_format(target: PreTrainedModel, tmp_path: Path) -> None:
    """As speculators writes it, nested."""
    windowed = {"sliding_window": 128, "use_sliding_window": True, "layer_types": ["sliding_attention"]}
    write_config(tmp_path, nested(windowed, norm_before_residual=False))
    save(tmp_path, random_tensors(CASES[2]))
    for override, window in ((None, None), (64, 64)):
        head = DraftHead.from_pretrained(tmp_path, target, sliding_window=override)
        assert head.config.sliding_window == window
    head.save_pretrained(tmp_path / "ours")
    assert DraftHead.from_pretrained(tmp_path / "ours", target).config.sliding_window == 64
    assert DraftHead.from_pretrained(tmp_path / "ours", target, sliding_window=None).config.sliding_window is None


@pytest.mark.parametrize(
    ("config", "wanted", "warned"),
    [
        (specforge(eagle_config=eagle_config([5, 2, 4], **MODELOPT_FLAGS)), [2, 4, 5], "read as boundaries"),
        (specforge(eagle_config=eagle_config([2, 3, 6])), [2, 3, 6], "read as boundaries"),
        (specforge(eagle_config=eagle_config([4, 6, 8], **MODELOPT_FLAGS)), [4, 6, 8], "read as boundaries"),
        (specforge(eagle_config=eagle_config([3, 4, 7], **MODELOPT_FLAGS)), [4, 5, 8], ""),
        (specforge(eagle_config=eagle_config([0, 2, 4], **MODELOPT_FLAGS)), [1, 3, 5], ""),
        (
            nested({}, norm_before_residual=False, eagle_aux_hidden_state_layer_ids=[1, 2, 6]),
            [2, 3, 7],
            "of those layers",
        ),
        (nested({}, norm_before_residual=False, eagle_aux_hidden_state_layer_ids=[1, 2, 8]), [1, 2, 8], ""),
        (nested({}, norm_before_residual=False, eagle_aux_hidden_state_layer_ids=[2, 4, 5]), [2, 4, 5], ""),
        (nested({}, norm_before_residual=False, eagle_aux_hidden_state_layer_ids=[0, 3, 6]), [0, 3, 6], ""),
        ({**FLAT, "target_layer_ids": [2, 4, 5]}, [3, 5, 6], ""),
        (specforge(target_layer_ids=[2, 4, 5]), [3, 5, 6], ""),
    ],
    ids=lambda value: str(value) if isinstance(value, list) else "",
)
def test_the_smallest_id_tells_what_ids_count(
    config: dict[str, Any],
    wanted: list[int],
    warned: str,
    target: PreTrainedModel,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    write_config(tmp_path, config)
    save(tmp_path, random_tensors(CASES[2]))
    assert DraftHead.from_pretrained(tmp_path, target).config.feature_layers == wanted
    assert ("Try `resps doctor`" in caplog.text) == bool(warned) and warned in caplog.text


@pytest.mark.parametrize("case", [case for case in CASES if "VL" in case.name], ids=str)
def test_a_head_that_was_trained_with_several_planes_of_positions_says_what_that_costs(
    case: Published, target: PreTrainedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """SpecForge's code reads the `default` RoPE of its Qwen3-VL config as plain RoPE, whatever sections it names."""
    case.write(tmp_path, random_tensors(case), case)
    DraftHead.from_pretrained(tmp_path, target)
    is_plain = case.name == "SpecForge, Qwen3-VL"
    assert ("was trained with M-RoPE; here its positions count tokens" in caplog.text) is not is_plain
    assert ("base 10000; the config's 1000000.0 is ignored" in caplog.text) is (case.name == "SpecForge, Qwen2.5-VL")


# Files: damaged, missing, from the Hub's cache, and pickles that would run code.
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
