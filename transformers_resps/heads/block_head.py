"""A head that drafts a block of tokens in one pass, from the target's hidden states (features).

The positions of a block are called slots. The first slot, the root, holds the newest token; all others hold a mask
token. The module covers DFlash (arXiv 2602.06036), DSpark (arXiv 2607.05147), JetSpec (arXiv 2606.18394) and DFlash 2.
In reading order: the layers, the modules that correct a slot's logits, the head, and the head bound to one target.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any, ClassVar, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP

from ..drafting import ALL, Entries, FileReading, Places, Wanted, at_wanted
from ..drafting.blocks import BlockModel, BlockSlots, Branching, Masks
from ..drafting.step_model import likeliest
from ..tree import TreeShape
from ..verifying.masks import AttentionPattern
from .config import BlockHeadConfig
from .formats.blocks import read_block
from .formats.writing import export_block_head
from .fresh import block_fields, draft_vocabulary, fresh_head, start_layers
from .identity import parameter_fingerprint
from .model import Attend, BoundModel, DraftHead, HeadAttention, HeadModel, Rope, with_masks


_CORRECTED = 64  # A Markov head corrects only this many of a slot's likeliest tokens: DominoTree (arXiv 2607.08642).


class GroupedConvolution(nn.Module):
    """Two causal convolutions over a block's positions, before and after a sublayer (attention or MLP; DFlash 2). Each
    kernel weight is a learnt number of the channel, plus a number computed from the input for a group of channels.
    """

    def __init__(self, config: BlockHeadConfig) -> None:
        super().__init__()
        taps, group = cast(int, config.conv_kernel_size), cast(int, config.conv_group_size)
        self._shape = (2, taps, config.hidden_size // group, 1)
        self.base_kernel = nn.Parameter(torch.zeros(2, taps, config.hidden_size))
        self.kernel_projection = nn.Linear(config.hidden_size, 2 * taps * (config.hidden_size // group), bias=False)

    def forward(self, states: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """Convolve states `[b, q, h]`, apply a sublayer, and convolve its output; return the same shape."""
        own = self.base_kernel.unflatten(-1, (self._shape[2], -1))
        kernels = self.kernel_projection(states).unflatten(-1, self._shape) + own.to(states.dtype)
        return self.convolve(sublayer(self.convolve(states, kernels[:, :, 0])), kernels[:, :, 1])

    @staticmethod
    def convolve(states: Tensor, kernels: Tensor) -> Tensor:
        """Convolve states `[b, q, h]` along q with kernels `[b, q, taps, groups, channels of a group]`."""
        grouped = states.unflatten(-1, (kernels.shape[-2], -1))
        total = kernels[:, :, 0] * grouped
        for tap in range(1, min(kernels.shape[2], states.shape[1])):
            total[:, tap:] += kernels[:, tap:, tap] * grouped[:, :-tap]
        return total.flatten(2)


class BlockLayer(nn.Module):
    """A decoder layer of a block head: maps states `[b, q, h]` of a block's q slots to new states. The slots attend to
    the text and to each other, and the same projections compute the keys and values of both.
    """

    def __init__(self, config: BlockHeadConfig, layer_index: int) -> None:
        super().__init__()
        width, bias = config.hidden_size, config.attention_bias
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = HeadAttention(config, layer_index, width, output_bias=bias, qk_norm=True)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = LlamaMLP(config)
        if config.conv_kernel_size is not None:
            self.attention_conv = GroupedConvolution(config)
            self.mlp_conv = GroupedConvolution(config)
        self.has_convolutions = config.conv_kernel_size is not None

    def forward(self, hidden: Tensor, rope: Rope, attend: Attend) -> Tensor:
        states = self.input_layernorm(hidden)
        if not self.has_convolutions:
            hidden = hidden + self.self_attn(states, rope, attend)
            return hidden + self.mlp(self.post_attention_layernorm(hidden))
        hidden = hidden + self.attention_conv(states, partial(self.self_attn, rope=rope, attend=attend))
        return hidden + self.mlp_conv(self.post_attention_layernorm(hidden), self.mlp)


class MarkovHead(nn.Module):
    """Adds to a slot's logits a term that depends on the token before the slot (DSpark, arXiv 2607.05147).

    The term is the dot product of two vectors of length r: the previous token's row in one table, and the predicted
    token's row in another. Kind "gated" scales the previous token's row by a gate that is computed from the slot's
    output. Kind "rnn" replaces this row by the output of a recurrent network over all earlier tokens of the block.
    """

    def __init__(self, config: BlockHeadConfig) -> None:
        super().__init__()
        self.kind, rank = config.correction, cast(int, config.correction_rank)
        self.candidates = min(_CORRECTED, config.proposable_tokens)
        self.markov_w1 = nn.Embedding(config.vocab_size, rank)
        self.markov_w2 = nn.Linear(rank, config.proposable_tokens, bias=False)
        if self.kind == "gated":
            self.gate_proj = nn.Linear(config.hidden_size + rank, rank)
        if self.kind == "rnn":
            self.joint_proj = nn.Linear(2 * rank + config.hidden_size, 3 * rank)

    def before(self, tokens: Tensor) -> Tensor:
        """Look up the embeddings `[..., r]` of previous tokens, whose target ids are `tokens` `[...]`."""
        return self.markov_w1(tokens)

    def context(self, before: Tensor, hidden: Tensor) -> Tensor:
        """Compute context vectors `[b, D, w, r]` for D slots; their products with `table` are added to the logits.
        `before` `[b, D, w, r]` embeds w possible previous tokens of each slot. `hidden` `[b, D, h]` is slots' outputs.
        """
        if self.kind == "vanilla":
            return before
        hidden = hidden[:, :, None].expand(*before.shape[:-1], -1)
        return torch.sigmoid(self.gate_proj(torch.cat([hidden, before], dim=-1))) * before

    def state_at(self, root: Tensor, first: Tensor | None) -> Tensor:
        """Compute the RNN state `[b, 1, r]` before the first drafted token. It is zero if `first` is `None`. Otherwise
        the RNN reads the root token's embedding `root` `[b, 1, r]` and its slot's output `first` `[b, h]`.
        """
        state = torch.zeros_like(root)
        return state if first is None else self.step(root, first, state)[1]

    def step(self, before: Tensor, hidden: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Advance the RNN by one token, embedded in `before`, on w paths; return contexts and states `[b, w, r]`."""
        hidden = hidden[:, None].expand(-1, before.shape[1], -1)
        gate, new, output = self.joint_proj(torch.cat([state, before, hidden], dim=-1)).chunk(3, dim=-1)
        gate = torch.sigmoid(gate)
        return torch.tanh(output), gate * state + (1.0 - gate) * torch.tanh(new)

    @property
    def table(self) -> Tensor:
        """The table `[d, r]` of predicted tokens, by draft id; the class says what its rows are multiplied by."""
        return self.markov_w2.weight


class CandidateSelector(nn.Module):
    """Adds to the logits of a slot's likeliest tokens a term that depends on the token before the slot (DFlash 2)."""

    def __init__(self, config: BlockHeadConfig) -> None:
        super().__init__()
        rank = cast(int, config.correction_rank)
        self.candidates = min(cast(int, config.selector_top_k), config.proposable_tokens)
        self.predecessor_codebook = nn.Embedding(config.vocab_size, rank)
        self.successor_codebook = nn.Embedding(config.proposable_tokens, rank)
        self.hidden_projection = nn.Linear(config.hidden_size, rank, bias=False)

    def before(self, tokens: Tensor) -> Tensor:
        return self.predecessor_codebook(tokens)

    def context(self, before: Tensor, hidden: Tensor) -> Tensor:
        return before * self.hidden_projection(hidden)[:, :, None]

    @property
    def table(self) -> Tensor:
        return self.successor_codebook.weight


@dataclass(frozen=True, slots=True)
class BlockReading(FileReading):
    """One way to interpret a block head's file. The fields mean the same as in `BlockHeadConfig`."""

    loader: ClassVar[str] = "BlockHead"

    feature_layers: tuple[int, ...]
    shifted: bool
    causal: tuple[bool, ...]
    rope_theta: float
    embedding_scale: float

    @property
    def told(self) -> dict[str, str]:
        causal = {True: "yes", False: "no"}.get(all(self.causal)) if len(set(self.causal)) == 1 else "by layer"
        return {
            "feature layers": ", ".join(map(str, self.feature_layers)),
            "slots": "shifted" if self.shifted else "in place",
            "causal": str(causal),
            "RoPE base": f"{self.rope_theta:g}",
            "embedding scale": f"{self.embedding_scale:g}",
        }


class BlockHead(HeadModel):
    """A head that drafts a block of tokens in one pass; the target verifies the likeliest paths.

    Load a published head with `from_pretrained` or create one with `from_target`, and pass it to `generate` as
    `assistant_model`. The head uses the target's embedding table, without the factor by which some targets scale it.
    It uses the target's output head unless it has its own.
    """

    config_class = BlockHeadConfig
    config: BlockHeadConfig
    base_model_prefix = ""
    main_input_name = "features"
    _no_split_modules = ["BlockLayer"]
    sizing_fields = (*DraftHead.sizing_fields, "block_size", "mask_token_id", "shifted", "causal", "correction")
    _read, _export = staticmethod(read_block), staticmethod(export_block_head)

    def __init__(self, config: BlockHeadConfig) -> None:
        super().__init__(config)
        assert config.feature_layers is not None
        self.fc = nn.Linear(len(config.feature_layers) * config.hidden_size, config.hidden_size, bias=False)
        self.hidden_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.layers = nn.ModuleList(BlockLayer(config, index) for index in range(config.num_hidden_layers))
        self._add_last_parts()
        if config.correction == "selector":
            self.candidate_selector = CandidateSelector(config)
        elif config.correction != "none":
            self.markov_head = MarkovHead(config)
        if config.confidence:
            rank = cast(int, config.correction_rank) if config.confidence_with_markov else 0
            self.confidence_head = nn.ModuleDict({"proj": nn.Linear(config.hidden_size + rank, 1)})
        self.post_init()  # type: ignore[no-untyped-call]  # Transformers leaves it untyped

    @property
    def correction(self) -> MarkovHead | CandidateSelector | None:
        if self.config.correction == "none":
            return None
        return self.candidate_selector if self.config.correction == "selector" else self.markov_head

    def fuse(self, features: Tensor) -> Tensor:
        """Fuse the target's features `[b, t, F]` to `[b, t, h]`, which every layer projects to keys and values."""
        return self.hidden_norm(self.fc(features))

    def write_context(self, fused: Tensor, rope: Rope, entries: Entries) -> None:
        """Project fused features `[b, t, h]` to keys and values of every layer, and store these in `entries`."""
        for index, layer in enumerate(cast(Sequence[BlockLayer], self.layers)):
            entries.update(*layer.self_attn.entries(fused, rope), index)

    def forward(self, embeddings: Tensor, rope: Rope, attend: Attend) -> Tensor:
        """Run the layers and the final norm over the embeddings `[b, q, h]` of blocks' tokens; return `[b, q, h]`."""
        hidden = embeddings
        for layer in self.layers:
            hidden = layer(hidden, rope, attend)
        return self.norm(hidden)

    @property
    def default_shape(self) -> TreeShape:
        return TreeShape(33, self.config.levels, 32)

    def fingerprint(self) -> str:
        return parameter_fingerprint(self)

    def identity(self) -> dict[str, Any]:
        return self._named("block_size", "correction") | {"fingerprint": self.fingerprint()}

    def confidence(self, hidden: Tensor, before: Tensor | None) -> Tensor:
        """Predict the probability that a drafted token is accepted: the overlap of draft and target distributions.

        Returns fp32 logits `[...]` from slots' outputs `[..., h]` and, if any, previous tokens' embeddings `[..., r]`.
        """
        if self.config.confidence_with_markov:
            assert before is not None
            hidden = torch.cat([hidden.expand(*before.shape[:-1], -1), before], dim=-1)
        return self.confidence_head["proj"](hidden).squeeze(-1).float()

    def bind(self, target: PreTrainedModel, forward: Callable[..., Tensor] | None = None) -> "BoundBlockHead":
        return BoundBlockHead(self, target, forward)

    @classmethod
    def from_target(
        cls,
        target: PreTrainedModel,
        draft_vocab_size: int | None = None,
        *,
        draft_token_ids: Tensor | Sequence[int] | None = None,
        feature_layers: list[int] | None = None,
        **overrides: Any,
    ) -> Self:
        """Create an untrained head. Arguments are those of `DraftHead.from_target`; `overrides` are fields of
        `BlockHeadConfig`. By default the head has two causal layers, copied from the target's last layers where
        possible. It reads five feature layers, as in DFlash, and has a Markov correction that starts at zero.
        """
        fields = block_fields(target, feature_layers, overrides)
        head = fresh_head(cls, target, draft_vocabulary(target, draft_vocab_size, draft_token_ids), fields)
        start_layers(head.layers, head.hidden_norm, target)
        if isinstance(head.correction, MarkovHead):
            nn.init.zeros_(head.correction.table)
        return head

    @classmethod
    def untrained(cls, target: PreTrainedModel, draft_token_ids: Tensor | None, levels: int, **fields: Any) -> Self:
        slots = {"block_size": levels + (not fields.get("shifted", True))}
        return cls.from_target(target, draft_token_ids=draft_token_ids, **slots | fields)

    @classmethod
    def of_model(cls, model: PreTrainedModel, target: PreTrainedModel) -> Self:
        return cls.from_pretrained(None, target, config=model.config, state_dict=model.state_dict())

    def readings(self, target: PreTrainedModel, whole: "BlockHead", *, has_images: bool) -> Iterator[BlockReading]:
        """Yield interpretations of the head's file, the configured one first.

        The next ones combine the configured feature layers, or their neighbours, with both values of `shifted` and of
        `causal`. The last ones change only the RoPE base, or only the embedding scale.
        """
        config, (within, (base, *others)) = self.config, self.near(target)
        assert config.causal is not None
        scale, alike = config.embedding_scale, [(flag,) * config.num_hidden_layers for flag in (True, False)]
        kinds = dict.fromkeys([tuple(config.causal), *alike])
        first = BlockReading(within[0], config.shifted, tuple(config.causal), base, scale)
        for layers, shifted, causal in product(within, (config.shifted, not config.shifted), kinds):
            yield BlockReading(layers, shifted, causal, base, scale)
        yield from (replace(first, rope_theta=other) for other in sorted(others))
        yield from (replace(first, embedding_scale=other) for other in {1.0, config.hidden_size**0.5} - {scale})


class BoundBlockHead(BlockModel, BoundModel):
    """A block head together with the parts of its target that it uses."""

    def __init__(self, head: BlockHead, target: PreTrainedModel, forward: Callable[..., Tensor] | None = None) -> None:
        super().__init__(head, target, forward)
        config = self._config = head.config
        assert config.windows is not None and config.causal is not None
        self.block_levels, self.mask_token_id = config.levels, config.mask_token_id
        self.most_children = self.proposable_tokens if head.correction is None else head.correction.candidates
        self.patterns = list(map(AttentionPattern, config.windows, config.causal))
        self.sliding_window = None if None in config.windows else max(filter(None, config.windows))

    def run(
        self, depth: int, tokens: Tensor, hidden: Tensor | None, places: Places, entries: Entries, wanted: Wanted = ALL
    ) -> Tensor:
        """Store in `entries` the keys and values of fused features `hidden`; return `hidden` at `wanted` positions."""
        assert hidden is not None
        self.head.write_context(hidden, Rope(*places), entries)
        return at_wanted(hidden, wanted)

    def width(self, levels: int) -> int:
        """Return how many slots to run: all of a block, or in a causal head only as many as `levels` tokens need."""
        is_causal = all(pattern.is_causal for pattern in self.patterns)
        return levels + (not self._config.shifted) if is_causal else self._config.block_size

    def run_block(self, tokens: Tensor, places: Places, attend: Attend) -> Tensor:
        """Run the head over the tokens `[b, q]` of blocks; return outputs `[b, q, h]` after the final norm."""
        table = self.embed_tokens.weight
        rows = F.embedding(tokens.to(table.device), table)  # not `embed_tokens(tokens)`, which may scale its rows
        embeddings = rows.to(self.device, self.dtype)
        if self._config.embedding_scale != 1.0:
            embeddings = embeddings * self._config.embedding_scale
        return self._forward(embeddings, Rope(*places), attend)

    def predicting(self, output: Tensor, levels: int) -> Tensor:
        """Select from a block's outputs `[..., q, h]` the outputs of slots that predict the next `levels` tokens."""
        return output.narrow(-2, int(not self._config.shifted), levels)

    def fill(
        self, newest: Tensor, root: Tensor, levels: int, places: Places, entries: Entries, masks: Masks
    ) -> BlockSlots:
        tokens = F.pad(root[:, None], (0, self.width(levels) - 1), value=self.mask_token_id)
        output = self.run_block(tokens, places, with_masks(entries, masks))
        hidden = self.predicting(output, levels)
        return BlockSlots(hidden, self.logits(hidden), None if self._config.shifted else output[:, 0])

    def normed(self, output: Tensor, depth: int = 0) -> Tensor:
        multiplier = self._config.output_multiplier
        return output if multiplier == 1.0 else output * multiplier

    def normed_logits(self, normed: Tensor, depth: int = 0) -> Tensor:
        """Compute the output head's logits, not corrected by `MarkovHead` or `CandidateSelector`."""
        logits, cap = super().normed_logits(normed), self._config.final_logit_softcapping
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def branching(self, slots: BlockSlots, root: Tensor, ranks: Tensor) -> Branching:
        correction, logits = self.head.correction, slots.logits
        if correction is None:
            scores, best = likeliest(logits, ranks.shape[0])  # [b, D, k]
            scores = self._sure((scores + ranks)[:, :, None], slots.hidden[:, :, None])
            return Branching(self.target_ids(best), lambda level, chosen, state: (scores[:, level], state))
        # Correct only a slot's likeliest tokens (candidates), and keep the sum of their probabilities.
        base, candidates = likeliest(logits, correction.candidates)  # [b, D, m]
        mass = base.logsumexp(-1)
        tokens, rows = self.target_ids(candidates), F.embedding(candidates, correction.table)  # [b, D, m, r]
        # Embeddings of the tokens that may come before each slot: [b, D, m, r].
        before = correction.before(torch.cat([root[:, None, None].expand_as(tokens[:, :1]), tokens[:, :-1]], dim=1))

        def corrected(context: Tensor, level: slice) -> Tensor:
            """Score m candidates of D' levels after each of w parents: contexts `[b, D', w, r]` -> `[b, D', w, m]`."""
            added = (context @ rows[:, level].transpose(-1, -2)).float()
            scores = (base[:, level, None] + added).log_softmax(-1) + mass[:, level, None, None]
            kept, best = scores.topk(ranks.shape[0], dim=-1)
            return torch.full_like(scores, -torch.inf).scatter_(-1, best, kept + ranks)

        if not isinstance(correction, MarkovHead) or correction.kind != "rnn":
            context = correction.context(before, slots.hidden)
            table = self._sure(corrected(context, ALL), slots.hidden[:, :, None], before)

            def looked_up(level: int, chosen: Tensor | None, state: Tensor | None) -> tuple[Tensor, None]:
                own = table[:, level]
                return own[:, :1] if chosen is None else _rows_at(own, chosen.remainder(own.shape[-1])), None

            return Branching(tokens, looked_up)

        def followed(level: int, chosen: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor]:
            own, count, here = before[:, level], tokens.shape[-1], slice(level, level + 1)
            if chosen is None:
                own, state = own[:, :1], correction.state_at(own[:, :1], slots.first)
            else:
                assert state is not None
                own = _rows_at(own, chosen.remainder(count))
                origin = chosen.div(count, rounding_mode="floor")
                state = _rows_at(state, origin) if level > 1 else state.expand(-1, own.shape[1], -1)
            context, state = correction.step(own, slots.hidden[:, level], state)
            scores = corrected(context[:, None], here)[:, 0]
            return self._sure(scores, slots.hidden[:, level, None], own), state

        return Branching(tokens, followed)

    def _sure(self, scores: Tensor, hidden: Tensor, before: Tensor | None = None) -> Tensor:
        """Add the confidence head's log probabilities, if there are any, to the scores `[..., w, k]` of k children of
        w parents. They depend on slots' outputs `hidden` `[..., 1, h]` and parents' embeddings `before` `[..., w, r]`.
        """
        if not self._config.confidence:
            return scores
        return scores + F.logsigmoid(self.head.confidence(hidden, before))[..., None]


def _rows_at(table: Tensor, places: Tensor) -> Tensor:
    """Select from each row of `table` `[b, p, n]` the vectors at indices `places` `[b, w]`; return `[b, w, n]`."""
    return table.gather(1, places[..., None].expand(-1, -1, table.shape[-1]))
