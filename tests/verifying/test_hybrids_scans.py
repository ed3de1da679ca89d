"""Scans of recurrent layers: as many tokens as a tree is deep, and noted for the thread alone that reads it."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.granitemoehybrid import modeling_granitemoehybrid
from transformers.models.kimi_linear import modeling_kimi_linear
from transformers.models.qwen3_5 import modeling_qwen3_5

from tests.recurrent_targets import NEEDS_STATES
from transformers_resps.tree import DraftTree
from transformers_resps.verifying.forward import TargetForward
from transformers_resps.verifying.hybrids import NotedScans, ScanSettings, known_mixers
from transformers_resps.verifying.verifier import HybridVerifier, TreeVerifier


pytestmark = NEEDS_STATES
SIZES: dict[str, Any] = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {
    "num_attention_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
    "pad_token_id": 0,
    "eos_token_id": None,
}
# Per type: more of its config, the module and the name of the function that computes chunks, and the size of stock's.
SCANS: dict[str, tuple[dict[str, Any], Any, str, int]] = {
    "qwen3_5_text": ({"num_key_value_heads": 2}, modeling_qwen3_5, "torch_chunk_gated_delta_rule", 64),
    "kimi_linear": (
        {"mlp_layer_types": ["dense"] * 2, "linear_head_dim": 8, "linear_num_heads": 4},
        modeling_kimi_linear,
        "chunk_kimi_delta_attention",
        64,
    ),
    "granitemoehybrid": (
        {"num_local_experts": 0, "shared_intermediate_size": 48, "mamba_n_heads": 8, "mamba_chunk_size": 32},
        modeling_granitemoehybrid,
        "mamba2_chunk_scan",
        32,
    ),
}
PROMPT = torch.arange(1, 12)[None]
# Two branches of which the first is kept to its middle, the second to its end.
NODES, PARENTS = [[3, 4, 5, 6, 7, 8]], [[0, 0, 1, 2, 0, 4]]


@pytest.mark.parametrize("model_type", SCANS)
def test_chunks_are_as_long_as_a_tree_is_deep_and_stocks_for_prompts(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, module, name, of_stock = SCANS[model_type]
    torch.manual_seed(0)
    target = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SIZES | config)).eval()
    scan: Callable[..., Any] = getattr(module, name)
    read: list[int] = []

    def noted(*args: Any, **keywords: Any) -> Any:
        read.append(keywords.get("chunk_size", 64))
        return scan(*args, **keywords)

    monkeypatch.setattr(module, name, noted)
    tree = DraftTree.from_parents(torch.tensor(NODES), torch.tensor(PARENTS))
    with torch.no_grad(), TreeVerifier.of(target, PROMPT.shape[1]) as verifier:
        verifier.prefill(PROMPT)
        verifier.verify(tree)
        verifier.keep(torch.tensor([[0, 1, 2]]), [[0, 1, 2]])
        verifier.verify(tree)
        verifier.keep(torch.tensor([[0, 4]]), [[0, 4]])
    assert read == [of_stock, 4, 4], "the prompt, and a tree each; what is kept is not scanned again"
    assert all(getattr(mixer, "chunk_size", of_stock) == of_stock for mixer in known_mixers(target).values())


@pytest.mark.parametrize("model_type", SCANS)
def test_scans_are_noted_while_calls_decode_and_stocks_afterwards(model_type: str) -> None:
    config, module, name, _ = SCANS[model_type]
    target = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SIZES | config))
    mixers, of_stock = known_mixers(target).values(), getattr(module, name)
    with pytest.raises(ZeroDivisionError), NotedScans(mixers):
        with NotedScans(mixers):
            noted = getattr(module, name)
        assert noted is getattr(module, name) is not of_stock
        raise ZeroDivisionError
    assert getattr(module, name) is of_stock


def test_a_mixer_whose_forward_was_replaced_is_refused_by_name() -> None:
    target = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_5_text", **SIZES | SCANS["qwen3_5_text"][0]))
    tree = DraftTree.from_parents(torch.tensor(NODES), torch.tensor(PARENTS))
    (mixer,) = known_mixers(target).values()
    with torch.no_grad(), TreeVerifier.of(target.eval(), PROMPT.shape[1]) as verifier:
        verifier.prefill(PROMPT)
        mixer.forward = lambda hidden_states, **_: hidden_states
        with pytest.raises(ValueError, match="A `Qwen3_5GatedDeltaNet` read a tree without the scan"):
            verifier.verify(tree)


def test_a_mixer_whose_forward_was_replaced_is_refused_by_its_layer_where_trees_are_read_whole() -> None:
    target = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_5_text", **SIZES | SCANS["qwen3_5_text"][0]))
    tree, forward = DraftTree.from_parents(torch.tensor(NODES), torch.tensor(PARENTS)), TargetForward.of(target.eval())
    (mixer,) = known_mixers(target).values()
    with torch.no_grad(), HybridVerifier(forward, None, torch.arange(PROMPT.shape[1])[None]) as verifier:
        verifier.prefill(PROMPT)
        mixer.forward = lambda hidden_states, **_: hidden_states
        with pytest.raises(ValueError, match="layer 0 read a tree without the functions of its modelling file"):
            verifier.verify(tree)
    with torch.no_grad(), pytest.raises(ValueError, match="layer 0 has kept no state of the prompt, so its forward"):
        HybridVerifier(TargetForward.of(target), None, torch.arange(PROMPT.shape[1])[None]).prefill(PROMPT)


class Mixer:
    """The settings of a Mamba-2 mixer."""

    def __init__(self) -> None:
        self.time_step_limit, self.chunk_size, self.A_log = (0.1, 0.3), 256, torch.zeros(1)


def test_a_limit_holds_for_every_thread_but_the_one_that_reads_a_tree_however_it_is_asked_for() -> None:
    mixer, none = Mixer(), (0.0, float("inf"))
    limit: Any = mixer.time_step_limit

    def seen() -> list[tuple[float, ...]]:
        limit = mixer.time_step_limit
        least, most = limit
        return [tuple(limit), (limit[0], limit[-1]), (least, most), limit[:2]]

    with ScanSettings([mixer]) as settings, ThreadPoolExecutor(1) as other:
        with settings.of_tree(4):
            assert seen() == [none] * 4
            assert other.submit(seen).result() == [limit] * 4
        assert seen() == [limit] * 4
    assert mixer.time_step_limit is limit and mixer.chunk_size == 256
