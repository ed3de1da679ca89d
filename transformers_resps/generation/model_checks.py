"""The errors for models that would compute something else for a tree than for plain decoding."""

import inspect
from collections.abc import Sequence

from torch import Tensor
from torch.nn import Dropout, Module
from transformers import PreTrainedModel

from ..target.gqa_attention import GROUPED, STOCK
from ..target.known_mixers import RECURRENT_KINDS, layer_kinds, recurrence_obstacle


# "mlp" and "moe" are layers without attention.
_LAYER_KINDS = RECURRENT_KINDS | {"full_attention", "sliding_attention", "hybrid", "mlp", "moe"}

# Layers that round what they read: by module (`torch.ao.quantization.quantize_dynamic`) and by name.
_ROUNDING_MODULE = "torch.ao.nn.quantized.dynamic"
_ROUNDING_LAYERS = frozenset(
    ("Linear8bitLt", "FP8Linear", "FbgemmFp8Linear", "CompressedTensorsFP8Linear", "NVFP4Linear")
    + ("BitLinear", "AutoBitLinear")
)
# Of torchao's weights: they say how the layer rounds its input, and are `None` where it does not.
_ROUNDING_MARKS = ("act_quant_kwargs", "activation_quantization", "input_quant_func")


def check_model(model: PreTrainedModel) -> None:
    """Refuse a target whose architecture or attention cannot verify a draft tree.

    Raises:
        ValueError: names the architecture and the reason.
    """
    config = model.config.get_text_config()
    name = f"{type(model).__name__} ({config.model_type})"
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"{name} is an encoder-decoder, but draft trees need a decoder-only model. Call `generate` without a head "
            "and a policy."
        )
    wrapper = getattr(vars(model).get("prepare_inputs_for_generation"), "__self__", None)
    if getattr(getattr(wrapper, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError(
            f"{name} puts virtual tokens of a PEFT adapter before the prompt, but a tree's forward takes tokens only. "
            "Disable the adapter, or call `generate` without a head and a policy."
        )
    reason = _architecture_reason(model)
    if reason is not None:
        raise ValueError(
            f"{name} {reason}, so it cannot verify sibling nodes in one forward. Call `generate` without a head and a "
            "policy, or with `prompt_lookup_num_tokens` if the model supports it."
        )
    _check_layers(model, name)
    check_draws(model)
    attention = config._attn_implementation
    if attention not in (STOCK, GROUPED, "eager"):
        raise ValueError(
            f"{name} runs with attn_implementation={attention!r}, but draft trees need 'sdpa' or 'eager'. Call "
            "`model.set_attn_implementation('sdpa')` first."
        )


def check_draws(model: Module) -> None:
    """Refuse a target or a head that draws random numbers in its forwards: a tree would draw others.

    Raises:
        ValueError: names the layer.
    """
    for module in model.modules():
        if module.training and _draws(module):
            raise ValueError(
                f"{type(model).__name__} is in training mode, where its layer `{_path(model, module)}` draws random "
                "numbers, and a tree would draw others. Call `.eval()` on the target and the head, or while a trainer "
                "runs `attach(model, ..., eval_mode=True)`."
            )


def _architecture_reason(model: PreTrainedModel) -> str | None:
    config = model.config.get_text_config()
    obstacle = recurrence_obstacle(model)
    if obstacle is not None:
        return obstacle
    if getattr(config, "alibi", False) or config.model_type in ("bloom", "mpt"):
        return "encodes positions by cache slot (alibi)"
    if "local" in (getattr(config, "attention_layers", None) or ()):
        return "counts the window of its local layers in cache slots"
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return "takes no `position_ids`"
    odd = layer_kinds(model) - _LAYER_KINDS
    if odd:
        return f"has layers of the kind {sorted(odd)}"
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {rope.get("rope_type")} | {part.get("rope_type") for part in rope.values() if isinstance(part, dict)}
    if "dynamic" in kinds:
        return "rescales all rotary positions as the text grows (rope_type 'dynamic')"
    return None


def _check_layers(model: Module, name: str) -> None:
    """Refuse weights that are not there, and layers whose output for a node depends on the other nodes."""
    for module in model.modules():  # without their names, which take three times as long
        weights = [weight for weight in module._parameters.values() if weight is not None]
        if any(weight.is_meta for weight in weights) and not hasattr(module, "_hf_hook"):
            raise ValueError(
                f"{name} has no weights in `{_path(model, module)}`, which is on the meta device. Load the model with "
                "`from_pretrained`; its `device_map` offloads weights with hooks."
            )
        if _rounds_activations(module, weights):
            raise ValueError(
                f"{name} has the layer `{_path(model, module)}` of {type(module).__module__}, which rounds "
                "activations to few bits, so a tree would change the output. Quantize only the weights, for example "
                "with torchao's `Int8WeightOnlyConfig`, or call `generate` without a head and a policy."
            )


def _draws(module: Module) -> bool:
    """Whether a layer in training has dropout, layerdrop or jitter: often a number, as `attention_dropout` is."""
    if isinstance(module, Dropout):
        return module.p > 0
    return any(
        ("drop" in name or "jitter" in name) and isinstance(value, float) and value > 0
        for name, value in vars(module).items()
    )


def _path(model: Module, module: Module) -> str:
    path: str = next(path for path, found in model.named_modules() if found is module)
    return path


def _rounds_activations(module: Module, weights: Sequence[Tensor]) -> bool:
    """Whether a quantized layer quantizes what it reads, too.

    Even with a scale of its own a row of a tree then ends a step away from the same row alone (torchao's `PerRow`: one
    text of eight parted in float32). Told by names, so that no library has to be imported: torch 2.13, torchao 0.18,
    bitsandbytes 0.50 and the layers of Transformers 5.24.
    """
    kind = type(module)
    if kind.__module__.startswith(_ROUNDING_MODULE) or kind.__name__ in _ROUNDING_LAYERS:
        return True
    return any(getattr(weight, mark, None) is not None for weight in weights for mark in _ROUNDING_MARKS)
