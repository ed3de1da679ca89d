"""Configurations of draft heads and block heads. Heads in every published layout are converted to these."""

import os
from collections.abc import Iterator
from copy import copy
from typing import Any

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from ..drafting.kinds import BLOCK, EAGLE
from ..hub.upload import shareable
from ..tree import TreeShape


ROPE_BASE = 10000.0  # Default base of RoPE: RoFormer (arXiv 2104.09864) section 3.2.2.
# Supported types of RoPE, named as in Transformers -> the parameters that the type needs.
_ROPE_NEEDS: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "yarn": {"factor"},
    "longrope": {"long_factor", "short_factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}


def default_feature_layers(layer_count: int) -> list[int]:
    """Return the indices of EAGLE-3's low, middle and high hidden state for a target of `layer_count` layers. A very
    shallow target gets fewer than three. Source: EAGLE-3 (arXiv 2503.01840) section 3.1; only its code
    (SafeAILab/EAGLE, `LlamaModel.forward`) gives the numbers: 2, n // 2 and n - 3 of n layers.
    """
    last = max(layer_count - 1, 0)
    return sorted({min(2, last), layer_count // 2, max(layer_count - 3, 0)})


def default_layer_ids(depth: int, count: int) -> list[int]:
    """Return which of `depth` target layers a z-lab head of `count` layers reads: z-lab's `build_target_layer_ids`."""
    if count == 1:
        return [depth // 2]
    return [round(1 + index * (depth - 4) / (count - 1)) for index in range(count)]


def _check_numbers(config: "HeadConfig") -> None:
    """Raise a `ValueError` if a flag is not a bool, or if a number is not positive."""
    for name, kind in config.field_types().items():
        value = getattr(config, name)
        is_positive = isinstance(value, int | float) and not isinstance(value, bool) and value > 0
        if kind is bool:
            is_right, needed = isinstance(value, bool), "True or False"
        elif kind in (float, float | None):
            is_right, needed = is_positive, "a positive number"
        elif kind in (int, int | None) and not name.endswith("_token_id"):
            is_right, needed = is_positive and isinstance(value, int), "a positive integer"
        else:
            continue
        if not is_right and not (value is None and kind in (int | None, float | None)):
            raise ValueError(f"A {config.kind_of_head} got `{name}={value!r}`, but it must be {needed}. Correct it.")


class HeadConfig(PreTrainedConfig):
    """Base class of the heads' configurations, with the fields that all heads have; see `DraftHeadConfig`."""

    kind_of_head = "head"  # in messages

    hidden_size: int = 576
    intermediate_size: int = 1536
    num_attention_heads: int = 9
    num_key_value_heads: int = 3
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rope_parameters: dict[str, Any] | None = None
    initializer_range: float = 0.02
    attention_bias: bool = False
    mlp_bias: bool = False
    feature_layers: list[int] | None = None
    vocab_size: int = 49152
    draft_vocab_size: int | None = None
    owns_output_head: bool = True
    target: dict[str, Any] | None = None
    source: dict[str, Any] | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        rope = self.rope_parameters = self.rope_parameters or {"rope_type": "default", "rope_theta": ROPE_BASE}
        kind = rope.get("rope_type") or rope.get("type", "default")
        if kind not in _ROPE_NEEDS:
            raise ValueError(
                f"A {self.kind_of_head} got RoPE of the kind {kind!r}; known are {sorted(_ROPE_NEEDS)}. Correct "
                "`rope_parameters`."
            )
        missing = sorted(key for key in _ROPE_NEEDS[kind] if rope.get(key) is None)
        if missing:
            raise ValueError(f"RoPE of the kind {kind!r} needs {missing}. Add them to the head's `rope_parameters`.")
        for told in self._misfits():
            raise ValueError(f"A {self.kind_of_head} got {told}.")
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]  # Transformers leaves it untyped

    def _misfits(self) -> Iterator[str]:
        """Yield for each wrong field a text for the error message: its value, what is needed, and what to do."""
        queries, keys, head_dim = self.num_attention_heads, self.num_key_value_heads, self.head_dim or 1
        rope = self.rope_parameters or {}
        theta, share = rope.get("rope_theta", ROPE_BASE), rope.get("partial_rotary_factor", 1.0)
        if not theta > 0:
            yield f"`rope_theta={theta!r}`, but it must be a positive number. Correct it"
        if share != 1.0:
            yield (
                f"RoPE that rotates {share} of each attention head (`partial_rotary_factor`), but only full rotation "
                "is supported. Use another head"
            )
        if (act := self.hidden_act) not in ACT2FN:
            yield f"the activation {act!r}, but Transformers does not know it. Pass the right `hidden_act`"
        if self.draft_vocab_size is not None and not self.owns_output_head:
            yield (
                f"draft_vocab_size={self.draft_vocab_size} and owns_output_head=False, but a draft vocabulary needs "
                "an output head of its own. Leave out one of them"
            )
        if queries % keys:
            yield (
                f"`num_attention_heads={queries}` and `num_key_value_heads={keys}`, but queries share keys evenly. "
                "Make the first a multiple of the second"
            )
        if head_dim % 2:
            yield f"`head_dim={head_dim}`, but RoPE rotates pairs. Pass an even `head_dim`"

    @classmethod
    def field_types(cls) -> dict[str, Any]:
        """Return the type of each field, by name, without the fields of `PreTrainedConfig`."""
        return HeadConfig.__annotations__ | cls.__annotations__

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Save as `PreTrainedConfig` does; if the target's name is a local path, store only the name of the folder."""
        told: Any = copy(self)
        told.target = shareable(told.target)
        super(HeadConfig, told).save_pretrained(save_directory, push_to_hub, **kwargs)

    @property
    def target_width(self) -> int:
        return self.hidden_size

    @property
    def proposable_tokens(self) -> int:
        """Number of tokens the head can propose: the draft vocabulary's size or, without one, the target's."""
        return self.vocab_size if self.draft_vocab_size is None else self.draft_vocab_size


class DraftHeadConfig(HeadConfig):
    """Configuration of a `DraftHead`: its sizes, its conventions, and the target it was made for.

    Fields that are not listed mean the same as in `LlamaConfig`.

    Attributes:
        hidden_size: width h of the head.
        num_hidden_layers: number of decoder layers; published heads have one.
        head_dim: width hd of an attention head; `None` means h divided by `num_attention_heads`.
        max_position_embeddings: used only by RoPE types that depend on it. The head reads texts of any length.
        sliding_window: number of newest positions that the head sees when it drafts; `None` for all. Old positions
            are dropped in groups, so it may see up to 1/16 fewer. In training it sees all.
        rope_parameters: as in Transformers; `None` means unscaled RoPE with base 10,000.
        attention_bias: whether the query, key and value projections have biases; `attention_output_bias` is for the
            output projection, `fc_bias` for `fc`, which fuses the features.
        target_hidden_size: width of the target's hidden states; `None` means h.
        feature_layers: ascending indices of the target's hidden states that the head reads, as in
            `output_hidden_states` of Transformers. 0 is the embedding output; j is the output of decoder layer j - 1
            (of the last layer: before the final norm). `None` means 2, 15 and 27, EAGLE-3's choice for 30 layers.
        before_deepstack: whether the features are read before DeepStack adds image features to them (Qwen3-VL).
        vocab_size: the target's vocabulary size v.
        draft_vocab_size: number d of tokens the head can propose; `None` means all v.
        owns_embedding: whether the head has its own embedding table, not the target's; needed if the widths differ.
        owns_output_head: whether the head has its own output head, not the target's.
        norm_before_residual: whether layer 0's residual connection adds the normed feature (EAGLE-3.1).
        norm_before_fc: whether one RMSNorm is applied to the concatenated features, before `fc`.
        fc_norm: whether each feature layer has an RMSNorm before `fc` (EAGLE-3.1); not with `norm_before_fc`.
        feedback_post_norm: whether the next level's input is the output after `norm` (EAGLE-3.1), not before `norm`.
        qk_norm: whether queries and keys have RMSNorms, as in Qwen3.
        mask_token_id: token of the placeholders in a P-EAGLE head; `None` for other heads.
        parallel_levels: number of tokens that a P-EAGLE head drafts in one pass; `None` for other heads.
        default_tree: total_tokens, depth, top_k and optionally lookup of the tree that is drafted without a policy.
            `None` means 60, 8 and 10, which EAGLE calls 60/7/10.
        target: name and sizes of the model the head was made for; `None` if unknown.
        source: for a converted head, the publisher's format and the layer ids as published.
        tie_word_embeddings: always false: a head stores no copies of the target's weights.

    Raises a `ValueError` that names a field with an invalid value. Source: EAGLE-3 (arXiv 2503.01840) section 3; the
    flags describe how published checkpoints differ.
    """

    model_type = EAGLE.saved_as

    kind_of_head = "draft head"

    num_hidden_layers: int = 1
    rms_norm_eps: float = 1e-5
    sliding_window: int | None = None
    attention_output_bias: bool = False
    fc_bias: bool = False
    target_hidden_size: int | None = None
    before_deepstack: bool = False
    owns_embedding: bool = False
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    feedback_post_norm: bool = False
    qk_norm: bool = False
    mask_token_id: int | None = None
    parallel_levels: int | None = None
    default_tree: list[int] | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        _check_numbers(self)
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.target_hidden_size = self.target_hidden_size or self.hidden_size
        self.feature_layers = [2, 15, 27] if self.feature_layers is None else self.feature_layers
        self.default_tree = [60, 8, 10] if self.default_tree is None else self.default_tree
        super().__post_init__(**kwargs)
        TreeShape(*self.default_tree)  # raises a `ValueError` if no tree has these sizes
        self.feature_layers = sorted(self.feature_layers)

    @property
    def target_width(self) -> int:
        assert self.target_hidden_size is not None
        return self.target_hidden_size

    @property
    def features_width(self) -> int:
        """Width F of the concatenated features: `target_hidden_size` times the number of feature layers."""
        return len(self.feature_layers or ()) * self.target_width

    def _misfits(self) -> Iterator[str]:
        assert self.feature_layers is not None and self.default_tree is not None
        layers, token, levels = self.feature_layers, self.mask_token_id, self.parallel_levels
        are_numbers = all(isinstance(layer, int) and layer >= 0 for layer in layers)
        yield from super()._misfits()
        if not layers or not are_numbers or len(set(layers)) < len(layers):
            yield (
                f"the feature layers {layers!r}, but they must be a list of distinct integers, at least 0. Pass "
                "`feature_layers=[...]`, counted as in `output_hidden_states`"
            )
        if self.norm_before_fc and self.fc_norm:
            yield (
                "both `norm_before_fc` and `fc_norm`, but features are normed once. Keep the one that it was trained "
                "with"
            )
        if (token is None) != (levels is None) or not 0 <= (token or 0) < self.vocab_size:
            yield (
                f"mask_token_id={token} and parallel_levels={levels}, but a P-EAGLE head needs both, and a token from "
                f"0 to {self.vocab_size - 1}. Correct them"
            )
        if not 3 <= len(self.default_tree) <= 4:
            yield (
                f"`default_tree={self.default_tree!r}`, but it must be a list of total_tokens, depth, top_k and "
                "optionally lookup. Write it like [60, 8, 10]"
            )


CORRECTIONS = ("none", "vanilla", "gated", "rnn", "selector")


class BlockHeadConfig(HeadConfig):
    """Configuration of a `BlockHead`: its sizes, its conventions, and the target it was made for.

    Other fields mean the same as in `DraftHeadConfig`. The head is as wide as its target.

    Attributes:
        block_size: number of positions (slots) in a block. The first one, the root, holds the newest token.
        mask_token_id: token in all other slots; a row of the target's embedding table.
        shifted: whether a slot predicts the token of the next position; if false, the token of its own position.
        causal: for each layer, whether a slot cannot attend to later slots.
        windows: for each layer, the number of positions that a slot attends to, including its own; `None` for all.
        embedding_scale: number by which embeddings are multiplied.
        output_multiplier: number by which logits are multiplied, before they are capped.
        final_logit_softcapping: c where logits are capped by c * tanh(logits / c); `None` for no cap.
        correction: how a slot's logits are corrected by the token before the slot: "none"; "vanilla", "gated" or "rnn"
            (DSpark's Markov heads); "selector" (DFlash 2).
        correction_rank: rank r of the correction's tables.
        selector_top_k: number of a slot's likeliest tokens that a "selector" corrects.
        confidence: whether the head also predicts how probably a token is accepted (confidence head).
        confidence_with_markov: whether the confidence head also reads the previous token's row (see `MarkovHead`).
        conv_kernel_size: taps of the convolutions around attention and MLP; `None` for no convolutions.
        conv_group_size: number of channels that share the computed weights of a kernel.
    """

    model_type = BLOCK.saved_as

    kind_of_head = "block head"

    num_hidden_layers: int = 2
    head_dim: int = 64
    rms_norm_eps: float = 1e-6
    block_size: int = 8
    mask_token_id: int = 0
    shifted: bool = False
    causal: list[bool] | None = None
    windows: list[int | None] | None = None
    owns_output_head: bool = False
    embedding_scale: float = 1.0
    output_multiplier: float = 1.0
    final_logit_softcapping: float | None = None
    correction: str = "none"
    correction_rank: int | None = None
    selector_top_k: int | None = None
    confidence: bool = False
    confidence_with_markov: bool = False
    conv_kernel_size: int | None = None
    conv_group_size: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        _check_numbers(self)
        count = self.num_hidden_layers
        self.causal = [False] * count if self.causal is None else self.causal
        self.windows = [None] * count if self.windows is None else self.windows
        self.feature_layers = [2, 9, 15, 21, 28] if self.feature_layers is None else self.feature_layers
        super().__post_init__(**kwargs)

    def _misfits(self) -> Iterator[str]:
        assert self.causal is not None and self.windows is not None and self.feature_layers is not None
        count, slots, layers, rank = self.num_hidden_layers, self.block_size, self.feature_layers, self.correction_rank
        kind, taps, group = self.correction, self.conv_kernel_size or 0, self.conv_group_size
        shortest, least = min(filter(None, self.windows), default=slots), max(2 - self.shifted, taps)
        yield from super()._misfits()
        if kind not in CORRECTIONS:
            yield f"the correction {kind!r}, but known are {list(CORRECTIONS)}. Use one of them"
        if not len(self.causal) == len(self.windows) == count:
            yield (
                f"causal={self.causal} and windows={self.windows}, but each needs one value for each of its {count} "
                "layers. Correct them"
            )
        if shortest < slots:
            yield (
                f"a window of {shortest} positions, but its blocks have {slots} slots, which see each other. Correct "
                "`windows` or `block_size`"
            )
        if self.levels < 1 or taps > slots:
            yield f"block_size={slots}, but it needs {least} slots at least. Correct `block_size`"
        if not 0 <= self.mask_token_id < self.vocab_size:
            yield (
                f"the mask token {self.mask_token_id}, but the table has rows 0 to {self.vocab_size - 1}. Correct "
                "`mask_token_id`"
            )
        if not layers or layers != sorted({layer for layer in layers if layer >= 0}):
            yield (
                f"the feature layers {layers}, but they must be distinct and ascending, counted as in "
                "`output_hidden_states`. Correct `feature_layers`"
            )
        if (kind != "none") != bool(rank) or (kind == "selector") != bool(self.selector_top_k):
            yield (
                f"correction={kind!r}, correction_rank={rank} and selector_top_k={self.selector_top_k}, but a "
                "correction needs a rank, and a selector its number of candidates. Correct them"
            )
        if self.confidence_with_markov and not (self.confidence and kind in CORRECTIONS[1:4]):
            yield "confidence_with_markov=True, but that needs a confidence head and a Markov correction. Correct it"
        if taps and (not group or self.hidden_size % group):
            yield f"conv_group_size={group}, but it must divide the width {self.hidden_size}. Correct it"

    @property
    def levels(self) -> int:
        """Number of tokens that a block drafts."""
        return self.block_size if self.shifted else self.block_size - 1
