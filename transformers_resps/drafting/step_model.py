"""A source that goes level by level, bound to one target: its passes over committed tokens and over levels."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from ..verifying.verifier import Verifier
from .cache import DraftCache, Entries


# The positions of `[b, t]` that get an output: a slice, or `[b, q]` positions of each row.
Wanted = slice | Tensor
# What a model computes from positions alone, such as the angles of RoPE: `[b or 1, t, any]` each.
Places = tuple[Tensor, ...]
_WINDOW_PARTS = 16  # The oldest of so many parts of a sliding window leaves as a whole.


def at_wanted(states: Tensor, wanted: Wanted) -> Tensor:
    """Take the wanted positions of `[b, t, n]`: `[b, q, n]`."""
    if isinstance(wanted, slice):
        return states[:, wanted]
    return states.gather(1, wanted[..., None].expand(-1, -1, states.shape[-1]))


class StepModel(ABC):
    """A source as it drafts for one target: passes over tokens, each paired with the hidden state before it, if any.

    A new kind of drafter writes `modules`, `run` and `logits`, and what of the rest differs from the defaults.

    Depth k pairs token j with the output of depth k - 1 at token j - 1; the target's hidden state is that of depth -1.
    With one depth it drafts any number of levels: a node then reads its parent's output.

    Attributes:
        depths: passes with their own weights that draft one level each; 1 for any number of levels.
        reads_features: whether it pairs tokens with hidden states.
        has_fixed_places: whether `places` of a position do not depend on the other positions.
        counts_padding: whether its positions may count a prompt's padding, as where only distances matter.
        sliding_window: how many of a text's newest positions it sees at most; `None` for all. It counts padding.
        is_compilable: whether its passes may run as compiled or captured code.
        proposable_tokens: how many tokens it can propose after a node.
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
        """The most levels that a draft can have; `None` for any number."""
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
            depth: from 0 on.
            tokens: `[b, t]` target vocabulary ids.
            hidden: `[b, t, h]` the state before each token; `None` if it reads none.
            places: `places` of the tokens' positions.
            entries: what the tokens attend to.
            wanted: the tokens whose output is asked for.

        Returns:
            `[b, q, h]` outputs at the wanted tokens.
        """

    @abstractmethod
    def logits(self, output: Tensor, depth: int = 0) -> Tensor:
        """`[b, q, h]` outputs of a depth -> fp32 `[b, q, d]`."""

    def fuse(self, features: Tensor) -> Tensor:
        """`[b, t, F]` features of the target -> `[b, t, h]` hidden states of depth -1."""
        return features

    def places(self, positions: Tensor) -> Places:
        """Compute what `run` needs to know of positions `[b or 1, t]`."""
        return ()

    def cache(self, verifier: Verifier | None) -> DraftCache:
        """Make the cache of one call, whose target is verified by `verifier`."""
        return DraftCache(device=self.device)

    def children(self, output: Tensor, top_k: int, depth: int = 0) -> tuple[Tensor, Tensor]:
        """Propose the `top_k` likeliest tokens after each output, at most `proposable_tokens`: target ids and fp32 log
        probabilities, `[b, q, k]`.
        """
        scores, draft_ids = self.logits(output, depth).log_softmax(dim=-1).topk(top_k, dim=-1)
        return self.target_ids(draft_ids), scores

    def feedback(self, output: Tensor, hidden: Tensor | None) -> Tensor | None:
        """Give what the next token is paired with, by the output and what it was paired with, `[b, q, h]` each."""
        return output if self.reads_features else None

    def target_ids(self, draft_ids: Tensor) -> Tensor:
        """Draft vocabulary ids of any shape -> target ids."""
        return draft_ids

    def oldest_seen(self, length: int) -> int:
        """Position of the oldest token that is seen after a text of `length`.

        It changes every few tokens only, because a cache is moved then.
        """
        window = self.sliding_window or length
        stride = max(window // _WINDOW_PARTS, 1)
        return max(-(-(length - window) // stride), 0) * stride


class TrainableModel(StepModel):
    """A model whose logits are a normed output times the rows of an output head: what training reads."""

    @abstractmethod
    def normed(self, output: Tensor, depth: int = 0) -> Tensor:
        """`[..., h]` outputs of a depth -> what its output head multiplies."""

    @abstractmethod
    def normed_logits(self, normed: Tensor, depth: int = 0) -> Tensor:
        """`[..., h]` normed outputs of a depth -> fp32 `[..., d]`."""

    @abstractmethod
    def output_rows(self, depth: int = 0) -> tuple[Tensor, Tensor | None]:
        """Weight `[d, h]` of a depth's output head, and its bias `[d]`, if any."""

    def logits(self, output: Tensor, depth: int = 0) -> Tensor:
        """`[b, q, h]` outputs of a depth -> fp32 `[b, q, d]`."""
        return self.normed_logits(self.normed(output, depth), depth)
