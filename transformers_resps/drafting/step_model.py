"""A source that goes level by level, as it runs below one target: passes over committed tokens, and over levels."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..verifying.attention import attend
from ..verifying.verifier import Verifier


# Which positions of `[b, t]` get an output: a slice, or `[b, q]` positions of each row
Wanted = slice | Tensor
_WINDOW_PARTS = 16  # of a sliding window, of which the oldest leaves as a whole
# What a model computes from positions alone, such as the angles of RoPE: `[b or 1, t, any]` each
Places = tuple[Tensor, ...]


def at_wanted(states: Tensor, wanted: Wanted) -> Tensor:
    """`[b, t, n]` -> `[b, q, n]`."""
    if isinstance(wanted, slice):
        return states[:, wanted]
    return states.gather(1, wanted[..., None].expand(-1, -1, states.shape[-1]))


class Entries(ABC):
    """What the tokens of one pass attend to, and where their own keys and values go.

    Layers of Transformers take it as their cache, and `mask` as their attention mask.

    Attributes:
        mask: `[b or 1, 1 or heads that share keys, q, s]` bool over the s entries that `update` returns, true where
            attended; `None` where plain causal attention, or attention to everything from one query, will do.
        first_slot: of the s entries; those from slot 0 on are the text's, in its order.
        is_compileable: asked by models of Transformers.
    """

    mask: Tensor | None = None
    first_slot: int = 0
    is_compileable: bool = False

    @abstractmethod
    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Keep the keys and values `[b, kv heads, t, hd]` of the pass; return all that its tokens may attend to."""

    def __call__(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attention of the queries `[b, heads, q, hd]` of the newest q of the t tokens, as `[b, heads, q, hd]`."""
        return self._attended(queries, *self.update(keys, values, layer))

    def _attended(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return attend(queries, keys, values, None if self.mask is None else self.mask[:, :, -queries.shape[2] :])

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Asked by models of Transformers, which get positions and a mask all the same."""
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Asked where `mask` is `None`."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Asked where `mask` is `None`: the tokens of the pass alone make a causal mask, or one needs none."""
        return query_length, 0


class StepModel(ABC):
    """A source as it drafts for one target: passes over tokens, each paired with the hidden state before it, if any.

    Depth k pairs token j with the output of depth k - 1 at token j - 1; the target's hidden state is that of depth -1.
    With one depth it drafts any number of levels: a node then reads its parent's output.

    Attributes:
        depths: passes with weights of their own, each of which drafts one level; 1 for any number of levels.
        reads_features: whether it pairs tokens with hidden states.
        reads_target: whether it has no keys of its own, and attends to the target's committed ones.
        rereads_target: whether deeper depths or levels, too, read the target's hidden state in place of an output.
        fuses_by_weights: whether `fuse` multiplies by a matrix.
        needs_all_queries: whether a pass computes every output, wanted or not.
        is_compilable: whether a level may run as compiled or captured code.
        mask_copies: heads that share keys, where `run` wants a mask for each of them.
        entry_widths: kv heads and elements of each layer's keys and values, for a cache that is made beforehand.
        has_fixed_places: whether `places` of a position do not depend on the other positions.
        counts_padding: whether its positions may count a prompt's padding, as where only distances matter.
        sliding_window: how many of a text's newest positions it sees at most; `None` for all. It counts padding.
        proposable_tokens: how many tokens it can propose after a node.
        device: of its inputs.
        dtype: of its hidden states.
    """

    depths: int = 1
    reads_features: bool = True
    reads_target: bool = False
    rereads_target: bool = False
    fuses_by_weights: bool = False
    needs_all_queries: bool = True
    has_fixed_places: bool = True
    counts_padding: bool = True
    sliding_window: int | None = None
    is_compilable: bool = False
    mask_copies: int = 1
    entry_widths: Sequence[tuple[int, int]] = ()
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
        """All whose weights drafting reads, the target's included."""

    def oldest_seen(self, length: int) -> int:
        """The first of the positions that are seen after a text of so many: one that changes every few tokens only,
        because a cache is moved then.
        """
        window = self.sliding_window or length
        stride = max(window // _WINDOW_PARTS, 1)
        return max(-(-(length - window) // stride), 0) * stride

    @abstractmethod
    def fuse(self, features: Tensor) -> Tensor:
        """`[b, t, F]` features of the target -> `[b, t, h]` hidden states of depth -1."""

    @abstractmethod
    def places(self, positions: Tensor) -> Places:
        """What `run` needs to know of positions `[b or 1, t]`."""

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
        """One pass.

        Args:
            depth: from 0 on.
            tokens: `[b, t]` target vocabulary ids.
            hidden: `[b, t, h]` the state before each token; `None` if it reads none.
            places: of the tokens.
            entries: what they attend to.
            wanted: the tokens whose output is asked for.

        Returns:
            `[b, q, h]` outputs at the wanted tokens.
        """

    def target_entries(self, verifier: Verifier) -> Entries:
        """What a model with `reads_target` attends to below the newest tokens."""
        raise NotImplementedError(f"{type(self).__name__} has keys of its own.")

    @abstractmethod
    def logits(self, output: Tensor, depth: int = 0) -> Tensor:
        """`[b, q, h]` outputs of a depth -> fp32 `[b, q, d]`."""

    def children(self, output: Tensor, top_k: int, depth: int = 0) -> tuple[Tensor, Tensor]:
        """The `top_k` likeliest tokens after each output, at most `proposable_tokens`: target ids and fp32 log
        probabilities, `[b, q, k]`.
        """
        scores, draft_ids = self.logits(output, depth).log_softmax(dim=-1).topk(top_k, dim=-1)
        return self.target_ids(draft_ids), scores

    def feedback(self, output: Tensor) -> Tensor:
        """What the next token is paired with: `[b, q, h]` outputs -> `[b, q, h]`."""
        return output

    def target_ids(self, draft_ids: Tensor) -> Tensor:
        """Draft vocabulary ids of any shape -> target ids."""
        return draft_ids


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
