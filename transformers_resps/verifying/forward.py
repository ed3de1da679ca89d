"""Run the target over prompts and trees, and catch features: the hidden states that a draft head reads.

Hooks catch the features, also while Transformers' `generate` reads a prompt with images or sounds. The option
`output_hidden_states` is worse: it leaves hooks in the model that cannot be pickled, it returns the last layer's
states only after the final norm, and before Transformers 5.23 it keeps the states of all layers.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from inspect import signature
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.utils.generic import ModelOutput

from ..compat import CACHE_KEYWORD, SELECTS_HIDDEN_STATES
from .attention import use_gqa_attention
from .cache import crop
from .masks import Masks


# The `FeatureTap` of this thread's forward, and the states that it has caught; threads may share a target.
_recording: ContextVar[tuple["FeatureTap", dict[int, Tensor]] | None] = ContextVar("resps_features", default=None)
# The `position_ids` that the text decoder got in each forward of this thread.
_seen_positions: ContextVar[list[Tensor | None] | None] = ContextVar("resps_positions", default=None)


Result = TypeVar("Result")


class TargetOutputs(Protocol):
    """The outputs of a target's forward that a step reads."""

    logits: Tensor  # [b, t, v]
    hidden_states: Sequence[Tensor]  # [b, t, h]


class FeatureTap:
    """Catches hidden states of `target` by hooks, which are installed inside a `with` block and work during `record`.

    `layers` are ascending indices as in `output_hidden_states`: j means the input of layer j. With L layers, L means
    the last layer's output before the final norm, and L + 1 that norm's output. With `before_deepstack`, j means the
    output of layer j - 1 before DeepStack adds image features. Raises a `ValueError` if an index does not exist.
    """

    def __init__(self, target: PreTrainedModel, layers: list[int], *, before_deepstack: bool = False) -> None:
        self._decoder_layers = decoder_layers(target)
        self._final_norm = getattr(target.get_decoder(), "norm", None)
        self._layers, self.before_deepstack = layers, before_deepstack
        self._hooks = ExitStack()
        most = len(self._decoder_layers) + (self._final_norm is not None)
        if not layers or min(layers) < 0 or max(layers) > most:
            raise ValueError(
                f"The head reads the feature layers {layers}, but {type(target).__name__} has the hidden states 0 to "
                f"{len(self._decoder_layers)}. Load the head that belongs to this target."
            )

    def __enter__(self) -> "FeatureTap":
        for index in self._layers:
            if index > len(self._decoder_layers):
                assert self._final_norm is not None
                handle = self._final_norm.register_forward_hook(partial(self._leaving, index))
            elif index == len(self._decoder_layers) or (self.before_deepstack and index):
                handle = self._decoder_layers[index - 1].register_forward_hook(partial(self._leaving, index))
            else:
                layer = self._decoder_layers[index]
                handle = layer.register_forward_pre_hook(partial(self._entering, index), with_kwargs=True)
            self._hooks.callback(handle.remove)
        return self

    def __exit__(self, *exception: object) -> None:
        self._hooks.close()

    @contextmanager
    def record(self) -> Iterator["Features"]:
        """Catch the features of the forward inside the `with` block, or of several forwards over a prompt's chunks."""
        features = Features(self._layers)
        token = _recording.set((self, features.caught))
        try:
            yield features
        finally:
            _recording.reset(token)

    def _entering(
        self, index: int, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any] | None = None
    ) -> None:
        """Catch a layer's input, unless PyTorch omits `keywords`, because another thread is removing this hook."""
        if keywords is not None:
            self._catch(index, arguments[0] if arguments else keywords["hidden_states"])

    def _leaving(
        self, index: int, module: nn.Module, arguments: tuple[Any, ...], output: Tensor | tuple[Tensor, ...]
    ) -> None:
        self._catch(index, output[0] if isinstance(output, tuple) else output)

    def _catch(self, index: int, states: Tensor) -> None:
        tap, caught = _recording.get() or (None, {})
        if tap is self:
            before = caught.get(index)  # of earlier chunks
            caught[index] = states if before is None else torch.cat([before, states], dim=1)


class Features:
    """The hidden states that one forward, or all forwards over a prompt's chunks, computed at `layers`."""

    def __init__(self, layers: list[int], caught: dict[int, Tensor] | None = None) -> None:
        self.layers = layers
        self.caught = {} if caught is None else caught  # layer -> [b, t, h]

    def concatenated(self) -> Tensor:
        """Concatenate the hidden states of all layers: `[b, t, F]`. Raises a `ValueError` if a layer gave none."""
        missing = [layer for layer in self.layers if layer not in self.caught]
        if missing:
            raise ValueError(
                f"The head reads the hidden states {self.layers}, but the forward gave none of {missing}: it "
                "skips those layers, or they are compiled one by one. Leave out the head, or compile the whole target "
                "with `compile_config`."
            )
        first = self.caught[self.layers[0]]
        return torch.cat([self.caught[layer].to(first.device) for layer in self.layers], dim=-1)


def _note_positions(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any] | None = None) -> None:
    seen = _seen_positions.get()
    if seen is not None and keywords is not None:
        seen.append(keywords.get("position_ids"))


def decoder_layers(target: PreTrainedModel) -> nn.ModuleList:
    """Find the decoder's outermost `ModuleList` of `num_hidden_layers` modules; raise `ValueError` without one."""
    count = target.config.get_text_config(decoder=True).num_hidden_layers
    for module in target.get_decoder().modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ValueError(
        f"A draft head needs a decoder with one `nn.ModuleList` of {count} layers, but {type(target).__name__} has "
        "none. Leave out the head."
    )


def is_compiled(module: nn.Module) -> bool:
    """Whether the caller compiled a module or its `forward`, by `module.compile()` or `torch.compile`."""
    compiled: bool = module._compiled_call_impl is not None or "_orig_mod" in module._modules
    return compiled or hasattr(module.forward, "_torchdynamo_orig_callable")


class TargetForward:
    """Runs the target with `cache`, and catches the hidden states of `layers` inside a `with` block; see `FeatureTap`.

    `layers` is `None` or empty without a draft head. Raises a `ValueError` if the caller compiled the target and the
    head reads a hidden state that the target's outputs lack.
    """

    def __init__(
        self, target: PreTrainedModel, layers: list[int] | None, cache: Cache, *, before_deepstack: bool = False
    ) -> None:
        self.target, self.cache = target, cache
        self.layers = layers or []
        # Compiled modules ignore hooks that are added later.
        self._tap = None
        if layers and not is_compiled(target):
            self._tap = FeatureTap(target, layers, before_deepstack=before_deepstack)
        if self._tap is None and not gives_hidden_states(target, self.layers):
            raise ValueError(
                f"The head reads hidden state {self.layers[-1]}, the last layer's output, which a compiled target "
                "gives only after the final norm. Use the target as it was before it was compiled."
            )

    @classmethod
    def of(cls, target: PreTrainedModel, layers: list[int] | None = None, *, before_deepstack: bool = False) -> Self:
        """Make the forward of a decoder-only target with a new dynamic cache."""
        cache = DynamicCache(config=target.config.get_text_config(decoder=True))
        return cls(target, layers, cache, before_deepstack=before_deepstack)

    def __enter__(self) -> "TargetForward":
        if self._tap is not None:
            self._tap.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop_catching()

    def stop_catching(self) -> None:
        """Remove the hooks, so that no more features are caught."""
        if self._tap is not None:
            self._tap.__exit__()

    def read(self, tokens: Tensor, mask: Masks, positions: Tensor, **options: Any) -> tuple[TargetOutputs, Features]:
        """Run the target over a prompt's tokens and positions `[b, t]`; return the outputs and the features."""
        outputs, features = self._run(tokens, mask, positions, **options)
        crop(self.cache, 0)
        return outputs, features

    def catch(self, run: Callable[[], Result]) -> tuple[Result, Features]:
        """Call `run`; return its result and the features of its forwards. The target must not be compiled."""
        with nullcontext(Features([])) if self._tap is None else self._tap.record() as features:
            return run(), features

    def read_by(self, run: Callable[[], Result]) -> tuple[Result, Features, Tensor | None]:
        """Call `run`, which runs the target over a prompt; return its result, the features and the position ids.

        The position ids `[..., t]` are the text decoder's in the last forward, or `None` if it got none.
        PaliGemma's begin at 1, unlike `generate`'s. Raises a `ValueError` for a compiled target, which ignores hooks.
        """
        if is_compiled(self.target):
            raise ValueError(
                f"A compiled {type(self.target).__name__} reads prompts of tokens only, and this one holds more. Use "
                "the target as it was before it was compiled, or call `generate` with `policy='plain'`."
            )
        seen = list[Tensor | None]()
        token = _seen_positions.set(seen)
        hook = self.target.get_decoder().register_forward_pre_hook(_note_positions, with_kwargs=True)
        try:
            outputs, features = self.catch(run)
        finally:
            hook.remove()
            _seen_positions.reset(token)
        return outputs, features, seen[-1] if seen else None

    def verify(self, tokens: Tensor, mask: Masks, positions: Tensor, **options: Any) -> tuple[TargetOutputs, Features]:
        """Run the target over the nodes `[b, n]` of a tree; return the outputs and the features."""
        with use_gqa_attention(self.target):
            return self._run(tokens, mask, positions, **options)

    def keep_rows(self, rows: list[int]) -> None:
        """Keep only these rows of the encoder's outputs, if any; the caller drops rows of the decoder's cache."""

    def inputs(self, tokens: Tensor, mask: Masks, positions: Tensor) -> dict[str, Any]:
        inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
        return inputs | {CACHE_KEYWORD: self.cache}

    def _run(self, tokens: Tensor, mask: Masks, positions: Tensor, **options: Any) -> tuple[TargetOutputs, Features]:
        inputs = self.inputs(tokens, mask, positions) | options | {"use_cache": True, "return_dict": True}
        if self._tap is not None:
            return self.catch(lambda: self.target(**inputs))
        places = output_places(self.target, self.layers)
        outputs: TargetOutputs = self.target(**inputs, **hidden_states_asked(places))
        caught = {layer: outputs.hidden_states[at] for layer, at in zip(self.layers, places, strict=True)}
        return outputs, Features(self.layers, caught)


class EncoderDecoderForward(TargetForward):
    """Runs the decoder of an encoder-decoder; a tree's keys and values go to the `self_attention_cache` of `cache`.

    `encoder_outputs` and `encoder_mask` (`[b, input length]`, or `None`) come from Transformers' `generate`.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        cache: EncoderDecoderCache,
        encoder_outputs: ModelOutput,
        encoder_mask: Tensor | None,
    ) -> None:
        super().__init__(target, None, cache.self_attention_cache)
        self._both_caches, self._encoder_outputs, self._encoder_mask = cache, encoder_outputs, encoder_mask
        self._takes_positions = not counts_slots(target)

    @classmethod
    def of_first(cls, target: PreTrainedModel, encoder_outputs: ModelOutput, encoder_mask: Tensor | None) -> Self:
        """Make a forward for the first row of the encoder's batch, with new dynamic caches."""
        config = target.config.get_text_config(decoder=True)
        cache = EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
        forward = cls(target, cache, encoder_outputs, encoder_mask)
        forward.keep_rows([0])
        return forward

    def read_by(self, run: Callable[[], Result]) -> tuple[Result, Features, Tensor | None]:
        """See `TargetForward.read_by`; if the decoder got no positions, the cache slots are its positions."""
        outputs, features, positions = super().read_by(run)
        if positions is None:
            positions = torch.arange(int(self.cache.get_seq_length()), device=self.target.device)[None]
        return outputs, features, positions

    def keep_rows(self, rows: list[int]) -> None:
        outputs = self._encoder_outputs
        self._both_caches.cross_attention_cache.batch_select_indices(torch.tensor(rows))
        if self._encoder_mask is not None:
            self._encoder_mask = self._encoder_mask[rows]
        kept = {name: part[rows] if isinstance(part, Tensor) else part for name, part in outputs.items()}
        self._encoder_outputs = type(outputs)(**kept)

    def inputs(self, tokens: Tensor, mask: Masks, positions: Tensor) -> dict[str, Any]:
        inputs = {"decoder_input_ids": tokens, "decoder_attention_mask": mask, CACHE_KEYWORD: self._both_caches}
        if self._takes_positions:
            inputs["decoder_position_ids"] = positions.expand_as(tokens)
        return inputs | {"encoder_outputs": self._encoder_outputs, "attention_mask": self._encoder_mask}


def counts_slots(target: PreTrainedModel) -> bool:
    """Whether an encoder-decoder uses cache slots as position ids, which is wrong for trees but right for chains."""
    takes = signature(target.forward).parameters
    return bool(target.config.is_encoder_decoder) and "decoder_position_ids" not in takes


def skips_positions(target: PreTrainedModel) -> bool:
    """Whether layers that use another layer's keys compute only positions whose logits are kept, as in Gemma 4."""
    return bool(getattr(target.config.get_text_config(decoder=True), "num_kv_shared_layers", 0))


def gives_hidden_states(target: PreTrainedModel, layers: list[int]) -> bool:
    """Whether `output_hidden_states` returns the states of `layers`; not the last layer's before the final norm."""
    return target.config.get_text_config().num_hidden_layers not in layers


def output_places(target: PreTrainedModel, layers: list[int]) -> list[int]:
    """Return the indices of `layers`, numbered as in `FeatureTap`, in the target's `hidden_states` output."""
    return [min(layer, target.config.get_text_config().num_hidden_layers) for layer in layers]


def hidden_states_asked(layers: list[int]) -> dict[str, list[int] | bool]:
    """Return the keyword argument that makes a forward return the hidden states at these indices."""
    return {"output_hidden_states": layers if SELECTS_HIDDEN_STATES else True} if layers else {}


def wait_for(states: Tensor) -> None:
    """Wait until an accelerator has computed `states` `[b, t, any]`; else the clock would time only the launch."""
    if states.device.type != "cpu":
        states[0, -1, 0].item()
