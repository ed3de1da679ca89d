import pytest
import torch
from safetensors.torch import load_file

from tests.trainers.heads import bits, config, fresh, texts
from tests.trainers.test_resuming import Stop
from transformers_resps.trainers import DraftHeadTrainer
from transformers_resps.trainers import head_config as precision
from transformers_resps.trainers.head_config import prefers_bf16


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
    monkeypatch.setattr(precision, "_CPU_INFO", tmp_path / "cpuinfo")
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
    monkeypatch.setattr(precision, "is_torch_bf16_gpu_available", lambda: True)
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


def test_a_run_in_bf16_keeps_fp32_weights_and_resumes_bit_for_bit(tmp_path):
    target, head = fresh()
    args = config(tmp_path / "whole", bf16=True, max_steps=5)
    DraftHeadTrainer(head, args, texts(), target=target).train()
    for callbacks, resume in (([Stop(3)], None), ([], True)):
        target, resumed = fresh()
        args = config(tmp_path / "stopped", bf16=True, max_steps=5)
        trainer = DraftHeadTrainer(resumed, args, texts(), callbacks=callbacks, target=target)
        trainer.train(resume_from_checkpoint=resume)
    expected = bits(head)
    assert all(torch.equal(value, expected[name]) for name, value in bits(resumed).items())
    kept = load_file(tmp_path / "whole" / "checkpoint-5" / "model.safetensors")
    assert {value.dtype for name, value in kept.items() if name != "d2t"} == {torch.float32}
    states = trainer.optimizer.state_dict()["state"].values()
    assert {value.dtype for state in states for value in state.values()} == {torch.float32}
