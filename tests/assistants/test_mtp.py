"""Loading and saving MTP layers: which files are opened, what is borrowed, and what is refused by name."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import MtpModel

from tests.conftest import build_target
from transformers_resps import TreeShape, attach
from transformers_resps.assistants import MtpHead
from transformers_resps.drafting import Committed, DraftRequest, StepModel
from transformers_resps.drafting.model_drafter import ModelDrafter
from transformers_resps.hub import checkpoint

from .growing import Growing
from .mtp_cases import CASES, LAYERS, Case, H, Raw, Reference, V


BY_NAME = {case.name: case for case in CASES}
MODULE = "model-00002-of-00002.safetensors"  # the shard that holds it
LENGTH = 5
TOKENS = torch.arange(LENGTH)[None]
STATES = torch.randn(1, LENGTH, H, generator=torch.Generator().manual_seed(2))


def published(folder: Path, name: str = "GLM-4.6", **stated: Any) -> tuple[PreTrainedModel, Raw]:
    """A target whose checkpoint is in `folder`, and the raw tensors of its module."""
    case = BY_NAME[name]
    target, raw = case.build(), case.raw()
    case.write(folder, target, raw, **stated)
    return target, raw


@torch.no_grad()
def logits_of(head: MtpHead, target: PreTrainedModel) -> list[Tensor]:
    return outputs_of(head.bind(target), STATES, TOKENS, [LENGTH])[1]


@pytest.mark.parametrize("name", ["Qwen3.5", "DeepSeek-V3"])
def test_only_the_shard_that_holds_the_layers_is_opened(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, _ = published(tmp_path, name)
    opened, safe_open = list[str](), checkpoint.safe_open
    monkeypatch.setattr(
        checkpoint, "safe_open", lambda path, **kind: opened.append(path.name) or safe_open(path, **kind)
    )
    MtpHead.from_target(target)
    assert set(opened) == {MODULE}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_saved_layers_have_the_names_of_their_checkpoint_and_load_again(case: Case, tmp_path: Path) -> None:
    target, raw = case.build(), case.raw()
    case.write(tmp_path / "published", target, raw)
    head = MtpHead.from_target(target, draft_token_ids=[9, 3, 40])
    head.save_pretrained(tmp_path / "alone")
    saved = load_file(tmp_path / "alone" / "model.safetensors")
    assert saved.keys() == raw.keys() and all(torch.equal(saved[key], raw[key]) for key in raw)
    again = MtpHead.from_pretrained(tmp_path / "alone", target)
    assert again.settings == head.settings and again.settings.draft_token_ids == (3, 9, 40)
    for ours, theirs in zip(logits_of(again, target), logits_of(head, target), strict=True):
        assert torch.equal(ours, theirs)
    assert again.fingerprint() == head.fingerprint()


@torch.no_grad()
@pytest.mark.parametrize("name", ["GLM-4.6", "DeepSeek-V3"])
def test_stocks_own_module_computes_the_same(name: str, tmp_path: Path) -> None:
    target, _ = published(tmp_path, name)
    head = MtpHead.from_target(target)
    target.config.num_mtp_layers = 1
    stock: Any = MtpModel(target, 1).eval()
    names = {"layers.0.block.": "layers.0.mtp_block.", "layers.0.norm.": "layers.0.post_norm."}
    for key, tensor in head.state_dict().items():
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        stock.get_parameter_or_buffer(key).copy_(tensor)
    model = head.bind(target)
    places = model.places(TOKENS)
    expected = stock.layers[0](
        target.get_input_embeddings()(TOKENS), model.fuse(STATES), places[:2], None, TOKENS, None
    )
    torch.testing.assert_close(outputs_of(model, STATES, TOKENS, [LENGTH])[0][0], expected[0])


def _in_blocks(raw: Raw, size: int) -> Raw:
    """Matrices in FP8, with a scale for each block."""
    found = {}
    for name, tensor in raw.items():
        if tensor.dim() < 2 or "norm" in name or name.endswith("gate.weight"):
            found[name] = tensor
            continue
        rows, columns = (-(-length // size) for length in tensor.shape)
        scales = torch.rand(rows, columns, generator=torch.Generator().manual_seed(len(name))) + 0.5
        spread = scales.repeat_interleave(size, 0).repeat_interleave(size, 1)[: tensor.shape[0], : tensor.shape[1]]
        found[name] = (tensor / spread).to(torch.float8_e4m3fn)
        found[f"{name}_scale_inv"] = scales
    return found


def test_fp8_arrives_times_its_scales(tmp_path: Path) -> None:
    case, size = BY_NAME["DeepSeek-V3"], 20
    target, raw = case.build(), _in_blocks(case.raw(), size)
    case.write(tmp_path, target, raw, quantization_config={"quant_method": "fp8", "weight_block_size": [size, size]})
    head = MtpHead.from_target(target)
    name = f"model.layers.{LAYERS}.self_attn.kv_b_proj.weight"  # 64 x 8
    expected = raw[name].float()
    for row in range(64):
        expected[row] *= raw[f"{name}_scale_inv"][row // size, 0]
    found = head.state_dict()["layers.0.block.self_attn.kv_b_proj.weight"]
    assert torch.equal(found, expected)
    merged = head.state_dict()["layers.0.block.mlp.experts.down_proj"]
    assert merged.shape == (4, H, 16) and merged.dtype == torch.float32


@torch.no_grad()
def test_a_draft_vocabulary_takes_rows_of_the_output_head_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, _ = published(tmp_path)
    ids = [7, 50, 3]
    head, full = MtpHead.from_target(target, draft_token_ids=torch.tensor(ids)), MtpHead.from_target(target)
    model = head.bind(target)
    assert model.proposable_tokens == 3 and model.target_ids(torch.tensor([[0, 2]])).tolist() == [[3, 50]]
    torch.testing.assert_close(logits_of(head, target)[0], logits_of(full, target)[0][:, sorted(ids)])
    project = head.rows.of(target.lm_head, torch.tensor(sorted(ids)), 0)
    assert head.rows.of(target.lm_head, torch.tensor(sorted(ids)), 0) is project
    target.lm_head.weight.mul_(2)
    assert head.rows.of(target.lm_head, torch.tensor(sorted(ids)), 0) is not project


@pytest.mark.parametrize("part", ["head", "embed_tokens"])
def test_an_embedding_and_an_output_head_of_its_own_are_used_and_copies_of_the_targets_are_not(
    part: str, tmp_path: Path
) -> None:
    case = BY_NAME["DeepSeek-V3"]
    target, raw = case.build(), case.raw()
    theirs = (target.lm_head if part == "head" else target.get_input_embeddings()).weight.detach()
    name = f"model.layers.{LAYERS}.{'shared_head.head' if part == 'head' else 'embed_tokens'}.weight"
    case.write(tmp_path / "copy", target, raw | {name: theirs.clone()})
    copied = MtpHead.from_target(target)
    assert not copied.settings.own_output_head and not copied.settings.own_embedding
    case.write(tmp_path / "own", target, raw | {name: theirs.flip(0)})
    own = MtpHead.from_target(target)
    assert own.settings.own_output_head is (part == "head") and own.settings.own_embedding is (part != "head")
    found, usual = logits_of(own, target)[0], logits_of(copied, target)[0]
    if part == "head":
        torch.testing.assert_close(found, usual.flip(1))
    else:
        assert not torch.allclose(found, usual)


def test_norms_are_read_as_the_caller_says(tmp_path: Path) -> None:
    target, raw = published(tmp_path / "published")
    expected = logits_of(MtpHead.from_target(target), target)
    shifted = {name: tensor - 1 if name.endswith("norm.weight") else tensor for name, tensor in raw.items()}
    BY_NAME["GLM-4.6"].write(tmp_path / "shifted", target, shifted)
    head = MtpHead.from_target(target, zero_centred=True)
    torch.testing.assert_close(logits_of(head, target), expected)
    head.save_pretrained(tmp_path / "alone")
    torch.testing.assert_close(load_file(tmp_path / "alone" / "model.safetensors"), shifted)
    torch.testing.assert_close(logits_of(MtpHead.from_pretrained(tmp_path / "alone", target), target), expected)


def test_a_checkpoint_serves_a_target_that_came_from_elsewhere(tmp_path: Path) -> None:
    target, _ = published(tmp_path)
    target.config.name_or_path = ""
    assert MtpHead.from_pretrained(tmp_path, target).feature_layers == [LAYERS + 1]
    with pytest.raises(ValueError, match="does not know where it was loaded from"):
        MtpHead.from_target(target)


def test_an_architecture_without_such_layers_is_told_so(tmp_path: Path) -> None:
    build_target().save_pretrained(tmp_path)
    target = attach(AutoModelForCausalLM.from_pretrained(tmp_path))
    with pytest.raises(ValueError, match=r"is a llama model without MTP layers.*`policy='auto'` alone"):
        target.generate(torch.tensor([[1, 5]]), assistant_model="mtp", policy="auto")


def test_the_fingerprint_tells_a_trained_module_from_an_untrained_one(tmp_path: Path) -> None:
    head = MtpHead.from_target(published(tmp_path)[0])
    before = head.fingerprint()
    with torch.no_grad():
        head.layers[0].eh_proj.weight.mul_(1.01)
    assert head.fingerprint() != before


def without(part: str) -> Callable[[Raw], Raw]:
    return lambda raw: {name: tensor for name, tensor in raw.items() if part not in name}


def renamed(part: str, other: str) -> Callable[[Raw], Raw]:
    return lambda raw: {name.replace(part, other): tensor for name, tensor in raw.items()}


def as_fp8(raw: Raw) -> Raw:
    return {name: tensor.to(torch.float8_e4m3fn) if tensor.dim() == 2 else tensor for name, tensor in raw.items()}


REFUSED: dict[str, tuple[str, Callable[[Raw], Raw], dict[str, Any], str]] = {
    "dropped": ("GLM-4.6", lambda raw: {}, {}, "holds no MTP weights that we know.*pass the original"),
    "half dropped": ("Qwen3.5", without("mtp.fc"), {}, "holds no MTP weights that we know"),
    "a tensor short": ("GLM-4.6", without("k_proj.bias"), {}, r"lacks.*k_proj\.bias"),
    "an expert short": ("GLM-4.6", without("experts.1."), {}, "do not have the sizes"),
    "packed": ("GLM-4.6", renamed("q_proj.weight", "q_proj.weight_packed"), {}, "quantised.*weight_packed"),
    "GPTQ": ("Qwen3.5", renamed("q_proj.weight", "q_proj.qweight"), {}, "quantised.*qweight"),
    "FP8 without scales": ("DeepSeek-V3", as_fp8, {}, "FP8 without a scale for each block of 128 x 128"),
    "another hidden size": ("GLM-4.6", dict, {"hidden_size": 48}, r"need hidden_size 48 \(the target: 32\)"),
    "another vocabulary": ("GLM-4.6", dict, {"vocab_size": 99}, r"need vocab_size 99 \(the target: 64\)"),
    "more layers stated": ("GLM-4.6", dict, {"num_nextn_predict_layers": 3}, "3 MTP layers, but its files hold 1"),
    "DeepSeek-V4": ("GLM-4.6", renamed("eh_proj", "e_proj"), {}, "hyper-connections.*DeepSeek-V4"),
    "Qwen4": ("Qwen3.5", renamed("mtp.fc.", "mtp.fc_embedding."), {}, "hyper-connections.*Qwen4"),
    "Nemotron": ("MiMo-V2-Flash", renamed("self_attn", "mixer"), {}, "several layers of different kinds"),
    "an indexer": ("DeepSeek-V3", renamed("kv_a_layernorm", "indexer.k_norm"), {}, "what an indexer selects"),
    "a block head": ("Qwen3.5", renamed("mtp.", "mtp_dspark."), {}, "is a block head"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_drafted_with_is_refused_by_name(name: str, tmp_path: Path) -> None:
    family, change, stated, message = REFUSED[name]
    case = BY_NAME[family]
    target = case.build()
    case.write(tmp_path, target, change(case.raw()) or {"model.other.weight": torch.ones(1)}, **stated)
    with pytest.raises(ValueError, match=message):
        MtpHead.from_target(target)


def test_damaged_and_missing_files_are_named(tmp_path: Path) -> None:
    target, _ = published(tmp_path)
    whole = (tmp_path / MODULE).read_bytes()
    (tmp_path / MODULE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"{MODULE} is not a whole .* truncated or corrupt"):
        MtpHead.from_target(target)
    (tmp_path / MODULE).unlink()
    with pytest.raises(ValueError, match=f"lacks the file {MODULE}"):
        MtpHead.from_target(target)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match=r"neither model\.safetensors nor its index"):
        MtpHead.from_target(target)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"no config\.json"):
        MtpHead.from_target(target)


def test_one_file_without_an_index_will_do(tmp_path: Path) -> None:
    target, raw = published(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    save_file({name: tensor.contiguous() for name, tensor in raw.items()}, tmp_path / "model.safetensors")
    assert MtpHead.from_target(target).settings.depths == 1


def test_unknown_keywords_and_another_target_are_refused(tmp_path: Path) -> None:
    target, _ = published(tmp_path / "one")
    with pytest.raises(ValueError, match="feed"):
        MtpHead.from_target(target, feed="before")
    with pytest.raises(ValueError, match="`fed_back` must be one of"):
        MtpHead.from_target(target, fed_back="never")
    with pytest.raises(ValueError, match="from 0 to 63"):
        MtpHead.from_target(target, draft_token_ids=[V])
    other = replace(BY_NAME["GLM-4.6"], config=BY_NAME["GLM-4.6"].config | {"vocab_size": 48}).build()
    head = MtpHead.from_target(target)
    with pytest.raises(ValueError, match=r"needs vocab_size 64 \(this target: 48\).*MtpHead.from_target"):
        head.bind(other)
    assert json.dumps(head.identity())


# Every published layout computes what loops over its raw tensors compute.
NEWEST = torch.empty(0)  # levels are drafted from what was observed


PLACES = 9


class Text(Growing):
    """The entries of a text so far, read in passes; a depth has none of its first tokens."""

    def at(self, slots: Tensor, depth: int) -> "Text":
        """As a pass over these slots sees them."""
        order = torch.arange(int(slots[-1]) + 1)
        mask = (order <= slots[:, None]) & (order >= depth) | (order == slots[:, None])
        is_plain = depth == 0 and (len(slots) == 1 or slots[0] == 0)
        self.mask = None if is_plain else mask[None, None]
        return self


def outputs_of(
    model: StepModel, features: Tensor, tokens: Tensor, passes: list[int]
) -> tuple[list[Tensor], list[Tensor]]:
    """As `Reference.outputs`, read in passes over so many tokens each."""
    entries, given = Text(), model.fuse(features)
    fed, logits = [], []
    for depth in range(model.depths):
        found = []
        for slots in torch.arange(features.shape[1]).split(passes):
            part = given[:, slots], model.places(slots[None]), entries.at(slots, depth)
            found.append(model.run(depth, tokens[:, slots], *part))
        output = torch.cat(found, dim=1)
        back = model.feedback(output, given)
        fed.append(back[0])
        logits.append(model.logits(output, depth)[0])
        given = torch.cat([torch.zeros(1, 1, H), back[:, :-1]], dim=1)
    return fed, logits


def pairs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(1, PLACES, H, generator=generator)
    return states, torch.randint(0, V, (1, PLACES), generator=generator)


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_a_module_computes_what_its_family_does(case: Case, tmp_path: Path) -> None:
    target, raw = case.build(), case.raw()
    case.write(tmp_path, target, raw)
    model = MtpHead.from_target(target).bind(target)
    states, tokens = pairs()
    reference = Reference(case, raw, target)
    expected, features = reference.outputs(states[0], tokens[0]), reference.given(states)
    for passes in ([PLACES], [1] * PLACES, [4, 3, 1, 1]):
        found = outputs_of(model, features, tokens, passes)
        for theirs, ours in zip(expected, found, strict=True):
            assert len(ours) == case.depths
            for depth in range(case.depths):
                torch.testing.assert_close(ours[depth][depth:], theirs[depth][depth:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("fed_back", ["after", "before", "target"])
@pytest.mark.parametrize("name", ["Qwen3.5", "DeepSeek-V3", "Mellum"])
@torch.no_grad()
def test_a_tree_is_drafted_as_each_path_alone(name: str, fed_back: str, tmp_path: Path) -> None:
    """One layer drafts all levels; the window of Mellum's is shorter than the text."""
    case = next(case for case in CASES if case.name == name)
    target, raw = case.build(), case.raw()
    case.write(tmp_path, target, raw)
    case = replace(case, does=case.does | {"fed_back": fed_back})
    model = MtpHead.from_target(target, fed_back=fed_back).bind(target)
    states, tokens = pairs()
    features = Reference(case, raw, target).given(states)
    for shape in (TreeShape(20, 3, 3), TreeShape(4, 3, 1)):
        drafter = ModelDrafter(model, 1, None)
        drafter.observe(Committed(tokens[:, :5], features[:, :5]))
        drafter.draft(NEWEST, DraftRequest(shape))
        drafter.observe(Committed(tokens[:, 5:], features[:, 5:]))
        pool = drafter.draft(NEWEST, DraftRequest(shape))
        for node in range(pool.tokens.shape[1]):
            path, at = list[int](), node
            while at >= 0:
                path.insert(0, int(pool.tokens[0, at]))
                at = int(pool.parents[0, at])
            expected = Reference(case, raw, target).log_prob(states[0], tokens[0], path)
            assert float(pool.scores[0, node]) == pytest.approx(expected, abs=1e-3)
