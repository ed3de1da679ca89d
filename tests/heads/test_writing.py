"""Heads survive being written: in our format bit for bit, in others' with the same logits."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, PreTrainedModel

from tests.conftest import build_target
from transformers_resps.heads import DraftHead

from .cases import CASES
from .published import LAYERS, Published, random_tensors
from .test_reading import TOKENS, features_of, our_logits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("draft_vocab_size", [16, None])
def test_our_own_format_keeps_every_bit(dtype: torch.dtype, draft_vocab_size: int | None, tmp_path: Path) -> None:
    target = build_target(num_hidden_layers=LAYERS).to(dtype)
    head = DraftHead.from_target(target, draft_vocab_size, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    head.save_pretrained(tmp_path, max_shard_size="10KB")
    for loaded in DraftHead.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path):
        assert loaded.dtype == dtype
        changes = {"architectures": ["DraftHead"], "_name_or_path": loaded.config.name_or_path}
        assert loaded.config.to_dict() == head.config.to_dict() | changes
        state = loaded.state_dict()
        assert state.keys() == head.state_dict().keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in head.state_dict().items())
        assert torch.equal(loaded.rotary_emb.inv_freq, head.rotary_emb.inv_freq)
    assert DraftHead.from_pretrained(tmp_path, target=target.float()).dtype == torch.float32


def test_rope_frequencies_are_not_rounded_with_the_weights(target: PreTrainedModel) -> None:
    head = DraftHead.from_target(target, 16)
    exact = head.rotary_emb.inv_freq.clone()
    head.to(torch.bfloat16)
    assert head.dtype == torch.bfloat16 and torch.equal(head.rotary_emb.inv_freq, exact)


@pytest.mark.parametrize("layout", ["specforge", "speculators"])
@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_an_export_comes_back_with_the_same_logits(
    case: Published, layout: str, target: PreTrainedModel, tmp_path: Path
) -> None:
    case.write(tmp_path / "published", random_tensors(case), case)
    head = DraftHead.from_pretrained(tmp_path / "published", target=target)
    if layout == "specforge" and (case.qk_norm or 0 in case.layers):
        with pytest.raises(ValueError, match='Use `format="speculators"`'):
            head.save_pretrained(tmp_path / "exported", format=layout)
        return
    head.save_pretrained(tmp_path / "exported", format=layout)
    back = DraftHead.from_pretrained(tmp_path / "exported", target=target)
    assert back.config.source is not None and back.config.source["format"] == layout
    same = ("feature_layers", "rope_parameters", "feedback_post_norm", "norm_before_residual", "rms_norm_eps")
    assert all(getattr(back.config, name) == getattr(head.config, name) for name in same)
    assert back.state_dict().keys() == head.state_dict().keys()
    assert all(torch.equal(back.state_dict()[name], tensor) for name, tensor in head.state_dict().items())
    features = features_of(target, case.layers)[:, :-2]
    for ours, theirs in zip(
        our_logits(back, target, features, TOKENS[1:]), our_logits(head, target, features, TOKENS[1:]), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", ["specforge", "speculators"])
@pytest.mark.parametrize("layers", [[1, 3, 4], [2, 4, 5], [3, 5, 8], [1, 2, 3, 6]], ids=str)
def test_an_export_reads_the_layers_it_read_whatever_their_ids_look_like(
    layers: list[int], layout: str, target: PreTrainedModel, tmp_path: Path
) -> None:
    head = DraftHead.from_target(target, 16, feature_layers=layers)
    head.save_pretrained(tmp_path, format=layout)
    for known in target, None:
        assert DraftHead.from_pretrained(tmp_path, known).config.feature_layers == layers


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_imported_head_is_ours_from_then_on(case: Published, target: PreTrainedModel, tmp_path: Path) -> None:
    case.write(tmp_path / "published", random_tensors(case), case)
    head = DraftHead.from_pretrained(tmp_path / "published", target=target, torch_dtype="bfloat16")
    head.save_pretrained(tmp_path / "ours")
    back = DraftHead.from_pretrained(tmp_path / "ours")
    assert back.dtype == torch.bfloat16
    assert back.config.source == head.config.source and back.config.target == head.config.target
    assert back.state_dict().keys() == head.state_dict().keys()
    assert all(torch.equal(back.state_dict()[name], tensor) for name, tensor in head.state_dict().items())


def exported(head: DraftHead, folder: Path, layout: str) -> dict[str, Any]:
    head.save_pretrained(folder, format=layout)
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def test_exports_write_ids_and_rope_in_each_formats_own_words(target: PreTrainedModel, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    head = DraftHead.from_target(target, 16, feature_layers=[2, 4, 8], rope_parameters=rope)
    flat = exported(head, tmp_path / "flat", "specforge")
    assert flat["architectures"] == ["LlamaForCausalLMEagle3"] and flat["model_type"] == "llama"
    assert flat["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [1, 3, 7]  # SGLang's: layers
    assert flat["eagle_aux_hidden_state_layer_ids"] == [2, 4, 8]  # vLLM's: boundaries
    layered = exported(head, tmp_path / "nested", "speculators")
    assert layered["speculators_model_type"] == "eagle3" and layered["norm_before_residual"] is False
    assert layered["eagle_aux_hidden_state_layer_ids"] == [2, 4, 8]
    for layer in flat, layered["transformer_layer_config"]:
        assert layer["rope_theta"] == 5e5 and layer["rope_scaling"]["factor"] == 2.0
        assert layer["rope_parameters"] == rope
    for folder, prefix in ("flat", "midlayer."), ("nested", "layers.0."):
        tensors = load_file(tmp_path / folder / "model.safetensors")
        assert f"{prefix}hidden_norm.weight" in tensors
        assert tensors["t2d"].nonzero().squeeze(-1).equal(torch.arange(16) + tensors["d2t"])
    with pytest.raises(ValueError, match='must be one of.*"speculators" for vLLM'):
        head.save_pretrained(tmp_path / "other", format="gguf")


@pytest.mark.parametrize("layout", ["specforge", "speculators"])
def test_an_export_says_how_far_the_head_sees(layout: str, target: PreTrainedModel, tmp_path: Path) -> None:
    head = DraftHead.from_target(target, 16, num_hidden_layers=2, sliding_window=48)
    written = exported(head, tmp_path, layout)
    layer = written.get("transformer_layer_config", written)
    assert layer["layer_types"] == ["sliding_attention"] * 2  # vLLM reads a window of these layers alone
    assert DraftHead.from_pretrained(tmp_path, target=target).config.sliding_window == 48
    whole = exported(DraftHead.from_target(target, 16), tmp_path / "whole", layout)
    assert "sliding_window" not in whole.get("transformer_layer_config", whole)


def test_sglang_is_told_to_borrow_an_output_head_that_is_not_in_the_file(
    target: PreTrainedModel, tmp_path: Path
) -> None:
    """With a number in `draft_vocab_size` it makes rows of its own, which nothing loads."""
    written = exported(DraftHead.from_target(target), tmp_path / "borrows", "specforge")
    assert written["draft_vocab_size"] is None
    written = exported(DraftHead.from_target(target, owns_output_head=True), tmp_path / "owns", "specforge")
    assert written["draft_vocab_size"] == 64
    assert exported(DraftHead.from_target(target), tmp_path / "vllm", "speculators")["draft_vocab_size"] == 64


@pytest.mark.parametrize("layout", ["specforge", "speculators"])
def test_vllm_reads_how_many_layers_there_are_and_that_the_normed_output_is_fed_back(
    layout: str, target: PreTrainedModel, tmp_path: Path
) -> None:
    head = DraftHead.from_target(target, 16, feature_layers=[1, 2, 3, 6], feedback_post_norm=True)
    written = exported(head, tmp_path, layout)
    assert (
        written["norm_output"] is True
        and written.get("transformer_layer_config", written)["num_aux_hidden_states"] == 4
    )
    back = DraftHead.from_pretrained(tmp_path, target=target)
    assert back.config.feedback_post_norm and back.config.feature_layers == [1, 2, 3, 6]
    head.config.feedback_post_norm = False
    assert exported(head, tmp_path, layout)["norm_output"] is False


@pytest.mark.parametrize("layout", ["specforge", "speculators"])
@pytest.mark.parametrize("own", [{"attention_bias": True}, {"attention_output_bias": True}], ids=str)
@torch.no_grad()
def test_all_projections_of_an_export_have_biases_or_none_has(
    own: dict[str, bool], layout: str, target: PreTrainedModel, tmp_path: Path
) -> None:
    """Engines make four of them for one flag, and a file that lacks one leaves it undefined."""
    from safetensors.torch import load_file

    head = DraftHead.from_target(target, 16, num_hidden_layers=2, **own)
    for name, tensor in head.named_parameters():
        if name.endswith("bias"):
            tensor.normal_()
    written = exported(head, tmp_path, layout)
    assert written.get("transformer_layer_config", written)["attention_bias"] is True
    biases = {name: bias for name, bias in load_file(tmp_path / "model.safetensors").items() if name.endswith("bias")}
    assert len(biases) == 8
    for name, bias in biases.items():
        ours = head.state_dict().get(name.replace("midlayer", "layers.0"))
        assert torch.equal(bias, torch.zeros_like(bias) if ours is None else ours), name
    back = DraftHead.from_pretrained(tmp_path, target=target)
    features = features_of(target, head.config.feature_layers or [])[:, :-2]
    for ours, theirs in zip(
        our_logits(back, target, features, TOKENS[1:]), our_logits(head, target, features, TOKENS[1:]), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    plain = DraftHead.from_target(target, 16)
    assert exported(plain, tmp_path / "plain", layout).get("attention_bias") is not True
    assert not [name for name in load_file(tmp_path / "plain" / "model.safetensors") if name.endswith("bias")]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"fc_bias": True}, "bias in `fc`, which other engines drop.*`fc_bias=False`"),
        ({"qk_norm": True, "attention_output_bias": True}, "which vLLM drops.*`attention_output_bias=False`"),
        ({"qk_norm": True, "mlp_bias": True}, "which vLLM drops.*`mlp_bias=False`"),
        ({"before_deepstack": True}, "before DeepStack.*`before_deepstack=False`"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_what_another_engine_would_drop_silently_is_not_exported(
    parts: dict[str, bool], message: str, target: PreTrainedModel, tmp_path: Path
) -> None:
    head = DraftHead.from_target(target, 16, **parts)
    with pytest.raises(ValueError, match=message):
        head.save_pretrained(tmp_path / "out", format="speculators")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", ["specforge", "speculators"])
def test_a_head_that_sglang_reads_wrongly_is_exported_with_a_warning(
    layout: str, target: PreTrainedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    DraftHead.from_target(target, 16, norm_before_residual=True, mlp_bias=True).save_pretrained(
        tmp_path, format=layout
    )
    assert ("SGLang" in caplog.text) == (layout == "specforge")


@pytest.mark.parametrize("layout", ["specforge", "speculators"])
def test_a_trained_embedding_of_the_targets_width_comes_back(
    layout: str, target: PreTrainedModel, tmp_path: Path
) -> None:
    head = DraftHead.from_target(target, 16, owns_embedding=True)
    head.save_pretrained(tmp_path, format=layout)
    back = DraftHead.from_pretrained(tmp_path, target=target)
    assert back.config.owns_embedding and torch.equal(back.embed_tokens.weight, head.embed_tokens.weight)


def test_an_export_refuses_options_it_would_drop(target: PreTrainedModel, tmp_path: Path) -> None:
    head = DraftHead.from_target(target, 16)
    with pytest.raises(ValueError, match=r"got \['push_to_hub', 'repo_id'\].*upload_folder"):
        head.save_pretrained(tmp_path / "flat", format="specforge", push_to_hub=True, repo_id="me/head")
    with pytest.raises(ValueError, match=r"got \[False\]"):
        head.save_pretrained(tmp_path / "nested", False, format="speculators")
    assert not list(tmp_path.iterdir())
