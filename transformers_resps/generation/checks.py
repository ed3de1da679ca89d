"""Raise for settings, inputs and models that draft trees do not support, and say what to do instead.

With an assistant, the `generate` of Transformers ignores or misreads most of these settings.
"""

import inspect
import os
import sys
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Dropout, Linear, Module
from transformers import (
    Cache,
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
    StaticCache,
)
from transformers.generation.candidate_generator import CandidateGenerator
from transformers.generation.utils import MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL

from ..compat import CACHE_KEYWORD, unwrapped
from ..compilation.engine import described
from ..compilation.few_bits import ROUNDING_MARKS
from ..drafting import DraftSource
from ..drafting.continuations import LONGEST_DRAFT
from ..policies.base import Policy
from ..tree import TreeShape
from ..verifying.attention import is_flash
from ..verifying.cache import cached_length, check_cache, given_cache, window_of
from ..verifying.forward import is_compiled
from ..verifying.hybrids import is_recurrent, recurrence_obstacle
from ..verifying.invariant.attention import LENT
from ..verifying.masks import longrope_boundary, unknown_layer_types
from .keywords import AUTO, PLAIN, Keywords, is_name


# Setting -> function that says whether a value is unsupported.
_SETTINGS: dict[str, Callable[[Any], bool]] = {
    "num_beams": lambda value: value > 1,
    "num_beam_groups": lambda value: value > 1,
    **dict.fromkeys(("constraints", "force_words_ids", "penalty_alpha", "dola_layers", "token_healing"), bool),
    **dict.fromkeys(("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp", "speculation_type"), bool),
    **dict.fromkeys(("assistant_ensemble_weight", "output_attentions", "output_hidden_states"), bool),
    "return_token_timestamps": bool,
    "prefill_chunk_size": lambda value: value < 0,
}
_WAYS_OUT = {
    "num_beams": "Set `num_beams=1`, for greedy search or sampling",
    "output_hidden_states": "Get them from a plain call, since the head reads them itself",
}
_ARGUMENTS = ("assistant_tokenizer", "custom_generate", "synced_gpus")
# Arguments that shape the drafts of Transformers' assistants. A checkpoint's generation config may have them, too.
_DRAFTING = ("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold")
# Arguments of an encoder-decoder, used after its encoder has run.
_ENCODED = {"encoder_outputs", "decoder_input_ids", "decoder_attention_mask", "decoder_position_ids"}
_CARRIED = {"attention_mask", "position_ids", "use_cache", "logits_to_keep", CACHE_KEYWORD}
# Arguments that change no token: Transformers passes no `labels` to the model, and drops router logits.
NEVER_READ = frozenset(("labels", "output_router_logits"))
# Arguments for a prompt's images, videos, sounds and embeddings. Transformers passes none of them for new
# tokens.
PROMPT_ARGUMENTS = frozenset(MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL).union(
    ("audio_feature_lengths", "batch_num_images", "feature_attention_mask", "image_grid_hws", "image_grid_thw"),
    ("image_merge_sizes", "image_position_ids", "inputs_embeds", "mm_token_type_ids", "moe_mm_token_type_ids"),
    ("second_per_grid_ts", "spatial_shapes", "token_type_ids", "use_audio_in_video", "video_grid_thw"),
    ("video_merge_sizes", "video_position_ids", "video_second_per_grid"),
)
_LONGEST_REPR = 80  # characters of a wrong argument in a message
_MEDIA = ("image", "video", "audio", "vision")
# The subset of `PROMPT_ARGUMENTS` that holds the images, videos and sounds themselves.
_PIXELS = tuple(
    name for name in sorted(PROMPT_ARGUMENTS) if name.startswith(("pixel_values", "input_features", "input_values"))
)
_QUANTIZING = {"torchao", "bitsandbytes"}
# Layers that round their input: the module of `torch.ao.quantization.quantize_dynamic`, and names of classes.
_ROUNDING_MODULE = "torch.ao.nn.quantized.dynamic"
_ROUNDING_LAYERS = frozenset(
    ("Linear8bitLt", "FP8Linear", "FbgemmFp8Linear", "CompressedTensorsFP8Linear", "NVFP4Linear")
    + ("BitLinear", "AutoBitLinear")
)
# `model_type` of encoder-decoders that override `prepare_inputs_for_generation` without effect on a decoding step.
_PREPARE_AS_STOCK = ("whisper", "canary", "cohere_asr")
_ENCODER_DECODER_INPUTS = {"decoder_input_ids", "decoder_attention_mask", "encoder_outputs", CACHE_KEYWORD}


# Before Transformers prepares the call: keywords, settings, inputs


def check_prompts(prompts: Any) -> None:
    """Raise if the caller passed a text, or a tokenizer's whole output, instead of token ids."""
    if isinstance(prompts, str) or (isinstance(prompts, list) and any(isinstance(one, str) for one in prompts)):
        text = prompts if isinstance(prompts, str) else prompts[0]
        raise ValueError(
            f"Got the text {text[:40]!r} as a prompt, but `generate` reads token ids. Tokenise it: "
            "`inputs = tokenizer(text, return_tensors='pt')`, then `model.generate(**inputs)`."
        )
    if isinstance(prompts, Mapping):
        raise ValueError(
            f"Got a {type(prompts).__name__} as a prompt, but `generate` reads its tensors by name. Call "
            "`model.generate(**inputs)`."
        )


def check_keywords(said: Keywords, *, are_defaults: bool = False) -> None:
    """Raise if a keyword has a wrong type or contradicts another; with `are_defaults` they come from `attach`."""
    if are_defaults and said.is_plain:
        raise ValueError("`policy='plain'` is no default: an attached model without defaults decodes plainly.")
    if isinstance(said.assistant_model, list | tuple) and not said.assistants:
        raise ValueError("`assistant_model` is an empty list. Leave it out to draft by lookup alone.")
    for given in said.assistants:
        if not (is_name(given) or isinstance(given, Module | DraftSource | CandidateGenerator)):
            raise ValueError(
                f"`assistant_model` must be a folder, a Hub id, or a loaded model or head, got {_shown(given)}. "
                f"{_instead_of_assistant(given)}"
            )
    for name in ("lockstep", "invariant"):
        value = getattr(said, name)
        if not isinstance(value, bool | None):
            raise ValueError(f"`{name}` must be True, False or None, got {value!r}.")
    if said.compile is not None and not isinstance(said.compile, bool) and said.compile != AUTO:
        raise ValueError(f"`compile` must be True, False, 'auto' or None, got {said.compile!r}.")
    if said.is_plain and said.assistant_model is not None and not said.has_stock_assistant:
        raise ValueError("`policy='plain'` decodes without a draft head. Leave out one of the two.")
    if said.is_plain and said.invariant:
        raise ValueError(
            "`policy='plain'` with `invariant=True` is a contradiction, since stock decoding rounds otherwise. "
            "Leave out the policy for invariant plain decoding."
        )
    _check_policy_keyword(said.policy)


def _check_policy_keyword(policy: Any) -> None:
    is_word = isinstance(policy, str) and policy in (AUTO, PLAIN)
    is_place = is_name(policy) and ("/" in os.fspath(policy) or Path(policy).is_dir())
    if not (policy is None or isinstance(policy, Policy) or is_word or is_place):
        raise ValueError(
            "`policy` must be 'auto', 'plain', a folder, a Hub id (`owner/name`) or an object of a subclass of "
            f"`Policy`, got {_shown(policy)}. {_instead_of_policy(policy)}"
        )


def check_drafter(head: Any) -> None:
    """Raise unless `head`, the argument of a command or function, is a `DraftSource`, model, folder or Hub id."""
    if not (is_name(head) or isinstance(unwrapped(head), DraftSource | PreTrainedModel)):
        raise ValueError(
            "`head` must be what drafts: a loaded draft head, another source or model, or a name, got "
            f"{_shown(head)}. {_instead_of_assistant(head)}"
        )


def _shown(given: Any) -> str:
    """Return a short `repr`, or the name of the type, since models and tokenizers print all they have."""
    told = "" if isinstance(given, Module) else repr(given)
    return told if 0 < len(told) <= _LONGEST_REPR else f"a {type(given).__name__}"


def _instead_of_assistant(given: Any) -> str:
    if isinstance(given, type):
        maker = ".from_pretrained" if hasattr(given, "from_pretrained") else ""
        return f"Pass an object, `{given.__name__}{maker}(...)`, not the class."
    if isinstance(given, str | Policy):  # "auto" or "plain"
        return "Pass it as `policy`, which needs no assistant to draft by lookup."
    if isinstance(given, TreeShape):
        return f"Pass a head, and `policy=FixedPolicy({given!r})`."
    return "Pass `DraftHead.from_pretrained(...)`."


def _instead_of_policy(given: Any) -> str:
    if isinstance(given, TreeShape):
        return f"Pass `FixedPolicy({given!r})`."
    if isinstance(given, int | tuple | list):
        return "For one tree at every step pass `FixedPolicy(TreeShape(8, 3, 3))`."
    if isinstance(given, Module):
        return "Pass it as `assistant_model`."
    if is_name(given):  # such as a mistyped "auto"
        return "Check the word, or the path."
    return "Subclass `transformers_resps.Policy`, write `choose`, and pass an object, not the class."


def check_drafts_trees(model: Any) -> None:
    """Raise if `model`, which is no `DraftSource`, is neither a model nor a candidate generator of Transformers."""
    if not isinstance(model, PreTrainedModel | CandidateGenerator):
        raise ValueError(
            f"Got a policy with assistant_model={type(model).__name__}, but a policy shapes the trees of a draft "
            "head or of a causal model. Pass `assistant_model=DraftHead.from_pretrained(...)`, a model of "
            "`AutoModelForCausalLM`, or leave out `policy`."
        )


def check_effect(keywords: Keywords) -> None:
    """Raise if one of `keywords` would have no effect, because Transformers decodes this call without draft trees."""
    if keywords.lockstep is not None:
        raise ValueError(
            f"Got lockstep={keywords.lockstep!r} without a draft head or a policy, but only draft trees make a batch "
            "ragged. Leave out `lockstep`."
        )
    if keywords.compile:
        raise ValueError(
            f"Got compile={keywords.compile!r} without a draft head or a policy, but only our own steps are compiled. "
            "Pass `policy='auto'`, or `policy=FixedPolicy(TreeShape.plain())` for compiled plain decoding."
        )
    if keywords.invariant:
        raise ValueError(
            "Got invariant=True with an assistant of Transformers' own, whose text depends on what it drafts. Pass "
            "`policy='auto'` as well, so that it drafts trees."
        )


def check_policy(policy: Policy, has_head: bool, has_memory: bool) -> None:
    """Raise if the policy needs a head that the call lacks, or never searches the `SuffixMemory` that the call has."""
    if not has_head and policy.needs_head:
        raise ValueError(
            f"policy={policy!r} shapes the trees of a draft head, and the call has none. Pass "
            "`assistant_model=DraftHead.from_pretrained(...)`, or `policy='auto'` to draft by lookup alone."
        )
    if has_memory and not policy.uses_lookup:
        raise ValueError(
            f"policy={policy!r} asks for no looked-up nodes, and the call has a memory. Pass a shape with "
            "`lookup=8`, `policy='auto'`, or no policy."
        )


def check_sources(sources: Sequence[DraftSource]) -> None:
    """Raise if a source has active dropout, or if sources disagree about `before_deepstack`, see `DraftHeadConfig`."""
    for source in sources:
        for module in source.own_modules:
            _check_draws(module, module.modules())
    if len({source.before_deepstack for source in sources if source.feature_layers}) > 1:
        raise ValueError(
            "One assistant reads hidden states before image features are added to them, another one after. Pass "
            "one of them."
        )


def check_settings(model: PreTrainedModel, config: GenerationConfig | None, arguments: Mapping[str, Any]) -> None:
    """Raise for settings, in the call's `config` or `arguments`, that draft trees do not support."""
    setting = partial(setting_of, arguments=arguments, configs=(config, model.generation_config))
    for name, is_asked in _SETTINGS.items():
        value = setting(name)
        if value is not None and is_asked(value):
            raise _refusal(f"{name}={value!r}", _WAYS_OUT.get(name, f"Leave out `{name}`"))
    for name in _ARGUMENTS:
        if arguments.get(name) is not None and arguments[name] is not False:
            raise _refusal(f"`{name}`", f"Leave out `{name}`")
    for name in _DRAFTING:
        if arguments.get(name) is not None:
            raise ValueError(
                f"Got {name}={arguments[name]!r}, but a policy decides how many tokens are drafted. Leave it out, or "
                "pass `policy=FixedPolicy(TreeShape(n + 1, n, 1))` to draft n tokens at every step."
            )
    if arguments.get("inputs_embeds") is not None and setting("prefill_chunk_size"):
        raise _refusal(
            f"`inputs_embeds` with prefill_chunk_size={setting('prefill_chunk_size')}", "Leave out the chunk size"
        )
    if not arguments.get("use_cache", setting("use_cache") in (None, True)):  # `generate` reads None as False
        raise _refusal(f"use_cache={arguments.get('use_cache', False)!r}", "Set `use_cache=True`")
    implementation = setting("cache_implementation")
    known = (None, "dynamic", "hybrid")  # `generate` ignores "hybrid", an old default of the Hub
    if implementation not in known + (() if model.config.is_encoder_decoder else ("static",)):
        raise _refusal(f"cache_implementation={implementation!r}", "Leave it out")
    _check_user_cache(model, arguments)


def setting_of(name: str, arguments: Mapping[str, Any], configs: Iterable[GenerationConfig | None]) -> Any:
    """Look up a setting in a call's `arguments`, else in the first of `configs` that has it; `None` if none has."""
    given = arguments.get(name), *(getattr(config, name, None) for config in configs)
    return next((value for value in given if value is not None), None)


def _check_user_cache(model: PreTrainedModel, arguments: Mapping[str, Any]) -> None:
    cache = given_cache(arguments)
    if cache is None:
        return
    if model.config.is_encoder_decoder:
        if not isinstance(cache, EncoderDecoderCache):
            raise _refusal(f"a `{type(cache).__name__}` for an encoder-decoder", "Pass an `EncoderDecoderCache`")
        cache = cache.self_attention_cache
    elif isinstance(cache, StaticCache):  # our call uses a dynamic copy
        _check_static_cache(model, cache)
        return
    check_cache(cache)
    made = DynamicCache(config=model.config.get_text_config(decoder=True))
    needed = [window_of(made, index) for index in range(len(made.layers))]
    found = [window_of(cache, index) if index < len(cache.layers) else None for index in range(len(needed))]
    if found != needed:
        raise _refusal(
            f"a cache whose layers have the sliding windows {found} for a target with {needed}",
            "Pass `DynamicCache(config=model.config)`, or no cache",
        )


def _check_static_cache(model: PreTrainedModel, cache: StaticCache) -> None:
    longest = max(length for _, length in _static_layers(cache))
    found, needed = _static_layers(cache), _static_layers(StaticCache(config=model.config, max_cache_len=longest))
    if cache.offloading or found != needed:
        raise _refusal(
            f"a `StaticCache` that is offloaded, or whose layers {found} are not the target's, {needed}",
            f"Pass `StaticCache(config=model.config, max_cache_len={longest})`",
        )


def _static_layers(cache: StaticCache) -> list[tuple[str, int]]:
    layers: list[Any] = [*cache.layers]
    return [(type(layer).__name__, layer.max_cache_len) for layer in layers]


def check_inputs(model: PreTrainedModel, prompts: Tensor | None, arguments: Mapping[str, Any]) -> None:
    """Raise early, before the costly forward over images or sounds, if the model cannot read the inputs."""
    taken = set(inspect.signature(model.forward).parameters) - _SETTINGS.keys()
    _check_known(model, (name for name in taken & arguments.keys() if arguments[name] is not None))
    for name in _PIXELS:
        given = arguments.get(name)
        if isinstance(given, Tensor) and not given.is_floating_point() and "mask" not in name:
            raise ValueError(
                f"`{name}` is a tensor of {given.dtype}, but {type(model).__name__} reads floats. Pass what the "
                "processor returned."
            )
    if arguments.get("inputs_embeds") is not None:
        _check_embeddings(model, arguments["inputs_embeds"], prompts)
    elif prompts is not None:
        _check_placeholders(model, prompts, arguments)


def _check_embeddings(model: PreTrainedModel, embeds: Tensor, prompts: Tensor | None) -> None:
    reader: Any = model.get_encoder() if model.config.is_encoder_decoder else model
    width = reader.config.get_text_config(decoder=True).hidden_size
    if embeds.dim() != 3 or embeds.shape[-1] != width or not embeds.shape[1]:
        raise ValueError(
            f"`inputs_embeds` has the shape {list(embeds.shape)}, but {type(model).__name__} reads `[b, s, {width}]` "
            "with at least one position. Pass what its input embedding returns."
        )
    if prompts is not None and prompts.shape[1] not in (0, embeds.shape[1]) and not model.config.is_encoder_decoder:
        raise ValueError(
            f"Got `input_ids` of {prompts.shape[1]} tokens with `inputs_embeds` of {embeds.shape[1]} positions. Pass "
            "the tokens of all positions, or none."
        )


def _check_placeholders(model: PreTrainedModel, prompts: Tensor, arguments: Mapping[str, Any]) -> None:
    """Raise if the prompt has only placeholder tokens, and the call has no images, videos or sounds."""
    given = {name for name, value in arguments.items() if value is not None}
    known = placeholder_ids(model.config)
    if not known or not given.isdisjoint(("cache", "past_key_values", "mm_encoder_outputs")):
        return
    ids = torch.tensor(sorted(known), dtype=prompts.dtype, device=prompts.device)
    if given.isdisjoint(_PIXELS) and prompts.numel() and bool(torch.isin(prompts, ids).all()):
        raise ValueError(
            f"All tokens of the prompt, {prompts.unique().tolist()}, stand for images, videos or sounds, and the call "
            "has none. Pass what the processor returned, `pixel_values` for example."
        )


# Before Transformers prepares the call: the target


def check_model(model: PreTrainedModel, *, has_head: bool) -> None:
    """Raise if the target cannot verify a tree, or is an encoder-decoder in a call with a head."""
    config = model.config.get_text_config()
    name = f"{type(model).__name__} ({config.model_type})"
    if model.config.is_encoder_decoder:
        _check_encoder_decoder(model, name, has_head=has_head)
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
    modules = list(model.modules())  # without their names, which take three times as long
    _check_layers(model, modules, name)
    _check_draws(model, modules)
    attention = config._attn_implementation
    if attention not in (*LENT, "eager") and not is_flash(attention):
        raise ValueError(
            f"{name} runs with attn_implementation={attention!r}, but draft trees need 'sdpa', 'eager' or "
            "FlashAttention. Call `model.set_attn_implementation('sdpa')` first."
        )
    caps_scores = getattr(config, "attn_logit_softcapping", None) is not None  # sdpa ignores it
    if is_flash(attention) and (caps_scores or not model._supports_sdpa):
        raise ValueError(
            f"{name} runs with attn_implementation={attention!r}, which takes no draft trees, and 'sdpa', which does, "
            "does not support this model. Call `model.set_attn_implementation('eager')` first."
        )


def _check_encoder_decoder(model: PreTrainedModel, name: str, *, has_head: bool) -> None:
    if has_head:
        raise ValueError(
            f"{name} is an encoder-decoder, but a head needs a decoder-only target. Leave out the head and pass "
            "`policy='auto'`, to draft from the source and the text so far."
        )
    reason = _encoder_decoder_reason(model)
    if reason is not None:
        raise ValueError(f"{name} {reason}, so it cannot verify drafts. Call `generate` without a policy.")
    if is_compiled(model):
        raise ValueError(
            f"{name} was compiled, but an encoder-decoder verifies drafts as it is. Use the model as it was before it "
            "was compiled, or call `generate` without a policy."
        )


def _encoder_decoder_reason(model: PreTrainedModel) -> str | None:
    """Return why an encoder-decoder cannot verify drafts, or `None`; only reasons that a trial forward cannot show."""
    config = model.config
    missing = _ENCODER_DECODER_INPUTS - set(inspect.signature(model.forward).parameters)
    if missing:
        return f"takes no {sorted(missing)}"
    preparing = next(kind for kind in type(model).__mro__ if "prepare_inputs_for_generation" in vars(kind))
    if preparing is not GenerationMixin and config.model_type not in _PREPARE_AS_STOCK:
        return "prepares each step in a way of its own"
    if config.model_type == "nllb-moe":
        return "routes all tokens of a forward by the mask of the last one"
    if getattr(config, "expert_capacity", sys.maxsize) <= LONGEST_DRAFT:
        return f"drops tokens of a forward, of which an expert takes {config.expert_capacity}"
    return None


def _architecture_reason(model: PreTrainedModel) -> str | None:
    config = model.config.get_text_config()
    obstacle = recurrence_obstacle(model)
    if obstacle is not None:
        return obstacle
    if getattr(config, "alibi", False) or config.model_type in ("bloom", "mpt"):
        return "encodes positions by cache slot (alibi)"
    if "local" in (getattr(config, "attention_layers", None) or ()):
        return "counts the window of its local layers in cache slots"
    if not model.config.is_encoder_decoder and "position_ids" not in inspect.signature(model.forward).parameters:
        return "takes no `position_ids`"
    odd = unknown_layer_types(model)
    if odd:
        return f"has layers of the kind {sorted(odd)}"
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {rope.get("rope_type")} | {part.get("rope_type") for part in rope.values() if isinstance(part, dict)}
    if "dynamic" in kinds:
        return "rescales all rotary positions as the text grows (rope_type 'dynamic')"
    return None


def _check_layers(model: Module, modules: Iterable[Module], name: str) -> None:
    """Raise if weights are not loaded, or if a layer rounds its input, so that a node depends on unrelated nodes."""
    for module in modules:
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


def check_quantized(model: PreTrainedModel, tried: MutableMapping[Module, torch.dtype]) -> None:
    """Run each quantized layer once on zeros; raise if its library fails or a scale of its weight is not finite.

    `tried` keeps the layers that have run, and the dtype of their input.
    """
    dtype = model.dtype
    for layer in model.modules():
        if not isinstance(layer, Linear) or type(layer.weight).__module__.partition(".")[0] not in _QUANTIZING:
            continue
        if layer.weight.is_meta or tried.get(layer) is dtype:
            continue
        try:
            with torch.no_grad():
                result = layer(torch.zeros(1, layer.in_features, dtype=dtype, device=layer.weight.device))
        except (RuntimeError, AssertionError, ValueError, ImportError) as error:
            fault = f"which does not run in {dtype} ({described(error)})"
        else:
            if bool(result.isfinite().all()):
                tried[layer] = dtype
                continue
            fault = "whose result is not finite, because a scale of its weights is not"
        raise ValueError(
            f"{type(model).__name__} has the quantized layer `{_path(model, layer)}`, {fault}. Load the model anew in "
            "bfloat16, and quantize only layers whose sizes and weights the library can take."
        )


def _rounds_activations(module: Module, weights: Sequence[Tensor]) -> bool:
    """Whether a layer quantizes its input, so that its output for a node depends on the other nodes.

    Compares names of classes and attributes, as in torch 2.13, torchao 0.18, bitsandbytes 0.50 and Transformers 5.24.
    """
    kind = type(module)
    if kind.__module__.startswith(_ROUNDING_MODULE) or kind.__name__ in _ROUNDING_LAYERS:
        return True
    return any(getattr(weight, mark, None) is not None for weight in weights for mark in ROUNDING_MARKS)


def _check_draws(model: Module, modules: Iterable[Module]) -> None:
    for module in modules:
        if module.training and _draws(module):
            raise ValueError(
                f"{type(model).__name__} is in training mode, where its layer `{_path(model, module)}` draws random "
                "numbers, and a tree would draw others. Call `.eval()` on the target and the head, or while a trainer "
                "runs `attach(model, ..., eval_mode=True)`."
            )


def _draws(module: Module) -> bool:
    """Whether a layer draws random numbers: a `Dropout`, or an attribute such as `attention_dropout` above 0."""
    if isinstance(module, Dropout):
        return module.p > 0
    return any(
        ("drop" in name or "jitter" in name) and isinstance(value, float) and value > 0
        for name, value in vars(module).items()
    )


def _path(model: Module, module: Module) -> str:
    path: str = next(path for path, found in model.named_modules() if found is module)
    return path


# After Transformers has prepared the call


def check_synced(synced_gpus: bool | None) -> None:
    """Raise if `synced_gpus` is true: all ranks must then run equally many forwards, and with trees they do not."""
    if synced_gpus:
        raise _refusal(
            "ZeRO-3 or FSDP over several ranks, which must all take the same number of steps", "Decode on one rank"
        )


def check_forward_arguments(target: PreTrainedModel, input_ids: Tensor, model_kwargs: Mapping[str, Any]) -> None:
    """Raise if an argument has a wrong shape, or cannot be used in a tree's forward, like `cross_attention_mask`."""
    _check_known(target, (name for name, value in model_kwargs.items() if value is not None))
    if not target.config.is_encoder_decoder:  # its encoder has read them
        _check_token_types(target, model_kwargs.get("token_type_ids"))
    positions = model_kwargs.get("position_ids")
    if positions is not None and positions.dim() not in ((2, 3) if _has_planes(target) else (2,)):
        raise _refusal(
            f"`position_ids` of {positions.dim()} dimensions",
            "Pass `[b, s]`, one position per token, or leave them out",
        )
    if not input_ids.numel() and model_kwargs.get("inputs_embeds") is None:
        raise ValueError(
            f"Got a prompt of the shape {list(input_ids.shape)}, but each row needs at least one token. Pass one, for "
            "example the tokenizer's `bos_token_id`."
        )
    rows, mask = len(input_ids), model_kwargs.get("attention_mask")
    if positions is None:
        return
    if positions.shape[-2] not in (1, rows) or (mask is not None and mask.shape != (rows, positions.shape[-1])):
        given = f"`position_ids` of shape {list(positions.shape)}"
        if mask is not None:
            given = f"`attention_mask` of shape {list(mask.shape)} and {given}"
        raise ValueError(
            f"Got {given} for {rows} rows. Pass the `attention_mask` that the tokenizer returned with the text, and "
            "`position_ids` of its shape or none."
        )


def _check_known(target: PreTrainedModel, names: Iterable[str]) -> None:
    known = _CARRIED | PROMPT_ARGUMENTS | NEVER_READ | {"input_ids"}
    if target.config.is_encoder_decoder:
        known |= _ENCODED | set(inspect.signature(target.get_encoder().forward).parameters)
    unknown = sorted(set(names) - known)
    if unknown:
        raise _refusal(f"the arguments {unknown}", "Leave them out, since a tree's forward does not get them")


def _check_token_types(target: PreTrainedModel, types: Tensor | None) -> None:
    """Raise if the decoder reads token types at every step (GPT-2), unless all are 0 and `type_vocab_size` is set."""
    if types is None or "token_type_ids" not in inspect.signature(target.get_decoder().forward).parameters:
        return
    if types.any() or not hasattr(target.config.get_text_config(), "type_vocab_size"):
        raise _refusal(
            f"the `token_type_ids` of {type(target).__name__}, which reads them with every token", "Leave them out"
        )


def _has_planes(target: PreTrainedModel) -> bool:
    """Whether a token may have several positions, such as its row and column in an image."""
    config = target.config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or {}
    return config is not target.config or "mrope_section" in rope


def check_lengths(
    model: PreTrainedModel, cache: Cache, text_length: int, position_count: int, max_length: int
) -> None:
    """Raise if cache and text do not fit together, or if the text may grow past the boundary of 'longrope'.

    `text_length` counts the given tokens, `position_count` all tokens of the conversation, cached ones included. At
    the boundary Phi-3's `prepare_inputs_for_generation` (Transformers 5.24) drops the cache and reads the text again.
    """
    past = cached_length(cache)
    if not past < text_length == position_count and not past + text_length == position_count:
        raise ValueError(
            f"Got a cache of {past} positions, a text of {text_length} tokens and a mask of {position_count}, which "
            "do not fit together. Pass the whole conversation as `input_ids`, or its new tokens with the "
            "`attention_mask` of the whole."
        )
    boundary = longrope_boundary(model.config)
    reads_anew = hasattr(model.config.get_text_config(), "original_max_position_embeddings")
    start, end = past or text_length, max_length + position_count - text_length
    if boundary and reads_anew and start <= boundary < end - 1:
        raise _refusal(
            f"a text that may grow from {start} to {end} positions, past {boundary}, where this target reads it again",
            f"Set `max_length` to {boundary + 1} at most",
        )


def check_room(static: StaticCache, length: int) -> None:
    """Raise if the caller's static cache has room for fewer than `length` positions."""
    layers: list[Any] = [*static.layers]
    room = min((layer.max_cache_len for layer in layers if not layer.is_sliding), default=length)
    if room < length:
        raise ValueError(
            f"The `StaticCache` holds {room} positions, but the text may come to need {length}. Pass a longer one, or "
            "set a smaller `max_new_tokens`."
        )


def check_static(target: PreTrainedModel) -> None:
    """Raise if the target has recurrent layers, which cannot verify trees with a static cache or when compiled."""
    if is_recurrent(target):
        raise ValueError(
            f"{type(target).__name__} has recurrent layers and cannot verify trees over a static cache or compiled. "
            "Leave out `cache_implementation`, and use the model as it was before it was compiled."
        )


def check_needs_compiled(sources: Sequence[DraftSource], why_eager: str | None) -> None:
    """Raise if a source can draft only while steps run compiled, but they run eagerly for the reason `why_eager`."""
    if why_eager is not None and any(source.needs_compiled for source in sources):
        raise ValueError(
            f"`assistant_model='self'` drafts with compiled code, and steps are not compiled here: {why_eager}. Pass "
            "`compile=True`, or another assistant."
        )


# Before and after Transformers prepares the call


def holds_more_than_tokens(model_kwargs: Mapping[str, Any]) -> bool:
    """Whether the prompt has images, sounds, embeddings or token types. An empty dict does not count."""
    given = (model_kwargs.get(name) for name in PROMPT_ARGUMENTS)
    return any(value is not None and not (isinstance(value, dict) and not value) for value in given)


def placeholder_ids(config: PretrainedConfig) -> frozenset[int]:
    """Return the ids of placeholder tokens for images, videos and sounds, such as `image_token_id`."""
    names = (name for name in vars(config) if name.endswith(("token_id", "token_index", "patch_id")))
    ids = (getattr(config, name) for name in names if any(kind in name for kind in _MEDIA))
    return frozenset(value for value in ids if isinstance(value, int))


def _refusal(came: str, way_out: str) -> ValueError:
    return ValueError(
        f"Draft trees do not support {came}. {way_out}, or call `generate` with `policy='plain'` and without a head."
    )
