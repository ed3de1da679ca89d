"""What a command line names."""

import gc
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, TorchAoConfig

from tests.assistants.kinds import pair_of
from tests.compilation.test_few_bits import LIBRARIES
from tests.conftest import build_target
from tests.drafting.test_block_drafter import block_head
from transformers_resps import DraftHead, FixedPolicy, MtpHead, TreeShape, compat
from transformers_resps.calibration import identity_of
from transformers_resps.heads import BlockHead, parameter_fingerprint
from transformers_resps.tools.cli import QUANTIZATIONS, main
from transformers_resps.tools.loading import load_policy, load_source, load_target, short_name


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


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    build_target(hidden_size=64, intermediate_size=128, num_hidden_layers=1).save_pretrained(tmp_path / "target")
    return str(tmp_path / "target")


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_a_target_is_quantized_while_loading_as_its_library_quantizes_layers(name: str, checkpoint: str) -> None:
    pytest.importorskip("bitsandbytes" if name == "nf4" else "torchao")
    settings = torch._inductor.config.save_config_portable()
    loaded = load_target(checkpoint, None, "cpu", quantization=name)
    assert torch._inductor.config.save_config_portable() == settings
    stock = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="bfloat16")
    assert identity_of(loaded, None)["dtype"] != identity_of(stock, None)["dtype"] == "torch.bfloat16"
    assert parameter_fingerprint(loaded) != parameter_fingerprint(stock)
    for parent in list(stock.model.modules()):
        for child, layer in list(parent.named_children()):
            if type(layer) is nn.Linear:
                setattr(parent, child, LIBRARIES["intx 4" if name == "int4" else name](layer))
    prompt = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        assert loaded.dtype is torch.bfloat16 and torch.equal(loaded(prompt).logits, stock.eval()(prompt).logits)


@pytest.mark.parametrize("name", [*QUANTIZATIONS, '{"quant_method": "bitsandbytes", "load_in_4bit": true}'])
def test_a_checkpoint_that_is_quantized_already_is_not_quantized_again(
    name: str, checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = Path(checkpoint) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": {"quant_method": "gptq"}}))
    assert main(["calibrate", checkpoint, "--quantization", name]) == 2
    assert f"{checkpoint} is quantized already. Leave out `--quantization`." in capsys.readouterr().err


def test_a_quantized_checkpoint_without_its_library_is_told_in_one_line(
    checkpoint: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    config = TorchAoConfig(torchao.Int8WeightOnlyConfig(version=2, set_inductor_config=False)).to_dict()
    monkeypatch.setattr("transformers.quantizers.quantizer_torchao.is_torchao_available", lambda: False)
    file = Path(checkpoint) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": config}))
    assert main(["calibrate", checkpoint]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "torchao" in line]
    assert line.startswith("resps calibrate: ") and "requires torchao library" in line


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_a_missing_library_is_told_with_the_extra_that_has_it(
    name: str, checkpoint: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compat, "requires", lambda _: ['absent>=3; extra == "quantized"', 'other; extra == "serve"'])
    assert main(["calibrate", checkpoint, "--quantization", name]) == 2
    assert "needs absent>=3. Run `pip install 'transformers-resps[quantized]'`" in capsys.readouterr().err
