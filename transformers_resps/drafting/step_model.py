"""The interface of a draft model for one target: forward passes over committed tokens and over drafted nodes."""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..verifying.verifier import Verifier
from .cache import DraftCache, Entries


# Selects the tokens of `[b, t]` whose outputs are returned: a slice such as `ALL`, or indices `[b, q]` in each row.
Wanted = slice | Tensor
ALL = slice(None)
# Tensors that a model computes from positions alone, such as the angles of RoPE: `[b or 1, t, any]` each.
Places = tuple[Tensor, ...]
_WINDOW_PARTS = 16  # A sliding window moves in steps of this fraction of its length.
_BLOCK = 64  # Tokens whose largest score `likeliest` computes at once.
_LEAST_BLOCKS = 128  # With fewer blocks of tokens, `topk` of all tokens is as fast on a CPU.


def at_wanted(states: Tensor, wanted: Wanted) -> Tensor:
    """Select the wanted tokens: `[b, t, n]` -> `[b, q, n]`."""
    if isinstance(wanted, slice):
        return states[:, wanted]
    return states.gather(1, wanted[..., None].expand(-1, -1, states.shape[-1]))


def likeliest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return log probabilities and ids, `[..., count]` each, of the likeliest tokens given fp32 logits `[..., d]`.

    On a CPU, `topk` of all tokens takes as long as a layer of a head; so it reads only blocks with the largest maxima.
    """
    scores = logits.log_softmax(dim=-1)
    if scores.device.type != "cpu" or scores.shape[-1] < _LEAST_BLOCKS * _BLOCK:
        values, ids = scores.topk(count, dim=-1)
        return values, ids
    last, missing = scores.shape[-1] - 1, -scores.shape[-1] % _BLOCK
    blocks = (F.pad(scores, (0, missing), value=-torch.inf) if missing else scores).unflatten(-1, (-1, _BLOCK))
    best = blocks.amax(-1).topk(min(count, blocks.shape[-2]), dim=-1).indices[..., None]
    values, places = blocks.gather(-2, best.expand(*best.shape[:-1], _BLOCK)).flatten(-2).topk(count, dim=-1)
    own = best.squeeze(-1).gather(-1, places.div(_BLOCK, rounding_mode="floor"))
    return values, (own * _BLOCK + places % _BLOCK).clamp(max=last)  # padding may be among tokens of probability 0


class StepModel(ABC):
    """A draft model bound to one target. It runs over tokens, each with a hidden state if the model reads features.

    A new kind of drafter implements `modules`, `run` and `logits`, and overrides other defaults that do not fit.

    A depth is one part of the model, such as a layer that drafts one level. Depth 0 pairs token j with the target's
    hidden state at token j - 1, depth k with the output of depth k - 1 at token j - 1. A model with only one depth
    drafts any number of levels with it, and pairs a drafted node with the depth's output at the node's parent.
    """

    depths: int = 1  # number of depths, which draft one level each; 1 if the only depth drafts any number of levels
    reads_features: bool = True  # whether it pairs tokens with hidden states
    has_fixed_places: bool = True  # whether `places` of a position do not depend on the other positions
    counts_padding: bool = True  # whether positions may count padding: true if only their distances matter
    sliding_window: int | None = None  # number of newest positions that it attends to, padding included; `None`: all
    is_compilable: bool = False  # whether its passes may run as compiled or captured code
    proposable_tokens: int  # number of different tokens that it can propose after a node
    device: torch.device  # device of its inputs
    dtype: torch.dtype  # dtype of its hidden states

    @property
    def most_levels(self) -> int | None:
        """Maximum number of levels of a draft; `None` for no limit."""
        return self.depths if self.depths > 1 else None

    @property
    @abstractmethod
    def modules(self) -> nn.ModuleList:
        """All modules whose weights are read while drafting, including modules of the target."""

    @abstractmethod
    def run(
        self, depth: int, tokens: Tensor, hidden: Tensor | None, places: Places, entries: Entries, wanted: Wanted = ALL
    ) -> Tensor:
        """Run depth number `depth` over tokens `[b, t]`; return the outputs `[b, q, h]` at the `wanted` tokens.

        `hidden` `[b, t, h]` is the hidden state paired with each token, `None` if the model reads none. `places` are
        the results of `self.places` for the tokens' positions. `entries` stores the tokens' keys and values, and
        returns all keys and values that they attend to.
        """

    @abstractmethod
    def logits(self, output: Tensor, depth: int = 0) -> Tensor:
        """Compute logits from a depth's outputs: `[b, q, h]` -> fp32 `[b, q, d]`."""

    def fuse(self, features: Tensor) -> Tensor:
        """Compute the hidden states that depth 0 reads from the target's features: `[b, t, F]` -> `[b, t, h]`."""
        return features

    def places(self, positions: Tensor) -> Places:
        """Compute the tensors, such as the angles of RoPE, that `run` needs for positions `[b or 1, t]`."""
        return ()

    def cache(self, verifier: Verifier | None) -> DraftCache:
        """Make the cache for one call. A model that attends to the target's keys and values needs the `verifier`."""
        return DraftCache(device=self.device)

    def children(self, output: Tensor, top_k: int, depth: int = 0) -> tuple[Tensor, Tensor]:
        """Return target ids and fp32 log probabilities, `[b, q, k]` each, of the `top_k` likeliest tokens after each
        output. `top_k` must not exceed `proposable_tokens`.
        """
        scores, draft_ids = likeliest(self.logits(output, depth), top_k)
        return self.target_ids(draft_ids), scores

    def feedback(self, output: Tensor, hidden: Tensor | None) -> Tensor | None:
        """Return hidden states to pair with the next tokens, given a pass's `output` and `hidden`; all `[b, q, h]`."""
        return output if self.reads_features else None

    def target_ids(self, draft_ids: Tensor) -> Tensor:
        """Convert draft vocabulary ids of any shape to target ids."""
        return draft_ids

    def oldest_seen(self, length: int) -> int:
        """Return the position of the oldest token to keep in the cache after a text of `length` tokens."""
        window = self.sliding_window or length
        stride = max(window // _WINDOW_PARTS, 1)  # the window moves in strides, since each move copies the cache
        return max(-(-(length - window) // stride), 0) * stride


class TrainableModel(StepModel):
    """A model that computes logits by a norm and an output head, which training calls separately."""

    @abstractmethod
    def normed(self, output: Tensor, depth: int = 0) -> Tensor:
        """Apply the norm before a depth's output head to the depth's outputs `[..., h]`."""

    @abstractmethod
    def normed_logits(self, normed: Tensor, depth: int = 0) -> Tensor:
        """Compute logits from a depth's normed outputs: `[..., h]` -> fp32 `[..., d]`."""

    @abstractmethod
    def output_rows(self, depth: int = 0) -> tuple[Tensor, Tensor | None]:
        """Return the weight `[d, h]` of a depth's output head, and its bias `[d]`, if any."""

    def logits(self, output: Tensor, depth: int = 0) -> Tensor:
        return self.normed_logits(self.normed(output, depth), depth)
