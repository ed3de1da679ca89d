import pytest
import torch
from safetensors.torch import load_file

from tests.trainers.heads import bits, config, fresh, texts
from transformers_resps import compat
from transformers_resps.trainers import DraftHeadTrainer, DraftHeadTrainingConfig, head_config
from transformers_resps.trainers.head_config import prefers_bf16


@pytest.fixture(autouse=True)
def unbounded(monkeypatch):
    """Flags are planted whole, also where this machine stands in for another."""
    monkeypatch.delenv(compat.FLAGS_VARIABLE, raising=False)


@pytest.mark.parametrize(
    ("capabilities", "preferred"),
    [
        ({"avx512_bf16": True, "amx_bf16": False, "cpu_name": "a new EPYC"}, True),
        ({"avx512_bf16": False, "amx_bf16": True, "l2_cache_size": 1}, True),
        ({"avx512_f": True, "avx512_bf16": False, "amx_tile": True}, False),
        ({"architecture": "arm64"}, False),
        ({}, False),
    ],
)
def test_a_cpu_prefers_bf16_if_it_multiplies_it(monkeypatch, capabilities, preferred):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert prefers_bf16(use_cpu=True) is preferred


@pytest.mark.parametrize(
    ("flags", "preferred"), [("fpu avx512f avx512_bf16 fsrm", True), ("fpu avx2", False), (None, False)]
)
def test_before_torch_2_10_the_system_tells_what_the_cpu_can(monkeypatch, tmp_path, flags, preferred):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(compat, "_CPU_INFO", tmp_path / "cpuinfo")
    if flags is not None:  # on macOS and Windows there is no such file
        (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags : {flags}\nbugs : caf\xe9\n", encoding="latin-1")
    assert prefers_bf16(use_cpu=True) is preferred


@pytest.mark.parametrize("in_hardware", [True, False])
def test_a_gpu_prefers_bf16_if_it_need_not_emulate_it(monkeypatch, in_hardware):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation or in_hardware
    )
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": not in_hardware}, raising=False)
    assert prefers_bf16() is in_hardware
    assert prefers_bf16(use_cpu=True) is not in_hardware


def test_apples_gpu_does_not_prefer_bf16(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert prefers_bf16() is False


def test_another_accelerator_is_asked_through_transformers(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(head_config, "is_torch_bf16_gpu_available", lambda: True)
    assert prefers_bf16() is True


def test_a_head_learns_in_bf16_on_a_cpu_what_it_learns_in_fp32(tmp_path):
    heads, losses = {}, {}
    for bf16 in (False, True):
        target, head = fresh()
        trainer = DraftHeadTrainer(head, config(tmp_path / str(bf16), bf16=bf16), texts(), target=target)
        losses[bf16] = trainer.train().training_loss
        heads[bf16] = bits(head)
    assert losses[True] != losses[False]
    assert losses[True] == pytest.approx(losses[False], rel=2e-3)
    start = bits(fresh()[1])
    for name, exact in heads[False].items():
        if not torch.equal(exact, start[name]):
            learned, moved = heads[True][name] - exact, exact - start[name]
            assert learned.norm() < 0.3 * moved.norm(), name


def test_a_run_in_bf16_keeps_fp32_weights(tmp_path):
    target, head = fresh()
    trainer = DraftHeadTrainer(head, config(tmp_path, bf16=True, max_steps=2), texts(), target=target)
    trainer.train()
    kept = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert {value.dtype for name, value in kept.items() if name != "d2t"} == {torch.float32}
    states = trainer.optimizer.state_dict()["state"].values()
    assert {value.dtype for state in states for value in state.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("setting", "needed"),
    [
        ({"ttt_steps": 0}, "`ttt_steps` is 0, but it must be a whole number from 1"),
        ({"ttt_steps": 2.5}, "`ttt_steps` is 2.5, but it must be a whole number from 1"),
        ({"tokens_per_batch": 1}, "`tokens_per_batch` is 1, but it must be a whole number from 2"),
        ({"loss_chunk_size": 0}, "`loss_chunk_size` is 0, but it must be a whole number from 1"),
        ({"draft_vocab_size": -1}, "`draft_vocab_size` is -1, but it must be a whole number from 0"),
        ({"tau_texts": -1}, "`tau_texts` is -1, but it must be a whole number from 0"),
        ({"max_length": 2}, "`max_length` is 2, but it must be a whole number from 3 or None"),
        ({"dataset_num_proc": 0}, "`dataset_num_proc` is 0, but it must be a whole number from 1 or None"),
        ({"ttt_step_decay": 0.0}, "`ttt_step_decay` is 0.0, but it must be above 0 and at most 1"),
        ({"model_init_kwargs": "default_tree"}, "`model_init_kwargs` is 'default_tree', but it must be a dict"),
        ({"model_init_kwargs": {"draft_vocab_size": 9}}, "must be without `draft_vocab_size`, a setting of its own"),
        ({"target_init_kwargs": ["bf16"]}, r"`target_init_kwargs` is \['bf16'\], but it must be a dict or None"),
        ({"optim": "nothing"}, "nothing"),
        ({"per_device_train_batch_size": 4}, "`per_device_train_batch_size` is 4, .*left out: `tokens_per_batch`"),
        ({"per_device_eval_batch_size": 4}, "`per_device_eval_batch_size` is 4, .*left out: `tokens_per_batch`"),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path, setting, needed):
    with pytest.raises(ValueError, match=needed):
        config(tmp_path, **setting)


def test_bf16_is_one_flag_on_a_machine_without_an_accelerator(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert DraftHeadTrainingConfig(str(tmp_path), bf16=True).bf16
    for is_faster in (True, False):
        monkeypatch.setattr("transformers_resps.trainers.head_config.prefers_bf16", lambda use_cpu, it=is_faster: it)
        assert DraftHeadTrainingConfig(str(tmp_path)).bf16 is is_faster


def test_settings_survive_a_copy(tmp_path):
    """As `dataclasses.replace`, or the checkpoint's copy."""
    before = config(tmp_path, model_init_kwargs={"fc_norm": False})
    again = DraftHeadTrainingConfig(**before.to_dict())
    assert again.to_dict() == before.to_dict() and again.optim == "muon"
