"""What reading a tree asks of the pretend device inside the recurrent layers of a hybrid target."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any
from unittest.mock import patch

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.granitemoehybrid import modeling_granitemoehybrid
from transformers.models.qwen3_5 import modeling_qwen3_5

from transformers_resps.tree import DraftTree
from transformers_resps.verifying.forward import TargetForward
from transformers_resps.verifying.growing import GrowingMode

from .counting import Count
from .device import move, on_device


_SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
_LAYERS = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
_MIXER_COUNT = 3
# Per type: its config, its mixer, and the functions for which kernels exist; here they come apart.
TARGETS: dict[str, tuple[dict[str, Any], Any, tuple[str, ...]]] = {
    "qwen3_5_text": (
        dict.fromkeys(("linear_num_value_heads", "linear_num_key_heads"), 4)
        | dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
        modeling_qwen3_5.Qwen3_5GatedDeltaNet,
        (
            "causal_conv1d_fn",
            "causal_conv1d_update",
            "torch_chunk_gated_delta_rule",
            "torch_recurrent_gated_delta_rule",
        ),
    ),
    "granitemoehybrid": (
        {
            "num_local_experts": 0,
            "shared_intermediate_size": 48,
            "mamba_n_heads": 8,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
        },
        modeling_granitemoehybrid.GraniteMoeHybridMambaLayer,
        ("causal_conv1d_fn", "causal_conv1d_update", "mamba2_chunk_scan", "mamba2_selective_state_update"),
    ),
}
# Parents of the nodes, and the accepted ones.
TREES = {
    "plain": ([0], [0]),
    "chain": ([0, 0, 1, 2, 3], [0, 1, 2]),
    "whole chain": ([0, 0, 1, 2, 3], [0, 1, 2, 3, 4]),
    "tree": ([0, 0, 0, 1, 1, 2], [0, 2]),
    "whole leaf of a tree": ([0, 0, 0, 1, 1, 2], [0, 2, 5]),
}


@dataclass(frozen=True)
class Asked:
    """What reading a tree, or keeping its accepted nodes, asks the device for.

    Attributes:
        own: kernels per mixer where real kernels compute what has one; a tree is read without them.
        fallback: kernels per mixer that stand for those here.
        beside: kernels beside the mixers, over all of the target where it is read.
        waits: host synchronisations.
    """

    own: float
    fallback: float
    beside: int
    waits: int


def asked(model_type: str) -> dict[str, dict[str, Any]]:
    """For each of `TREES` what reading it asks of a target, and what keeping its accepted nodes: `Asked` as dicts."""
    config, mixer, fused = TARGETS[model_type]
    torch.manual_seed(0)
    kinds = {"layer_types": _LAYERS, "num_hidden_layers": len(_LAYERS), "num_key_value_heads": 2}
    target: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **_SIZES, **kinds, **config))
    move(target.requires_grad_(False).train(False))
    found, count = dict[str, dict[str, Any]](), Count()
    with torch.no_grad(), count, _regions(count, mixer, fused):
        for name, (parents, path) in TREES.items():
            found[name] = dict(zip(("verify", "keep"), _asked(target, count, parents, path), strict=True))
    return found


def _asked(target: PreTrainedModel, count: Count, parents: list[int], path: list[int]) -> Iterator[dict[str, Any]]:
    ids = on_device(torch.arange(1, 9)[None])
    tree = _moved(DraftTree.from_parents(torch.arange(len(parents))[None], torch.tensor([parents])))
    kept = on_device(torch.tensor([path]))
    positions = torch.arange(ids.shape[1], device=target.device)[None]
    with GrowingMode().verifier(TargetForward.of(target), positions) as verifier:
        verifier.prefill(ids)
        for act in (lambda: verifier.verify(tree), lambda: verifier.keep(kept, [path])):
            count.kernels.clear()
            count.waits.clear()
            act()
            yield asdict(_summed(count))


def _moved(tree: DraftTree) -> DraftTree:
    tensors = tree.tokens, tree.parents, tree.depths, tree.ancestors, tree.scores
    tokens, parents, depths, ancestors, scores = map(on_device, tensors)
    return DraftTree(tokens, parents, depths, ancestors, scores, tree.level_count)


def _summed(count: Count) -> Asked:
    own, fallback = (count.kernels[region] / _MIXER_COUNT for region in ("mixer", "fallback"))
    return Asked(own, fallback, count.kernels["step"], sum(count.waits.values()))


@contextmanager
def _regions(count: Count, mixer: Any, fused: tuple[str, ...]) -> Iterator[None]:
    """Inside, a mixer and what has a kernel count apart."""

    def booked(function: Callable[..., Any], region: str, launches: int = 0) -> Callable[..., Any]:
        def run(*args: Any, **keywords: Any) -> Any:
            before = count.enter_region(region)
            count.kernels[before] += launches
            try:
                return function(*args, **keywords)
            finally:
                count.enter_region(before)

        return run

    module = __import__(mixer.__module__, fromlist=["_"])
    with ExitStack() as stack:
        for name in fused:
            stack.enter_context(patch.object(module, name, booked(getattr(module, name), "fallback", 1)))
        stack.enter_context(patch.object(mixer, "forward", booked(mixer.forward, "mixer")))
        yield
