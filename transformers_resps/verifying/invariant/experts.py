"""Compute mixtures of experts so that a token's result does not depend on the other tokens of a forward.

The other tokens decide how many rows an expert gets, and another number of rows may round differently. Here each
expert's rows are padded to a number of rows that rounds each row alike, and the results of a token's experts are added
in the token's own order. Transformers' expert modules look up their function at each forward, so we can replace it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, reduce
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.moe import ExpertsInterface
from transformers.modeling_layers import GradientCheckpointingLayer

from ..lending import Change, lent


_ENDS_OF_NAMES = ("Experts", "MoE", "Moe", "MoA", "MoEBlock", "MoeBlock")  # endings of class names of mixtures


@torch.library.custom_op("resps::multiply_segments", mutates_args=())
def multiply_segments(rows: Tensor, weights: Tensor, ends: Tensor, least: int) -> Tensor:
    """Multiply each expert's segment of `rows` `[s, i]` by its matrix in `weights` `[experts, i, o]`: `[s, o]`.

    This is one operator, so that compiled code need not know the segments. `ends` `[experts]` are the ends of the
    segments, in order. Each product has a multiple of `least` rows: adjacent rows fill up a segment, and their results
    are dropped.
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
    """Compute the experts of a class decorated by `use_experts_implementation`, like Transformers up to rounding.

    `hidden_states` and the result are `[n, h]`. `top_k_index` and `top_k_weights` `[n, k]` are each token's k
    experts and their weights. Matrix products with a multiple of `least` rows round each row alike.
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
    if getattr(experts, "has_post_expert_norm", False):  # only in later releases
        rows = experts.post_expert_norm(rows)
    results = rows[order.argsort()].unflatten(0, top_k_index.shape) * top_k_weights[..., None]
    # One after the other: `sum` may group its terms by the number of rows.
    total: Tensor = reduce(torch.add, results.to(torch.promote_types(results.dtype, torch.float32)).unbind(1))
    return total.to(hidden_states.dtype)


@contextmanager
def use_invariant_experts(target: PreTrainedModel, least: int) -> Iterator[None]:
    """Let the target, in all threads, compute its experts by `invariant_experts` inside a `with` block."""
    config, name = target.config.get_text_config(decoder=True), f"resps_invariant_{least}"
    ExpertsInterface.register(name, partial(invariant_experts, least=least))
    with lent.holding(Change(config, "_experts_implementation", lambda own: name)):
        yield


def has_invariant_experts(target: PreTrainedModel) -> bool:
    """Whether `use_invariant_experts` works for all experts of `target`; true without experts.

    It does not work for experts that are quantized, spread over machines, or of a class with its own multiplication.
    """
    config = target.config.get_text_config(decoder=True)
    mixtures = (module for module in target.modules() if type(module).__name__.endswith(_ENDS_OF_NAMES))
    return all(any(_is_served(part, config) for part in module.modules()) for module in mixtures)


class RoutedLayer(nn.Module):
    """Wraps `run`, a part of a mixture of experts, as a layer `[..., in_features]` -> `[..., out_features]`.

    `run` takes rows `[m, in_features]`, and multiplies them by `weight` `[out_features, in_features]` if there is one.
    """

    bias = None

    def __init__(self, run: Callable[[Tensor], Any], sizes: tuple[int, int], weight: Tensor | None = None) -> None:
        super().__init__()
        self._run, self.weight = run, None if weight is None else weight.detach()
        self.in_features, self.out_features = sizes

    def forward(self, states: Tensor) -> Tensor:
        results = self._run(states.flatten(0, -2))
        parts = [part for part in ([results] if isinstance(results, Tensor) else results) if part.is_floating_point()]
        joined = torch.cat(parts, dim=-1)
        return joined.view(*states.shape[:-1], -1)


def routed_layers(target: PreTrainedModel, least: int) -> Iterator[tuple[str, RoutedLayer]]:
    """Yield name and layer for each part of the target's mixtures of experts, so that `RowClasses` tries its kernel.

    The parts are the products and the activation of one expert, each router that is no linear layer, and the whole
    mixture. The mixture is computed with products of `least` rows.
    """
    config = target.config.get_text_config(decoder=True)
    for prefix, block in target.named_modules():
        parts = dict(block.named_children())
        if not any(_is_served(part, config) for part in parts.values()):
            continue
        for name, part in parts.items():
            weight = getattr(part, "weight", None)
            if _is_served(part, config):
                yield from ((f"{prefix}.{name}", layer) for layer in _of_expert(part))
            elif isinstance(weight, Tensor) and weight.dim() == 2 and not isinstance(part, nn.Linear):
                yield f"{prefix}.{name}", RoutedLayer(_router(part, block), (weight.shape[1], weight.shape[0]), weight)
        if not isinstance(block, GradientCheckpointingLayer):  # a decoder layer has attention, too
            yield prefix, RoutedLayer(_mixture(block, target, least), (config.hidden_size, config.hidden_size))


def _of_expert(experts: Any) -> Iterator[RoutedLayer]:
    """Yield the matrix products and the activation of the first expert; the others have the same sizes."""
    raised = experts.gate_up_proj if experts.has_gate else experts.up_proj
    for weights in (raised, experts.down_proj):
        weight = weights[0].detach() if experts.is_transposed else weights[0].detach().t()
        yield RoutedLayer(partial(torch.matmul, other=weight), tuple(weight.shape), weight.t())
    activation = experts._apply_gate if experts.has_gate else experts.act_fn
    inner = experts.down_proj.shape[1 if experts.is_transposed else 2]
    yield RoutedLayer(activation, (2 * inner if experts.has_gate else inner, inner))


def _router(router: Any, block: nn.Module) -> Callable[[Tensor], Any]:
    _, *others = signature(router.forward).parameters.values()
    asked = [each.name for each in others if each.default is each.empty]  # biases, which some mixtures own
    return partial(router.forward, **{name: getattr(block, name) for name in asked})


def _mixture(block: Any, target: PreTrainedModel, least: int) -> Callable[[Tensor], Any]:
    def run(rows: Tensor) -> Any:
        with use_invariant_experts(target, least):
            mixed = block.forward(rows[None])
        return (mixed if isinstance(mixed, Tensor) else mixed[0])[0]

    return run


def _is_served(module: Any, config: PreTrainedConfig) -> bool:
    """Whether `module` holds experts that look up their function in `config`, and all weights, not quantized."""
    if not (hasattr(module, "is_transposed") and hasattr(module, "has_gate")) or module.config is not config:
        return False
    is_whole: bool = module.down_proj.dtype.itemsize > 1  # quantized weights have one byte at most
    return is_whole and not getattr(module, "_is_expert_parallel", False)
