"""Shared fixtures: tiny targets and heads with random weights, a clock that tests move, the real SmolLM2."""

import os


os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may reach a hub
os.environ["RESPS_COMPILED_CODE"] = "0"  # nor leave compiled code in the user's cache

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, Phase, settings
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from transformers_resps.compilation import native
from transformers_resps.compilation import packages as packages_module
from transformers_resps.compilation.kernels import TILES, Kernels, native_object, our_kernels
from transformers_resps.heads import DraftHead


# Hypothesis draws the same examples at every run: CI must not fail by luck.
ALIKE: dict[str, Any] = {
    "derandomize": True,
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}
settings.register_profile("resps", **ALIKE)
settings.register_profile("mutations", phases=[Phase.generate], **ALIKE)  # finding a bug is enough
settings.load_profile(os.environ.get("RESPS_HYPOTHESIS_PROFILE", "resps"))


@pytest.fixture(autouse=True)
def heard_logging() -> None:
    """`caplog` sees our loggers, below Transformers', and progress bars are on, whatever an earlier test set."""
    transformers.logging.enable_propagation()
    transformers.logging.set_verbosity_warning()
    transformers.logging.enable_progress_bar()


class FakeClock:
    """Time stands still until a test moves it, by hand or by a fixed amount at every reading."""

    def __init__(self, tick: float = 0.0) -> None:
        self.now = 0.0
        self.tick = tick

    def __call__(self) -> float:
        now = self.now
        self.now += self.tick
        return now

    def advance(self, seconds: float) -> None:
        self.now += seconds


def build_target(
    model_type: str = "llama", *, attn_implementation: str = "sdpa", seed: int = 0, **overrides: Any
) -> PreTrainedModel:
    """A random target in fp32: vocabulary 64, hidden size 32, four layers; `overrides` go to its config."""
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    config = AutoConfig.for_model(model_type, **(sizes | overrides))
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(
        config, attn_implementation=attn_implementation, dtype=torch.float32
    ).eval()


@pytest.fixture
def make_target() -> Callable[..., PreTrainedModel]:
    """`make_target(model_type="llama", *, attn_implementation="sdpa", seed=0, **config)`."""
    return build_target


@pytest.fixture
def tiny_target() -> PreTrainedModel:
    return build_target()


@pytest.fixture
def tiny_head(tiny_target: PreTrainedModel) -> DraftHead:
    """An untrained head of `tiny_target` that can propose 48 of its 64 tokens."""
    torch.manual_seed(1)
    return DraftHead.from_target(tiny_target, draft_vocab_size=48).eval()


@pytest.fixture
def prompt() -> dict[str, torch.Tensor]:
    """One prompt of seven tokens, as `generate(**prompt)` takes it."""
    input_ids = torch.tensor([[1, 17, 23, 5, 42, 17, 23]])
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


@pytest.fixture
def fake_clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kernels:
    """Those that code is compiled with. Without AMX, tiles are emulated."""
    chosen: Kernels = request.param
    monkeypatch.setattr(native, "chosen_kernels", lambda products, *, alike: chosen)
    if TILES not in our_kernels():
        monkeypatch.setattr(packages_module, "native_object", lambda: native_object("RESPS_EMULATES_TILES"))
    return chosen
