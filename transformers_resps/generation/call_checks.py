"""The errors for calls of `generate` that draft trees do not support, raised before any work.

Stock `generate` would ignore or misroute most of these settings when it is given an assistant.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from transformers import Cache, DynamicCache, GenerationConfig, PreTrainedModel

from ..compat import CACHE_KEYWORD
from ..target.attention import longrope_boundary
from ..target.tree_cache import cached_length, check_cache, window_of


# Setting -> whether a value asks for something that trees do not support. Order: decoding, assistants, outputs.
_SETTINGS: dict[str, Callable[[Any], bool]] = {
    "num_beams": lambda value: value > 1,
    "num_beam_groups": lambda value: value > 1,
    "constraints": bool,
    "force_words_ids": bool,
    "penalty_alpha": bool,
    "dola_layers": bool,
    "num_return_sequences": lambda value: value > 1,
    "token_healing": bool,
    "prompt_lookup_num_tokens": bool,
    "assistant_early_exit": bool,
    "use_mtp": bool,
    "speculation_type": bool,
    "assistant_ensemble_weight": bool,
    "output_attentions": bool,
    "output_hidden_states": bool,
    "prefill_chunk_size": lambda value: value < 0,
}
_WAYS_OUT = {
    "num_beams": "Set `num_beams=1`, for greedy search or sampling",
    "num_return_sequences": "Repeat the prompt that many times in the batch",
    "output_hidden_states": "Get them from a plain call, since the head reads them itself",
}
_ARGUMENTS = ("assistant_tokenizer", "custom_generate", "synced_gpus", "inputs_embeds")
_CARRIED = {"attention_mask", "position_ids", "use_cache", "logits_to_keep", CACHE_KEYWORD}


def check_settings(model: PreTrainedModel, config: GenerationConfig | None, arguments: Mapping[str, Any]) -> None:
    """Refuse generation settings that draft trees do not support.

    Args:
        model: the target.
        config: the `generation_config` of the call.
        arguments: all other keyword arguments of the call.

    Raises:
        ValueError: names the setting and the way out.
    """

    def setting(name: str) -> Any:
        """As `generate` resolves it: the call's keyword, the call's config, the model's config."""
        for value in (arguments.get(name), getattr(config, name, None), getattr(model.generation_config, name, None)):
            if value is not None:
                return value
        return None

    for name, is_asked in _SETTINGS.items():
        value = setting(name)
        if value is not None and is_asked(value):
            raise _refusal(f"{name}={value!r}", _WAYS_OUT.get(name, f"Leave out `{name}`"))
    for name in _ARGUMENTS:
        if arguments.get(name) is not None and arguments[name] is not False:
            raise _refusal(f"`{name}`", f"Leave out `{name}`")
    if not arguments.get("use_cache", setting("use_cache") in (None, True)):  # here stock `generate` heeds a `None`
        raise _refusal(f"use_cache={arguments.get('use_cache', False)!r}", "Set `use_cache=True`")
    _check_cache_settings(setting)
    _check_user_cache(model, arguments)


def _check_cache_settings(setting: Callable[[str], Any]) -> None:
    implementation = setting("cache_implementation")
    if implementation not in (None, "dynamic", "static", "hybrid"):  # stock unsets "hybrid", an old default of the Hub
        raise _refusal(f"cache_implementation={implementation!r}", "Leave it out")


def _check_user_cache(model: PreTrainedModel, arguments: Mapping[str, Any]) -> None:
    cache = arguments.get("cache", arguments.get("past_key_values"))
    if cache is None:
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


def check_forward_arguments(input_ids: Tensor, model_kwargs: Mapping[str, Any]) -> None:
    """Refuse arguments of the target's forward that a tree's forward does not pass on, such as `pixel_values`, and
    those that do not fit the prompt.

    Raises:
        ValueError: names them.
    """
    unknown = sorted(name for name, value in model_kwargs.items() if value is not None and name not in _CARRIED)
    if unknown:
        raise _refusal(f"the arguments {unknown}", "Leave them out, since trees take token inputs only")
    positions = model_kwargs.get("position_ids")
    if positions is not None and positions.dim() != 2:
        raise _refusal(
            f"`position_ids` of {positions.dim()} dimensions",
            "Pass `[b, s]`, one position per token, or leave them out",
        )
    if not input_ids.numel():
        raise ValueError(
            f"Got a prompt of the shape {list(input_ids.shape)}, but each row needs at least one token. Pass one, for "
            "example the tokenizer's `bos_token_id`."
        )
    rows, mask = len(input_ids), model_kwargs.get("attention_mask")
    if positions is None:
        return
    if len(positions) not in (1, rows) or (mask is not None and mask.shape != (rows, positions.shape[1])):
        raise ValueError(
            f"Got `attention_mask` or `position_ids` of shape {list((positions if mask is None else mask).shape)} for "
            f"{rows} rows of {positions.shape[1]} positions. Pass the `attention_mask` that the tokenizer returned "
            "with the text, and `position_ids` of its shape or none."
        )


def check_synced(synced_gpus: bool | None) -> None:
    """Refuse ranks that must run the same number of forwards; stock `generate` detects that they must.

    Raises:
        ValueError: says so.
    """
    if synced_gpus:
        raise _refusal(
            "ZeRO-3 or FSDP over several ranks, which must all take the same number of steps", "Decode on one rank"
        )


def check_lengths(
    model: PreTrainedModel, cache: Cache, text_length: int, position_count: int, max_length: int
) -> None:
    """Refuse a cache that does not fit its text, and a text that grows past the length at which it is read again.

    The text is the whole conversation, or what follows the cache with a mask of the whole, as in plain `generate`.
    Phi-3's `prepare_inputs_for_generation` (Transformers 5.24) drops the cache at that length, because 'longrope'
    switches to other frequencies there.

    Args:
        model: the target.
        cache: the call's.
        text_length: tokens of the text.
        position_count: positions of the conversation, as mask or `position_ids` count them.
        max_length: tokens that the text may reach.

    Raises:
        ValueError: names the lengths.
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


def _refusal(came: str, way_out: str) -> ValueError:
    return ValueError(
        f"Draft trees do not support {came}. {way_out.rstrip('.')}, or call `generate` with `policy='plain'` and "
        "without a head."
    )
