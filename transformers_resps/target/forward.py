"""Runs the target over prompts and over trees, and catches the features that a head reads."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from ..compat import CACHE_KEYWORD, SELECTS_HIDDEN_STATES
from .features import Features, FeatureTap
from .gqa_attention import use_gqa_attention
from .static_cache import let_buffers_change
from .tree_cache import buffer_length, crop


def is_compiled(target: PreTrainedModel) -> bool:
    """Tell whether the caller compiled it: `model.compile()`, or `model.forward = torch.compile(model.forward)`."""
    return target._compiled_call_impl is not None or hasattr(target.forward, "_torchdynamo_orig_callable")


class TargetForward:
    """Runs the target as it is. Inside `with`.

    Args:
        target: any decoder of Transformers.
        layers: the head's feature layers; `None` without a head.
        cache: of the call.
    """

    def __init__(self, target: PreTrainedModel, layers: list[int] | None, cache: Cache) -> None:
        self.target, self.cache = target, cache
        self._tap = None if layers is None else FeatureTap(target, layers)

    def __enter__(self) -> "TargetForward":
        if self._tap is not None:
            self._tap.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._tap is not None:
            self._tap.__exit__(*exception)

    def read(self, tokens: Tensor, mask: Any, positions: Tensor, **options: int) -> tuple[Any, Features]:
        """Run over a prompt or a part of it: tokens and positions `[b, t]`. Returns the outputs and the features."""
        outputs, features = self._run(self.target, self._inputs(tokens, mask, positions) | options)
        crop(self.cache, 0)
        return outputs, features

    def verify(self, tokens: Tensor, mask: Any, positions: Tensor) -> tuple[Any, Features]:
        """Run over the nodes of a tree, padding included: `[b, n]`. Returns the outputs and the features."""
        with use_gqa_attention(self.target):
            return self._run(self.target, self._inputs(tokens, mask, positions))

    def must_compile(self, batch_size: int, node_count: int) -> bool:
        """Whether the coming forward, the first over trees of this size, takes longer than all that follow."""
        return False

    def _inputs(self, tokens: Tensor, mask: Any, positions: Tensor) -> dict[str, Any]:
        inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
        return inputs | {CACHE_KEYWORD: self.cache, "use_cache": True, "return_dict": True}

    def _run(self, call: Any, inputs: dict[str, Any]) -> tuple[Any, Features]:
        with nullcontext(Features([])) if self._tap is None else self._tap.record() as features:
            outputs = call(**inputs)
        return outputs, features


class CompiledForward(TargetForward):
    """Verifies with a compiled forward: one compilation for each size, none for a step.

    The features are outputs of the forward (`output_hidden_states` of Transformers): PyTorch does not notice that
    hooks are added to a compiled module or removed from it, and cannot trace our context variable. Prompts are
    not compiled, as in plain `generate`: each has another length.

    Args:
        target: any decoder of Transformers.
        layers: the head's feature layers; `None` without a head.
        cache: of the call, static.
        call: the target's forward, compiled; the target itself where the caller compiled it, prompts and all.

    Raises:
        ValueError: the head reads the last layer's output, which a compiled forward does not give.
    """

    def __init__(self, target: PreTrainedModel, layers: list[int] | None, cache: Cache, call: Any) -> None:
        super().__init__(target, None, cache)
        self._call, self._layers = call, layers or []
        last = target.config.get_text_config().num_hidden_layers
        if last in self._layers:
            raise ValueError(
                f"The head reads hidden state {last}, the last layer's output, which a compiled forward gives only "
                "after the final norm. Leave out `compile_config`, or set `disable_compile=True`."
            )
        # Kept where the compiled code is: the next call of `generate` finds both.
        self._known: set[tuple[int | None, ...]] = vars(call).setdefault("_resps_known_sizes", set())

    def read(self, tokens: Tensor, mask: Any, positions: Tensor, **options: int) -> tuple[Any, Features]:
        read = super().read(tokens, mask, positions, **options)
        let_buffers_change(self.cache)
        return read

    def verify(self, tokens: Tensor, mask: Any, positions: Tensor) -> tuple[Any, Features]:
        inputs = self._inputs(_static(tokens), _static(mask), _static(positions))
        ran = self._run(self._call, inputs)
        self._known.add(self._size(*tokens.shape))  # not before: compiling takes minutes, and may be interrupted
        return ran

    def must_compile(self, batch_size: int, node_count: int) -> bool:
        """True until a forward of that size has run."""
        return self._size(batch_size, node_count) not in self._known

    def _size(self, batch_size: int, node_count: int) -> tuple[int | None, ...]:
        return (*self._layers, node_count, batch_size, buffer_length(self.cache))

    def _run(self, call: Any, inputs: dict[str, Any]) -> tuple[Any, Features]:
        asked = {"output_hidden_states": self._layers if SELECTS_HIDDEN_STATES else True} if self._layers else {}
        outputs, features = call(**inputs, **asked), Features(self._layers)
        features.caught = {layer: outputs.hidden_states[layer] for layer in self._layers}
        return outputs, features


def _static(part: Any) -> Any:
    """Copy a tensor, or a dict of some, so that nothing but its values differs from others of its size.

    Marked static: after a second size `torch.compile` would try one forward for all sizes, which is slower.
    """
    if isinstance(part, dict):
        return {name: _static(value) for name, value in part.items()}
    part = part.clone(memory_format=torch.contiguous_format)
    torch._dynamo.mark_static(part)
    return part


def wait_for(states: Tensor) -> None:
    """Let an accelerator finish what makes `states` `[b, t, any]`: else the clock tells how long a launch takes.

    After the target's forward acceptance would wait all the same. Drafting is not waited for, so that the forward is
    launched meanwhile: what is left of it counts as verifying.
    """
    if states.device.type != "cpu":
        states[0, -1, 0].item()
