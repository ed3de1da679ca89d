"""Runs the target over prompts and trees, and catches the hidden states that a head reads, its features, by hooks.

Stock `generate` reads prompts that hold more than tokens: what of them the steps need is caught in the same way.

`output_hidden_states` of Transformers would do as well, but it leaves hooks in the model that cannot be pickled,
keeps all layers in releases before 5.23, and gives the last layer only after the final norm.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from inspect import signature
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel

from ..compat import CACHE_KEYWORD, SELECTS_HIDDEN_STATES
from .attention import use_gqa_attention
from .cache import crop


# The tap that the forward of this thread belongs to, and what it caught: two threads may share a target.
_recording: ContextVar[tuple["FeatureTap", dict[int, Tensor]] | None] = ContextVar("resps_features", default=None)
# Likewise the `position_ids` that the text decoder gets, forward by forward.
_seen_positions: ContextVar[list[Tensor | None] | None] = ContextVar("resps_positions", default=None)


Result = TypeVar("Result")


class FeatureTap:
    """Catches hidden states of `target` by hooks, which are there inside `with` and catch only during `record`.

    Args:
        target: any decoder of Transformers.
        layers: ascending, in the `output_hidden_states` convention: j is what enters layer j. The number of layers is
            what leaves the last one, before the final norm, and one more is what leaves that norm.
        before_deepstack: catch what leaves layer j - 1 instead, to which DeepStack adds features of images.

    Raises:
        ValueError: the target has no such layers.
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
        """Catch the features of the forward that runs inside, or of several that read a prompt in chunks."""
        features = Features(self._layers)
        token = _recording.set((self, features.caught))
        try:
            yield features
        finally:
            _recording.reset(token)

    def _entering(
        self, index: int, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any] | None = None
    ) -> None:
        """`keywords` is missing while another thread removes its own hook; the states are not ours then."""
        if keywords is not None:
            self._catch(index, arguments[0] if arguments else keywords["hidden_states"])

    def _leaving(self, index: int, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        self._catch(index, output[0] if isinstance(output, tuple) else output)

    def _catch(self, index: int, states: Tensor) -> None:
        tap, caught = _recording.get() or (None, {})
        if tap is self:
            before = caught.get(index)  # of an earlier chunk
            caught[index] = states if before is None else torch.cat([before, states], dim=1)


class Features:
    """The hidden states of one forward, or of a prompt that is read in chunks."""

    def __init__(self, layers: list[int]) -> None:
        self.layers = layers
        self.caught: dict[int, Tensor] = {}

    def concatenated(self) -> Tensor:
        """Join the layers, shallow to deep: `[b, t, F]`.

        Raises:
            ValueError: a layer gave none.
        """
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
    """The outermost list of the text decoder with as many modules as it has layers: a tower for images may have as
    many. Raises a `ValueError` where none is.
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
    """Whether the caller compiled a target, or a part: it, by `compile()` or `torch.compile`, or its `forward`."""
    compiled: bool = module._compiled_call_impl is not None or "_orig_mod" in module._modules
    return compiled or hasattr(module.forward, "_torchdynamo_orig_callable")


class TargetForward:
    """Runs the target as it is. Inside `with`.

    Args:
        target: any decoder of Transformers.
        layers: the head's feature layers; `None` without a head.
        cache: of the call.
        before_deepstack: see `FeatureTap`.

    Raises:
        ValueError: the caller compiled the target, and the head reads what its forward does not give.
    """

    def __init__(
        self, target: PreTrainedModel, layers: list[int] | None, cache: Cache, *, before_deepstack: bool = False
    ) -> None:
        self.target, self.cache = target, cache
        self.layers = layers or []
        # PyTorch does not notice that hooks are added to a compiled module or removed from it.
        self._tap = None
        if layers is not None and not is_compiled(target):
            self._tap = FeatureTap(target, layers, before_deepstack=before_deepstack)
        if self._tap is None and not are_outputs(target, self.layers):
            raise ValueError(
                f"The head reads hidden state {self.layers[-1]}, the last layer's output, which a compiled target "
                "gives only after the final norm. Use the target as it was before it was compiled."
            )

    @classmethod
    def of(
        cls, target: PreTrainedModel, layers: list[int] | None = None, *, before_deepstack: bool = False
    ) -> "TargetForward":
        """The forward of a decoder-only target over a new cache that grows."""
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

    def read(self, tokens: Tensor, mask: Any, positions: Tensor, **options: Any) -> tuple[Any, Features]:
        """Run over a prompt or a part of it: tokens and positions `[b, t]`. Returns the outputs and the features."""
        outputs, features = self._run(tokens, mask, positions, **options)
        crop(self.cache, 0)
        return outputs, features

    def catch(self, run: Callable[[], Result]) -> tuple[Result, Features]:
        """What `run` returns, and the features of the forwards in it; the caller did not compile the target."""
        with nullcontext(Features([])) if self._tap is None else self._tap.record() as features:
            return run(), features

    def read_by(self, run: Callable[[], Any]) -> tuple[Any, Features, Tensor | None]:
        """Let `run` read a prompt, in one forward or in chunks.

        Returns:
            What `run` returned, the features, and the positions `[..., t]` that the text decoder got in the last
            forward: they are not always those of `generate` (PaliGemma counts from 1). `None` where it got none.

        Raises:
            ValueError: the caller compiled the target, which then notices no hook.
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

    def verify(self, tokens: Tensor, mask: Any, positions: Tensor, **options: Any) -> tuple[Any, Features]:
        """Run over the nodes of a tree: `[b, n]`. Returns the outputs and the features."""
        with use_gqa_attention(self.target):
            return self._run(tokens, mask, positions, **options)

    def keep_rows(self, rows: list[int]) -> None:
        """Read for these rows only, from now on; whoever owns the cache cuts it."""

    def inputs(self, tokens: Tensor, mask: Any, positions: Tensor) -> dict[str, Any]:
        """A forward's inputs by the names that the target gives them."""
        inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
        return inputs | {CACHE_KEYWORD: self.cache}

    def _run(self, tokens: Tensor, mask: Any, positions: Tensor, **options: Any) -> tuple[Any, Features]:
        inputs = self.inputs(tokens, mask, positions) | options | {"use_cache": True, "return_dict": True}
        if self._tap is not None:
            return self.catch(lambda: self.target(**inputs))
        places = output_places(self.target, self.layers)
        outputs: Any = self.target(**inputs, **hidden_states_asked(places))
        features = Features(self.layers)
        features.caught = {layer: outputs.hidden_states[at] for layer, at in zip(self.layers, places, strict=True)}
        return outputs, features


class EncoderDecoderForward(TargetForward):
    """Runs the decoder of an encoder-decoder, whose encoder has read the source.

    Args:
        target: any encoder-decoder of Transformers.
        cache: of the call. What the decoder has read is in its `self_attention_cache`.
        encoder_outputs: of the source, as stock `generate` hands them to the target's forward.
        encoder_mask: `[b, source]`, or `None`.
    """

    def __init__(
        self, target: PreTrainedModel, cache: EncoderDecoderCache, encoder_outputs: Any, encoder_mask: Tensor | None
    ) -> None:
        super().__init__(target, None, cache.self_attention_cache)
        self._both_caches, self._encoder_outputs, self._encoder_mask = cache, encoder_outputs, encoder_mask
        self._takes_positions = not counts_slots(target)

    @classmethod
    def of_first(
        cls, target: PreTrainedModel, encoder_outputs: Any, encoder_mask: Tensor | None
    ) -> "EncoderDecoderForward":
        """The forward for the first row's source, over new caches that grow."""
        config = target.config.get_text_config(decoder=True)
        cache = EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
        forward = cls(target, cache, encoder_outputs, encoder_mask)
        forward.keep_rows([0])
        return forward

    def read_by(self, run: Callable[[], Any]) -> tuple[Any, Features, Tensor | None]:
        """As `TargetForward.read_by`. A decoder that gets no positions counts slots."""
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

    def inputs(self, tokens: Tensor, mask: Any, positions: Tensor) -> dict[str, Any]:
        inputs = {"decoder_input_ids": tokens, "decoder_attention_mask": mask, CACHE_KEYWORD: self._both_caches}
        if self._takes_positions:
            inputs["decoder_position_ids"] = positions.expand_as(tokens)
        return inputs | {"encoder_outputs": self._encoder_outputs, "attention_mask": self._encoder_mask}


def counts_slots(target: PreTrainedModel) -> bool:
    """Whether a decoder takes no positions, but counts the slots of its cache: only a chain stands where it should."""
    takes = signature(target.forward).parameters
    return bool(target.config.is_encoder_decoder) and "decoder_position_ids" not in takes


def skips_positions(target: PreTrainedModel) -> bool:
    """Whether layers without keys of their own skip positions whose logits are not kept, as those of Gemma 4 do."""
    return bool(getattr(target.config.get_text_config(decoder=True), "num_kv_shared_layers", 0))


def are_outputs(target: PreTrainedModel, layers: list[int]) -> bool:
    """Whether the target's outputs hold these hidden states; they give the last layer's after the final norm."""
    return target.config.get_text_config().num_hidden_layers not in layers


def output_places(target: PreTrainedModel, layers: list[int]) -> list[int]:
    """Where the target's outputs have the hidden states of these `are_outputs` layers."""
    return [min(layer, target.config.get_text_config().num_hidden_layers) for layer in layers]


def hidden_states_asked(layers: list[int]) -> dict[str, Any]:
    """The keyword with which a forward returns the hidden states at these places."""
    return {"output_hidden_states": layers if SELECTS_HIDDEN_STATES else True} if layers else {}


def wait_for(states: Tensor) -> None:
    """Let an accelerator finish what makes `states` `[b, t, any]`: else the clock tells how long a launch takes.

    After the target's forward acceptance would wait all the same. Drafting is not waited for, so that the forward is
    launched meanwhile: what is left of it counts as verifying.
    """
    if states.device.type != "cpu":
        states[0, -1, 0].item()
