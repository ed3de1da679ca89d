"""A head together with what it borrows from its target."""

from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..target.prepacking import is_prepacked, prepack
from .modeling import DraftHead


class BoundHead:
    """The head, the target's embedding table and the output rows of the draft vocabulary.

    Made anew for each call of `generate`, so that saving, copying or moving a head never touches its target. The
    head's layers are prepacked, because a level has few rows.

    Raises:
        ValueError: the head belongs to another target, or is on another device.
    """

    def __init__(self, head: DraftHead, target: PreTrainedModel) -> None:
        head.check_target(target)
        table = target.get_input_embeddings()
        if table.weight.device != head.device and not hasattr(table, "_hf_hook"):
            raise ValueError(
                f"The head is on {head.device}, but the target's embedding is on {table.weight.device}. "
                f"Call `head.to('{table.weight.device}')`, or load the head with `target=model`."
            )
        self.head = head if is_prepacked(head) else prepack(head)
        self.embed_tokens = head.embed_tokens if head.config.owns_embedding else table
        output = head.lm_head if head.config.owns_output_head else target.get_output_embeddings()
        self._output = cast(nn.Module, output)
        self.output_weight = cast(Tensor, output.weight)
        self.output_bias = cast(Tensor | None, getattr(output, "bias", None))  # some targets' heads have one
        self.draft_token_ids = None if head.config.draft_vocab_size is None else head.draft_token_ids

    @property
    def modules(self) -> nn.ModuleList:
        """All whose weights drafting reads, the target's included."""
        return nn.ModuleList([self.head, self.embed_tokens, self._output])

    def embed(self, tokens: Tensor) -> Tensor:
        """Target ids `[b, t]` -> `[b, t, h]` in the head's dtype."""
        return cast(Tensor, self.embed_tokens(tokens)).to(self.head.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """`[b, t, h]` before the final norm -> fp32 `[b, t, d]`."""
        return self.normed_logits(cast(Tensor, self.head.norm(hidden)))

    def normed_logits(self, normed: Tensor) -> Tensor:
        """`[..., h]` after the final norm -> fp32 `[..., d]`."""
        logits = cast(Tensor, self._output(normed.to(self.output_weight.dtype)))
        return logits.to(normed.device, torch.float32)  # a borrowed output head may lie on another device

    def target_ids(self, draft_ids: Tensor) -> Tensor:
        """Draft vocabulary ids of any shape -> target ids."""
        return draft_ids if self.draft_token_ids is None else self.draft_token_ids[draft_ids]
