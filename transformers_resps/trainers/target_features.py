"""Read what a head learns from: the target's features, its last hidden states and its picks."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ..target.features import FeatureTap
from .soft_cross_entropy import Teacher


_PICK_CHUNK = 512  # positions whose full logits are alive at once


@dataclass(frozen=True, slots=True)
class TargetFeatures:
    """The target's outputs for a batch of texts.

    Attributes:
        features: `[b, t, F]`.
        hidden: `[b, t, target hidden]` after the target's final norm: the input of its output head.
        picks: `[b, t]` the target's most likely token after each position; 0 where it was not asked for.
    """

    features: Tensor
    hidden: Tensor
    picks: Tensor


class FrozenTarget:
    """The target that a head learns from: in evaluation mode, without gradients, not part of the trained module.

    Args:
        model: any causal language model of Transformers.
        feature_layers: as in `DraftHeadConfig`.

    Raises:
        ValueError: the model has no output head.
    """

    def __init__(self, model: PreTrainedModel, feature_layers: list[int]) -> None:
        if model.get_output_embeddings() is None:
            raise ValueError(
                f"{type(model).__name__} has no output head, but a draft head learns from the target's distribution. "
                "Load the target with AutoModelForCausalLM."
            )
        self.model = model.eval().requires_grad_(False)
        self.feature_layers = feature_layers
        config = model.config.get_text_config()
        self.scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
            getattr(config, "logits_scaling", None) or 1.0
        )
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)

    @property
    def output_weight(self) -> Tensor:
        """Weight of the output head, `[v, target hidden]`."""
        weight = self.model.get_output_embeddings().weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def output_bias(self) -> Tensor | None:
        """Bias of the output head, `[v]`; `None` if it has none."""
        bias = getattr(self.model.get_output_embeddings(), "bias", None)
        assert bias is None or isinstance(bias, Tensor)
        return bias

    @torch.no_grad()
    def read(self, input_ids: Tensor, predicted: Tensor | None = None) -> TargetFeatures:
        """Run the target over right-padded texts; causal attention keeps the padding out without a mask.

        Args:
            input_ids: `[b, t]` the texts.
            predicted: `[b, t]` bool, the tokens whose picks are wanted; `None` for all. Fewer save time: the output
                head is a fifth of a small target.

        Returns:
            Features, last hidden states and picks.
        """
        with FeatureTap(self.model, self.feature_layers) as tap, tap.record() as features:
            hidden = self.model.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state
        return TargetFeatures(features.concatenated(), hidden, self._picks(hidden, predicted))

    def _picks(self, hidden: Tensor, predicted: Tensor | None) -> Tensor:
        """Argmax over the whole vocabulary, in chunks; scale and soft cap are monotone, so they don't matter."""
        wanted = hidden.new_ones(hidden.shape[:2], dtype=torch.bool)
        if predicted is not None:
            wanted = F.pad(predicted[:, 1:], (0, 1))  # a position's pick is the token after it
        rows = hidden[wanted].to(self.output_weight.dtype)
        output = self.model.get_output_embeddings()
        found = [output(part).argmax(-1) for part in rows.split(_PICK_CHUNK)]
        picks = hidden.new_zeros(hidden.shape[:2], dtype=torch.long)
        picks[wanted] = torch.cat(found)
        return picks

    def teacher(self, hidden: Tensor, token_ids: Tensor) -> Teacher:
        """The distribution over `token_ids` `[d]` at hidden states `[n, target hidden]`."""
        bias = None if self.output_bias is None else self.output_bias[token_ids]
        return Teacher(hidden, self.output_weight[token_ids], self.scale, self.softcap, bias)
