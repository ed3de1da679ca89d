"""Runs the target over prompts and over trees, and catches the features that a head reads."""

from typing import Any

from torch import Tensor
from transformers import Cache, PreTrainedModel

from ..compat import CACHE_KEYWORD, SELECTS_HIDDEN_STATES
from .features import Features, FeatureTap
from .gqa_attention import use_gqa_attention
from .tree_cache import crop


def is_compiled(target: PreTrainedModel) -> bool:
    """Tell whether the caller compiled it: `model.compile()`, or `model.forward = torch.compile(model.forward)`."""
    return target._compiled_call_impl is not None or hasattr(target.forward, "_torchdynamo_orig_callable")


class TargetForward:
    """Runs the target as it is. Inside `with`.

    Args:
        target: any decoder of Transformers.
        layers: the head's feature layers; `None` without a head.
        cache: of the call.

    Raises:
        ValueError: the caller compiled the target, and the head reads what its forward does not give.
    """

    def __init__(self, target: PreTrainedModel, layers: list[int] | None, cache: Cache) -> None:
        self.target, self.cache = target, cache
        self.layers = layers or []
        # PyTorch does not notice that hooks are added to a compiled module or removed from it.
        self._tap = None if layers is None or is_compiled(target) else FeatureTap(target, layers)
        if self._tap is None and not are_outputs(target, self.layers):
            raise ValueError(
                f"The head reads hidden state {self.layers[-1]}, the last layer's output, which a compiled target "
                "gives only after the final norm. Use the target as it was before it was compiled."
            )

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

    def read(self, tokens: Tensor, mask: Any, positions: Tensor, **options: int) -> tuple[Any, Features]:
        """Run over a prompt or a part of it: tokens and positions `[b, t]`. Returns the outputs and the features."""
        outputs, features = self._run(self._inputs(tokens, mask, positions) | options)
        crop(self.cache, 0)
        return outputs, features

    def verify(self, tokens: Tensor, mask: Any, positions: Tensor) -> tuple[Any, Features]:
        """Run over the nodes of a tree: `[b, n]`. Returns the outputs and the features."""
        with use_gqa_attention(self.target):
            return self._run(self._inputs(tokens, mask, positions))

    def _inputs(self, tokens: Tensor, mask: Any, positions: Tensor) -> dict[str, Any]:
        inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
        return inputs | {CACHE_KEYWORD: self.cache, "use_cache": True, "return_dict": True}

    def _run(self, inputs: dict[str, Any]) -> tuple[Any, Features]:
        if self._tap is not None:
            with self._tap.record() as features:
                return self.target(**inputs), features
        outputs: Any = self.target(**inputs, **hidden_states_asked(self.layers))
        features = Features(self.layers)
        features.caught = {layer: outputs.hidden_states[layer] for layer in self.layers}
        return outputs, features


def are_outputs(target: PreTrainedModel, layers: list[int]) -> bool:
    """Whether the target's outputs hold these hidden states; they give the last layer's after the final norm."""
    return target.config.get_text_config().num_hidden_layers not in layers


def hidden_states_asked(layers: list[int]) -> dict[str, Any]:
    """The keyword with which a forward returns the hidden states of these layers."""
    return {"output_hidden_states": layers if SELECTS_HIDDEN_STATES else True} if layers else {}


def wait_for(states: Tensor) -> None:
    """Let an accelerator finish what makes `states` `[b, t, any]`: else the clock tells how long a launch takes.

    After the target's forward acceptance would wait all the same. Drafting is not waited for, so that the forward is
    launched meanwhile: what is left of it counts as verifying.
    """
    if states.device.type != "cpu":
        states[0, -1, 0].item()
