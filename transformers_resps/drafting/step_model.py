"""The interface of a draft model that is bound to one target: its passes over committed tokens and drafted nodes."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from ..verifying.verifier import Verifier
from .cache import DraftCache, Entries


# The tokens of `[b, t]` that get an output: a slice, or `[b, q]` indices in each row.
Wanted = slice | Tensor
# Tensors that a model computes from positions alone, such as the angles of RoPE: `[b or 1, t, any]` each.
Places = tuple[Tensor, ...]
_WINDOW_PARTS = 16  # A sliding window moves in steps of this fraction of its length.


def at_wanted(states: Tensor, wanted: Wanted) -> Tensor:
    """Select the wanted tokens: `[b, t, n]` -> `[b, q, n]`."""
    if isinstance(wanted, slice):
        return states[:, wanted]
    return states.gather(1, wanted[..., None].expand(-1, -1, states.shape[-1]))


class StepModel(ABC):
    """A draft model bound to one target. It runs over tokens, each paired with the hidden state before it, if any.

    A new kind of drafter implements `modules`, `run` and `logits`, and overrides other defaults that do not fit.

    Depth k pairs token j with the output of depth k - 1 at token j - 1; the target's hidden states count as depth -1.
    A model with a single depth drafts any number of levels, and pairs a node with its parent's output.

    Attributes:
        depths: number of passes with weights of their own, which draft one level each; 1 for any number of levels.
        reads_features: whether it pairs tokens with hidden states.
        has_fixed_places: whether the `places` of a position do not depend on the other positions.
        counts_padding: whether positions may include a prompt's padding, for instance if only distances matter.
        sliding_window: maximum number of newest positions that it attends to, padding included; `None` for all.
        is_compilable: whether its passes may run as compiled or captured code.
        proposable_tokens: number of different tokens that it can propose after a node.
        device: device of its inputs.
        dtype: dtype of its hidden states.
    """

    depths: int = 1
    reads_features: bool = True
    has_fixed_places: bool = True
    counts_padding: bool = True
    sliding_window: int | None = None
    is_compilable: bool = False
    proposable_tokens: int
    device: torch.device
    dtype: torch.dtype

    @property
    def most_levels(self) -> int | None:
        """Maximum number of levels of a draft; `None` for no limit."""
        return self.depths if self.depths > 1 else None

    @property
    @abstractmethod
    def modules(self) -> nn.ModuleList:
        """All modules whose weights drafting reads, the target's included."""

    @abstractmethod
    def run(
        self,
        depth: int,
        tokens: Tensor,
        hidden: Tensor | None,
        places: Places,
        entries: Entries,
        wanted: Wanted = slice(None),
    ) -> Tensor:
        """Run one depth over tokens.

        Args:
            depth: index of the depth, from 0 on.
            tokens: `[b, t]` target vocabulary ids.
            hidden: `[b, t, h]` the hidden state before each token; `None` if the model reads none.
            places: result of `places` for the tokens' positions.
            entries: keys and values that the tokens attend to; takes those of the tokens.
            wanted: the tokens whose outputs are returned.

        Returns:
            `[b, q, h]` outputs at the wanted tokens.
        """

    @abstractmethod
    def logits(self, output: Tensor, depth: int = 0) -> Tensor:
        """Compute logits from a depth's outputs: `[b, q, h]` -> fp32 `[b, q, d]`."""

    def fuse(self, features: Tensor) -> Tensor:
        """Compute hidden states of depth -1 from the target's features: `[b, t, F]` -> `[b, t, h]`."""
        return features

    def places(self, positions: Tensor) -> Places:
        """Compute the tensors that `run` needs for positions `[b or 1, t]`."""
        return ()

    def cache(self, verifier: Verifier | None) -> DraftCache:
        """Make the cache of one call; `verifier` is for models that attend to the target's cache."""
        return DraftCache(device=self.device)

    def children(self, output: Tensor, top_k: int, depth: int = 0) -> tuple[Tensor, Tensor]:
        """Return target ids and fp32 log probabilities, `[b, q, k]` each, of the likeliest tokens after each output.

        `top_k` must not exceed `proposable_tokens`.
        """
        scores, draft_ids = self.logits(output, depth).log_softmax(dim=-1).topk(top_k, dim=-1)
        return self.target_ids(draft_ids), scores

    def feedback(self, output: Tensor, hidden: Tensor | None) -> Tensor | None:
        """Return the states to pair the next tokens with, given this pass's outputs and `hidden`; all `[b, q, h]`."""
        return output if self.reads_features else None

    def target_ids(self, draft_ids: Tensor) -> Tensor:
        """Convert draft vocabulary ids of any shape to target ids."""
        return draft_ids

    def oldest_seen(self, length: int) -> int:
        """Return the position of the oldest token that may be attended to after a text of `length`.

        It changes only every few tokens, because each change moves the cache.
        """
        window = self.sliding_window or length
        stride = max(window // _WINDOW_PARTS, 1)
        return max(-(-(length - window) // stride), 0) * stride


class TrainableModel(StepModel):
    """A model whose logits are normed outputs times the weight of an output head; training uses these parts."""

    @abstractmethod
    def normed(self, output: Tensor, depth: int = 0) -> Tensor:
        """Norm a depth's outputs `[..., h]` for its output head."""

    @abstractmethod
    def normed_logits(self, normed: Tensor, depth: int = 0) -> Tensor:
        """Compute logits from a depth's normed outputs: `[..., h]` -> fp32 `[..., d]`."""

    @abstractmethod
    def output_rows(self, depth: int = 0) -> tuple[Tensor, Tensor | None]:
        """Return the weight `[d, h]` of a depth's output head, and its bias `[d]`, if any."""

    def logits(self, output: Tensor, depth: int = 0) -> Tensor:
        return self.normed_logits(self.normed(output, depth), depth)
