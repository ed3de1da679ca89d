"""Mixtures of experts in which the result of a token does not depend on the tokens beside it.

How many tokens of a forward go to an expert depends on all of them, and a product over other rows may round in another
way. Here the rows of an expert are filled up to a number that rounds alike, and a token adds the results of its
experts in its own order. Transformers' modules of experts, which look up their function at each forward, are served.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial, reduce
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.moe import ExpertsInterface


_ENDS_OF_NAMES = ("Experts", "MoE", "Moe", "MoA", "MoEBlock", "MoeBlock")  # of classes that mix experts


@torch.library.custom_op("resps::multiply_segments", mutates_args=())
def multiply_segments(rows: Tensor, weights: Tensor, ends: Tensor, least: int) -> Tensor:
    """Multiply each segment of rows by its own weight. One operator, so that compiled code need not know the segments.

    Args:
        rows: `[s, i]`, the segments in order.
        weights: `[experts, i, o]`.
        ends: `[experts]` where each segment ends.
        least: rows of a product, or a multiple of them. A segment that has fewer is multiplied with rows beside it,
            whose results are dropped.

    Returns:
        `[s, o]`, in memory of its own.
    """
    padded = functional.pad(rows, (0, 0, 0, -len(rows) % least))
    products, start = [rows.new_empty(0, weights.shape[2])], 0
    for expert, end in enumerate(ends.tolist()):
        if start < end:
            count = -(-(end - start) // least) * least
            first = min(start, len(padded) - count)
            product = padded[first : first + count] @ weights[expert]
            products.append(product[start - first : end - first])
        start = end
    return torch.cat(products)


@multiply_segments.register_fake
def _(rows: Tensor, weights: Tensor, ends: Tensor, least: int) -> Tensor:
    return rows.new_empty(rows.shape[0], weights.shape[2])


def invariant_experts(
    experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *, least: int
) -> Tensor:
    """What a module of experts computes, as Transformers' implementations of it up to rounding.

    Args:
        experts: decorated with Transformers' `use_experts_implementation`.
        hidden_states: `[n, h]`, as the result.
        top_k_index: `[n, k]` the experts of each token.
        top_k_weights: `[n, k]` what their results count.
        least: rows of a product, or a multiple of them, that round alike.
    """
    chosen = top_k_index.flatten()
    order = chosen.argsort(stable=True)
    owners = chosen[order]
    ends = torch.searchsorted(owners, torch.arange(experts.num_experts, device=owners.device), right=True)

    def projected(rows: Tensor, name: str) -> Tensor:
        weights = getattr(experts, name)
        product: Tensor = multiply_segments(
            rows, weights if experts.is_transposed else weights.transpose(1, 2), ends, least
        )
        return product + getattr(experts, f"{name}_bias")[owners] if experts.has_bias else product

    rows = hidden_states[order // top_k_index.shape[1]]
    if experts.has_gate:
        rows = experts._apply_gate(projected(rows, "gate_up_proj"))
    else:
        rows = experts.act_fn(projected(rows, "up_proj"))
    rows = projected(rows, "down_proj")
    if getattr(experts, "has_post_expert_norm", False):  # not in the first releases that we support
        rows = experts.post_expert_norm(rows)
    results = rows[order.argsort()].unflatten(0, top_k_index.shape) * top_k_weights[..., None]
    # One after the other: how `sum` groups its terms is its own affair.
    total: Tensor = reduce(torch.add, results.to(torch.promote_types(results.dtype, torch.float32)).unbind(1))
    return total.to(hidden_states.dtype)


@contextmanager
def use_invariant_experts(target: PreTrainedModel, least: int) -> Iterator[None]:
    """Inside, `target` computes its experts by `invariant_experts`; without experts it computes as ever.

    As in `use_gqa_attention` the name changes for one forward, and calls in other threads may see either name.

    Args:
        target: for which `has_invariant_experts` holds.
        least: see `invariant_experts`.
    """
    config, name = target.config.get_text_config(decoder=True), f"resps_invariant_{least}"
    ExpertsInterface.register(name, partial(invariant_experts, least=least))
    chosen = config._experts_implementation
    config._experts_implementation = name
    try:
        yield
    finally:
        if config._experts_implementation == name:  # not if another one was chosen meanwhile
            config._experts_implementation = chosen


def has_invariant_experts(target: PreTrainedModel) -> bool:
    """Whether `use_invariant_experts` reaches all experts of `target`: none are left out that are quantized, spread
    over machines, or of a class that multiplies in a way of its own. True without experts.
    """
    config = target.config.get_text_config(decoder=True)
    mixtures = (module for module in target.modules() if type(module).__name__.endswith(_ENDS_OF_NAMES))
    return all(any(_is_served(part, config) for part in module.modules()) for module in mixtures)


def routed_layers(target: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """What mixtures of experts compute of each row, one expert of each: names and layers `[b, m, in_features]` ->
    `[b, m, out_features]`, for whoever asks how a layer rounds. Routers that are `nn.Linear` are not among them.
    """
    config = target.config.get_text_config(decoder=True)
    for prefix, block in target.named_modules():
        parts = dict(block.named_children())
        if any(_is_served(part, config) for part in parts.values()):
            for name, part in parts.items():
                weight = getattr(part, "weight", None)
                if _is_served(part, config):
                    yield f"{prefix}.{name}", _Expert(part)
                elif isinstance(weight, Tensor) and weight.dim() == 2 and not isinstance(part, nn.Linear):
                    yield f"{prefix}.{name}", _Router(part, block)


class _Expert(nn.Module):
    """The first expert of a module."""

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.experts = experts
        self.in_features = self.out_features = experts.down_proj.shape[2 if experts.is_transposed else 1]

    def forward(self, states: Tensor) -> Tensor:
        rows = states.flatten(0, 1)
        chosen = torch.zeros(len(rows), 1, dtype=torch.long, device=rows.device)
        return invariant_experts(self.experts, rows, chosen, rows.new_ones(len(rows), 1), least=1).view_as(states)


class _Router(nn.Module):
    """Scores and weights of all experts or of those chosen, one after the other."""

    def __init__(self, router: Any, block: nn.Module) -> None:
        super().__init__()
        self.router = router
        self.out_features, self.in_features = router.weight.shape
        _, *others = signature(router.forward).parameters.values()
        asked = [each.name for each in others if each.default is each.empty]  # biases, which some blocks keep
        self._given = {name: getattr(block, name) for name in asked}

    def forward(self, states: Tensor) -> Tensor:
        found = self.router.forward(states.flatten(0, 1), **self._given)
        parts: tuple[Tensor, ...] = (found,) if isinstance(found, Tensor) else found
        joined = torch.cat([part.double() for part in parts], dim=-1)
        return joined.view(*states.shape[:2], -1)


def _is_served(module: Any, config: PreTrainedConfig) -> bool:
    """Whether a module asks the interface, by the name in `config`, and multiplies weights as they are."""
    if not (hasattr(module, "is_transposed") and hasattr(module, "has_gate")) or module.config is not config:
        return False
    is_whole: bool = module.down_proj.dtype.itemsize > 1  # quantized weights have one byte at most
    return is_whole and not getattr(module, "_is_expert_parallel", False)
