"""Mixtures of experts in which the result of a token does not depend on the tokens beside it.

How many tokens of a forward go to an expert depends on all of them, and with so few rows a product may round in
another way (exact.md 1). Here an expert multiplies at least `least` rows, and a token adds the results of its experts
in its own order. Transformers' experts are served, which look up their function at each forward; Megatron-LM pads the
rows of experts for the same reason.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor
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
        least: rows of a product. A shorter segment is multiplied with rows beside it, whose results are dropped.

    Returns:
        `[s, o]`, in memory of its own.
    """
    padded = functional.pad(rows, (0, 0, 0, max(least - len(rows), 0)))
    last = len(padded) - least  # where a product can start at most
    products, start = [rows.new_empty(0, weights.shape[2])], 0
    for expert, end in enumerate(ends.tolist()):
        if start < end:
            first = min(start, last)
            product = padded[first : max(end, first + least)] @ weights[expert]
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
        least: rows of a product from which on all numbers of rows round alike.
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


def expert_weights(target: PreTrainedModel) -> Iterator[Tensor]:
    """By what the experts multiply their rows, `[i, o]`: those of the first expert of each module."""
    config = target.config.get_text_config(decoder=True)
    for module in target.modules():
        if _is_served(module, config):
            experts: Any = module
            for weights in (experts.gate_up_proj if experts.has_gate else experts.up_proj, experts.down_proj):
                yield weights[0] if experts.is_transposed else weights[0].t()


def _is_served(module: Any, config: PreTrainedConfig) -> bool:
    """Whether a module asks the interface, by the name in `config`, and multiplies weights as they are."""
    if not (hasattr(module, "is_transposed") and hasattr(module, "has_gate")) or module.config is not config:
        return False
    is_whole: bool = module.down_proj.dtype.itemsize > 1  # quantized weights have one byte at most
    return is_whole and not getattr(module, "_is_expert_parallel", False)
