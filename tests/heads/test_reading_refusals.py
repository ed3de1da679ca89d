"""What is no usable head is refused by name, before a weight of it is used."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.conftest import build_target
from transformers_resps.heads import DraftHead
from transformers_resps.heads.identity import target_identity

from .cases import CASES, FLAT, eagle_config, nested, specforge
from .published import LAYERS, D, H, V, random_tensors, rename, save, write_config


BASE = CASES[2]
GOOD = random_tensors(BASE)
Tensors = dict[str, Tensor]


def without(*names: str) -> Tensors:
    return rename(GOOD, *names)


def eagle1() -> Tensors:
    plain = {f"midlayer.self_attn.{name}_proj.weight": torch.zeros(H, H) for name in "qkv"}
    return (
        without("d2t", "t2d", "norm.weight", "midlayer.hidden_norm.weight")
        | plain
        | {"fc.weight": torch.zeros(H, 2 * H)}
    )


def vispec() -> Tensors:
    """As its `cnets_ours.py` names them: an EAGLE-2 layer, and what reads the images."""
    adaptor = {f"imadpt.{name}_proj.weight": torch.zeros(H, H) for name in "kvo"}
    return (
        rename(eagle1(), "lm_head.weight", "midlayer.input_layernorm.weight", midlayer="layers.0")
        | adaptor
        | {"imadpt.q": torch.zeros(2, 4, 8), "img_fc.weight": torch.zeros(H, 2 * H), "img_fc.bias": torch.zeros(H)}
    )


def mla() -> Tensors:
    return without("midlayer.self_attn.k_proj.weight") | {
        "midlayer.self_attn.kv_a_proj_with_mqa.weight": torch.zeros(8, 2 * H)
    }


def changed(**tensors: Tensor) -> Tensors:
    return GOOD | {name.replace("__", "."): tensor for name, tensor in tensors.items()}


def offsets(position: int, value: int) -> Tensors:
    d2t = GOOD["d2t"].clone()
    d2t[position] = value
    return changed(d2t=d2t)


NORMS = {"input_norm__weight": torch.ones(3 * H)} | {f"fc_norm__{layer}__weight": torch.ones(H) for layer in range(3)}
REFUSED: list[tuple[str, dict[str, Any], Callable[[], Tensors] | Tensors, str]] = [
    ("EAGLE-1", FLAT, eagle1, "EAGLE-1 or EAGLE-2 head.*or train one with `DraftHeadTrainer`"),
    ("ViSpec", FLAT, vispec, "is a ViSpec head: its adaptor.*or train one with `DraftHeadTrainer`"),
    ("MLA", {}, mla, "MLA attention"),
    ("P-EAGLE without its token", {}, changed(mask_hidden=torch.zeros(1, 3 * H)), "P-EAGLE.*no `mask_token_id`"),
    ("P-EAGLE config", {"parallel_drafting": True}, GOOD, "P-EAGLE"),
    ("P-EAGLE architecture", {"architectures": ["PEagleDraftModel"]}, GOOD, "P-EAGLE"),
    ("ModelOpt parallel", {"eagle_config": {"parallel_draft_step": 4}}, GOOD, "P-EAGLE"),
    ("speculators of another kind", nested({}, speculators_model_type="dflash"), GOOD, "kind 'dflash'"),
    ("experts", {}, changed(midlayer__mlp__gate__weight=torch.zeros(4, H)), "mixture of experts"),
    ("one state", {"eagle_config": {"use_aux_hidden_state": False}}, GOOD, "use_aux_hidden_state: false"),
    ("no last norm", {"eagle_config": {"use_last_layernorm": False}}, GOOD, "use_last_layernorm: false"),
    ("missing", {}, without("midlayer.mlp.up_proj.weight"), "lacks.*layers.0.mlp.up_proj.weight.*nothing is newly"),
    ("missing norm", {}, without("norm.weight"), "lacks.*norm.weight"),
    ("no output head", {}, without("lm_head.weight"), "lacks.*lm_head.weight"),
    ("unexpected", {}, changed(surprise=torch.zeros(3)), "unexpected.*surprise"),
    ("flag without tensor", {"norm_before_fc": True}, GOOD, "lacks.*input_norm.weight"),
    ("duplicate", {}, changed(layers__0__hidden_norm__weight=torch.ones(H)), "mean the same tensor"),
    ("layers", {"num_hidden_layers": 2}, GOOD, "states num_hidden_layers 2 .the tensors: 1"),
    ("hidden size", {"hidden_size": 64}, GOOD, "states hidden_size 64 .the tensors: 32.*pass `hidden_size=32"),
    ("MLP size", {"intermediate_size": 41}, GOOD, "states intermediate_size 41"),
    ("head dim", {"head_dim": 16}, GOOD, "states head_dim 16"),
    ("key heads", {"num_key_value_heads": 4}, GOOD, "states num_key_value_heads 4"),
    ("odd heads", {"num_attention_heads": 5}, GOOD, "32 query.*5 attention heads"),
    ("draft vocabulary", {"draft_vocab_size": 20}, GOOD, "states draft_vocab_size 20"),
    ("two norms", {"norm_before_fc": True, "fc_norm": True}, GOOD, "both `norm_before_fc` and `fc_norm`"),
    ("tensors of two norms", {}, changed(**NORMS), "both `norm_before_fc` and `fc_norm`"),
    (
        "vocabulary",
        {},
        changed(embed_tokens__weight=torch.zeros(V + 8, H), t2d=torch.ones(V + 8).bool()),
        "72 tokens.*64",
    ),
    ("target width", {"target_hidden_size": 48}, GOOD, "hidden size 48, but the target has 32"),
    ("fc width", {}, changed(fc__weight=torch.zeros(H, 100)), "reads 100 values.*no multiple"),
    (
        "inner shape",
        {},
        changed(midlayer__self_attn__v_proj__weight=torch.zeros(8, 2 * H)),
        "v_proj.weight .8, 64. .needed: .16",
    ),
    ("leaves the vocabulary", {}, offsets(-1, V), "to 79, but they must ascend from 0 to 63"),
    ("below the vocabulary", {}, offsets(0, -5), "ids from -5"),
    ("twice", {}, offsets(1, int(GOOD["d2t"][0]) - 1), "must ascend"),
    ("contradiction", {}, changed(t2d=torch.arange(V) < D), "different draft vocabularies"),
    ("no map", {}, without("d2t", "t2d"), "neither `d2t` nor `t2d`"),
    ("ids twice", {"eagle_config": eagle_config([1, 1, 3])}, GOOD, "list of distinct"),
    (
        "ids out of range",
        {"eagle_config": eagle_config([1, 3, 8])},
        GOOD,
        r"hidden states \[2, 4, 9\] .this target: 0 to 8",
    ),
    ("too few ids", {"eagle_config": eagle_config([1, 3])}, GOOD, "reads 3 layers.*its layers are .2, 4"),
    ("two RoPE bases", {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, GOOD, "two RoPE bases"),
    ("unknown RoPE", {"rope_scaling": {"rope_type": "spiral"}}, GOOD, "kind 'spiral'"),
    ("attention bias", {"attention_bias": True}, GOOD, "lacks.*self_attn.q_proj.bias"),
    ("MLP bias", {"mlp_bias": True}, GOOD, "lacks.*mlp.gate_proj.bias"),
    ("fc bias", {"bias": True}, GOOD, "lacks.*fc.bias"),
    ("half a RoPE", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, GOOD, "needs .*high_freq_factor"),
    ("partial RoPE", {"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}}, GOOD, "rotates 0.5"),
    ("activation", {"hidden_act": "grin"}, GOOD, "activation 'grin'"),
    ("quantized", {}, changed(fc__weight=GOOD["fc.weight"].to(torch.int8)), "unquantized"),
]


@pytest.mark.parametrize(
    ("config", "tensors", "message"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED]
)
def test_a_file_that_is_no_usable_head_is_refused_by_name(
    config: dict[str, Any],
    tensors: Callable[[], Tensors] | Tensors,
    message: str,
    target: PreTrainedModel,
    tmp_path: Path,
) -> None:
    whole = config if "transformer_layer_config" in config else {**BASE.config, **config}
    write_config(tmp_path, whole)
    save(tmp_path, tensors() if callable(tensors) else tensors)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        DraftHead.from_pretrained(tmp_path, target=target)


@pytest.mark.parametrize("shard_size", ["1MB", "20KB"], ids=["one file", "shards"])
def test_a_whole_model_is_told_from_a_damaged_head(shard_size: str, target: PreTrainedModel, tmp_path: Path) -> None:
    """Also where the shards are not there: gigabytes need not be downloaded for it."""
    target.save_pretrained(tmp_path, max_shard_size=shard_size)
    for shard in tmp_path.glob("model-*"):
        shard.unlink()
    with pytest.raises(ValueError, match=r"is a whole model \(LlamaForCausalLM\).*`AutoModelForCausalLM`"):
        DraftHead.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lm_head.weight": None}, "lacks.*lm_head.weight"),
        ({"surprise": torch.zeros(2)}, "unexpected.*surprise"),
        ({"norm.weight": torch.ones(H + 2)}, "norm.weight .34. .needed: .32"),
        (
            {"d2t": torch.zeros(D).long(), "lm_head.weight": torch.zeros(D - 1, H)},
            "lm_head.weight .15, 32. .needed: .16",
        ),
    ],
    ids=str,
)
def test_our_own_format_is_held_to_the_same(
    change: dict[str, Tensor | None], message: str, target: PreTrainedModel, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    DraftHead.from_target(target, D).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors") | change
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"(?s){message}"):
        DraftHead.from_pretrained(tmp_path, target=target)


@pytest.mark.parametrize("published", [True, False])
def test_the_head_of_another_target_is_refused(published: bool, target: PreTrainedModel, tmp_path: Path) -> None:
    if published:
        BASE.write(tmp_path, GOOD, BASE)
    else:
        DraftHead.from_target(target, D).save_pretrained(tmp_path)
    for size, message in (
        ({"vocab_size": 80}, "80"),
        ({"hidden_size": 48}, "another hidden size|48"),
        ({"num_hidden_layers": 4}, "4.*or train one with `DraftHeadTrainer`"),
    ):
        with pytest.raises(ValueError, match=message):
            DraftHead.from_pretrained(tmp_path, target=build_target(**{"num_hidden_layers": LAYERS, **size}))


@pytest.mark.parametrize("published", [True, False])
def test_a_target_is_the_second_argument_and_held_to_the_same(
    published: bool, target: PreTrainedModel, tmp_path: Path
) -> None:
    if published:
        BASE.write(tmp_path, GOOD, BASE)
    else:
        DraftHead.from_target(target, D).save_pretrained(tmp_path)
    assert DraftHead.from_pretrained(tmp_path, target).config.target == target_identity(target)
    for thing in ("meta-llama/Toy", target.config):
        with pytest.raises(ValueError, match=f"is a {type(thing).__name__}, but must be the loaded model"):
            DraftHead.from_pretrained(tmp_path, thing)
    with pytest.raises(TypeError, match="positional arguments"):
        DraftHead.from_pretrained(tmp_path, target, "main")


def test_feature_layers_that_the_target_lacks_are_refused(target: PreTrainedModel, tmp_path: Path) -> None:
    BASE.write(tmp_path / "published", GOOD, BASE)
    DraftHead.from_target(target, D).save_pretrained(tmp_path / "ours")
    for folder in "published", "ours":
        with pytest.raises(ValueError, match=r"hidden states \[2, 4, 9\] .this target: 0 to 8"):
            DraftHead.from_pretrained(tmp_path / folder, target=target, feature_layers=[2, 4, 9])


def test_unknown_keywords_are_refused(target: PreTrainedModel, tmp_path: Path) -> None:
    BASE.write(tmp_path, GOOD, BASE)
    with pytest.raises(ValueError, match=r"\['rope_thetas'\], which it does not know"):
        DraftHead.from_pretrained(tmp_path, target=target, rope_thetas=1e4)
    with pytest.raises(ValueError, match="rope_theta=-1.*, but it must be a positive number"):
        DraftHead.from_pretrained(tmp_path, target=target, rope_theta=-1)
    with pytest.raises(ValueError, match="list of distinct"):
        DraftHead.from_pretrained(tmp_path, target=target, feature_layers=[2, 2, 3])
    with pytest.raises(ValueError, match="states hidden_size 64"):
        DraftHead.from_pretrained(tmp_path, target=target, hidden_size=64)


def test_ids_whose_meaning_needs_the_target_are_not_guessed(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == "speculators, lifted SpecForge ids")
    case.write(tmp_path, random_tensors(case), case)
    with pytest.raises(ValueError, match="may count layers or the boundaries"):
        DraftHead.from_pretrained(tmp_path)


def test_a_config_that_lies_can_be_corrected(target: PreTrainedModel, tmp_path: Path) -> None:
    write_config(tmp_path, specforge(eagle_config=eagle_config([1, 2, 6]), hidden_size=64, num_hidden_layers=36))
    save(tmp_path, GOOD)
    head = DraftHead.from_pretrained(tmp_path, target=target, hidden_size=H, num_hidden_layers=1)
    assert head.config.hidden_size == H and len(head.layers) == 1


def test_a_config_that_promises_biases_can_be_corrected(target: PreTrainedModel, tmp_path: Path) -> None:
    write_config(tmp_path, BASE.config | {"bias": True, "attention_bias": True})
    save(tmp_path, GOOD)
    head = DraftHead.from_pretrained(tmp_path, target, fc_bias=False, attention_bias=False)
    assert not head.config.fc_bias and not head.config.attention_bias
