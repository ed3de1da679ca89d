"""The target's forward over prompts and trees; hooks catch the hidden states that a head reads, its features.

Hooks also work inside stock `generate`, which runs prompts that hold more than tokens. `output_hidden_states` of
Transformers leaves hooks in the model that cannot be pickled, keeps all layers in releases before 5.23, and gives the
last layer only after the final norm.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from inspect import signature
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.utils.generic import ModelOutput

from ..compat import CACHE_KEYWORD, SELECTS_HIDDEN_STATES
from .attention import use_gqa_attention
from .cache import crop
from .masks import Masks


# The tap of this thread's forward, and the states it has caught: two threads may share a target.
_recording: ContextVar[tuple["FeatureTap", dict[int, Tensor]] | None] = ContextVar("resps_features", default=None)
# The `position_ids` that the text decoder got in each forward of this thread.
_seen_positions: ContextVar[list[Tensor | None] | None] = ContextVar("resps_positions", default=None)


Result = TypeVar("Result")


class TargetOutputs(Protocol):
    """The outputs of a target's forward that a step reads."""

    logits: Tensor  # [b, t, v]
    hidden_states: Sequence[Tensor]  # [b, t, h]


class FeatureTap:
    """Catches hidden states of `target` by hooks, which exist inside `with` and catch only during `record`.

    `layers` are ascending, in the `output_hidden_states` convention: j is the input of layer j. The number of layers
    means the last one's output before the final norm, and one more the output of that norm. With `before_deepstack` j
    is the output of layer j - 1, before DeepStack adds features of images to it. Raises a `ValueError` if the target
    lacks one.
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
        """Catch the features of the forward that runs inside, or of several over chunks of a prompt."""
        features = Features(self._layers)
        token = _recording.set((self, features.caught))
        try:
            yield features
        finally:
            _recording.reset(token)

    def _entering(
        self, index: int, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any] | None = None
    ) -> None:
        """Catch a layer's input. `keywords` is missing, and the states not ours, while a thread removes its hook."""
        if keywords is not None:
            self._catch(index, arguments[0] if arguments else keywords["hidden_states"])

    def _leaving(
        self, index: int, module: nn.Module, arguments: tuple[Any, ...], output: Tensor | tuple[Tensor, ...]
    ) -> None:
        self._catch(index, output[0] if isinstance(output, tuple) else output)

    def _catch(self, index: int, states: Tensor) -> None:
        tap, caught = _recording.get() or (None, {})
        if tap is self:
            before = caught.get(index)  # an earlier chunk's
            caught[index] = states if before is None else torch.cat([before, states], dim=1)


class Features:
    """The hidden states of one forward, or of a prompt in chunks."""

    def __init__(self, layers: list[int]) -> None:
        self.layers = layers
        self.caught: dict[int, Tensor] = {}

    def concatenated(self) -> Tensor:
        """Join the layers, shallow to deep: `[b, t, F]`. Raises a `ValueError` where a layer gave none."""
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
    """Find the text decoder's layers: its outermost `ModuleList` of their number. A vision tower may have as many.

    Raises a `ValueError` if there is none.
    """
    count = target.config.get_text_config(decoder=True).num_hidden_layers
    for module in target.get_decoder().modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ValueError(
        f"A draft head needs a decoder with one `nn.ModuleList` of {count} layers, but {type(target).__name__} has "
        "none. Leave out the head."
    )


def is_compiled(module: nn.Module) -> bool:
    """Whether the caller compiled a module, by `compile()` or `torch.compile`, or its `forward`."""
    compiled: bool = module._compiled_call_impl is not None or "_orig_mod" in module._modules
    return compiled or hasattr(module.forward, "_torchdynamo_orig_callable")


class TargetForward:
    """Runs the target over `cache` and catches the hidden states of `layers`, inside `with`; see `FeatureTap`.

    `layers` is `None` without a head. Raises a `ValueError` where the caller compiled the target and the head reads a
    state that its outputs lack.
    """

    def __init__(
        self, target: PreTrainedModel, layers: list[int] | None, cache: Cache, *, before_deepstack: bool = False
    ) -> None:
        self.target, self.cache = target, cache
        self.layers = layers or []
        # Compiled modules ignore hooks that are added later.
        self._tap = None
        if layers is not None and not is_compiled(target):
            self._tap = FeatureTap(target, layers, before_deepstack=before_deepstack)
        if self._tap is None and not gives_hidden_states(target, self.layers):
            raise ValueError(
                f"The head reads hidden state {self.layers[-1]}, the last layer's output, which a compiled target "
                "gives only after the final norm. Use the target as it was before it was compiled."
            )

    @classmethod
    def of(
        cls, target: PreTrainedModel, layers: list[int] | None = None, *, before_deepstack: bool = False
    ) -> "TargetForward":
        """Make the forward of a decoder-only target over a new cache that grows."""
        cache = DynamicCache(config=target.config.get_text_config(decoder=True))
        return cls(target, layers, cache, before_deepstack=before_deepstack)

    def __enter__(self) -> "TargetForward":
        if self._tap is not None:
            self._tap.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop_catching()

    def stop_catching(self) -> None:
        """Catch no features from now on."""
        if self._tap is not None:
            self._tap.__exit__()

    def read(self, tokens: Tensor, mask: Masks, positions: Tensor, **options: Any) -> tuple[TargetOutputs, Features]:
        """Run over tokens and positions `[b, t]` of a prompt; return the outputs and the features."""
        outputs, features = self._run(tokens, mask, positions, **options)
        crop(self.cache, 0)
        return outputs, features

    def catch(self, run: Callable[[], Result]) -> tuple[Result, Features]:
        """Return the result of `run` and the features of its forwards, over a target that is not compiled."""
        with nullcontext(Features([])) if self._tap is None else self._tap.record() as features:
            return run(), features

    def read_by(self, run: Callable[[], Result]) -> tuple[Result, Features, Tensor | None]:
        """Let `run` read a prompt, in one forward or in chunks; return its result and the features.

        The third result are the positions `[..., t]` that the text decoder got in the last forward, or `None`: they
        may differ from those of `generate` (PaliGemma counts from 1). Raises a `ValueError` if the caller compiled the
        target, which then ignores hooks.
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
        """Run over the nodes `[b, n]` of a tree; return the outputs and the features."""
        with use_gqa_attention(self.target):
            return self._run(tokens, mask, positions, **options)

    def keep_rows(self, rows: list[int]) -> None:
        """Run only these rows from now on; the owner of the cache cuts the cache."""

    def inputs(self, tokens: Tensor, mask: Masks, positions: Tensor) -> dict[str, Any]:
        """Name a forward's inputs as the target does."""
        inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
        return inputs | {CACHE_KEYWORD: self.cache}

    def _run(self, tokens: Tensor, mask: Masks, positions: Tensor, **options: Any) -> tuple[TargetOutputs, Features]:
        inputs = self.inputs(tokens, mask, positions) | options | {"use_cache": True, "return_dict": True}
        if self._tap is not None:
            return self.catch(lambda: self.target(**inputs))
        places = output_places(self.target, self.layers)
        outputs: TargetOutputs = self.target(**inputs, **hidden_states_asked(places))
        features = Features(self.layers)
        features.caught = {layer: outputs.hidden_states[at] for layer, at in zip(self.layers, places, strict=True)}
        return outputs, features


class EncoderDecoderForward(TargetForward):
    """Runs the decoder of an encoder-decoder over its `self_attention_cache`, after the encoder has read the source.

    `encoder_outputs` and `encoder_mask`, `[b, source]` or `None`, come from stock `generate`.
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
    def of_first(
        cls, target: PreTrainedModel, encoder_outputs: ModelOutput, encoder_mask: Tensor | None
    ) -> "EncoderDecoderForward":
        """Make the forward for the first row's source, over new caches that grow."""
        config = target.config.get_text_config(decoder=True)
        cache = EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
        forward = cls(target, cache, encoder_outputs, encoder_mask)
        forward.keep_rows([0])
        return forward

    def read_by(self, run: Callable[[], Result]) -> tuple[Result, Features, Tensor | None]:
        """Like `TargetForward`; a decoder that gets no positions counts slots."""
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
    """Whether a decoder counts slots of its cache in place of positions, so that only chains get the right ones."""
    takes = signature(target.forward).parameters
    return bool(target.config.is_encoder_decoder) and "decoder_position_ids" not in takes


def skips_positions(target: PreTrainedModel) -> bool:
    """Whether layers without own keys skip positions whose logits are not kept, as in Gemma 4."""
    return bool(getattr(target.config.get_text_config(decoder=True), "num_kv_shared_layers", 0))


def gives_hidden_states(target: PreTrainedModel, layers: list[int]) -> bool:
    """Whether the target can return these hidden states: the last layer's only comes after the final norm."""
    return target.config.get_text_config().num_hidden_layers not in layers


def output_places(target: PreTrainedModel, layers: list[int]) -> list[int]:
    """Index the hidden states of these layers among the target's outputs; see `gives_hidden_states`."""
    return [min(layer, target.config.get_text_config().num_hidden_layers) for layer in layers]


def hidden_states_asked(layers: list[int]) -> dict[str, list[int] | bool]:
    """Make the keyword with which a forward returns the hidden states at these indices."""
    return {"output_hidden_states": layers if SELECTS_HIDDEN_STATES else True} if layers else {}


def wait_for(states: Tensor) -> None:
    """Wait until an accelerator has computed `states` `[b, t, any]`: else the clock measures a launch.

    After the target's forward, acceptance waits anyway. Nothing waits for a draft: the forward is launched meanwhile,
    and the rest of the draft counts as verifying.
    """
    if states.device.type != "cpu":
        states[0, -1, 0].item()
