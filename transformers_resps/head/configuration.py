"""The configuration of a draft head: one canonical description for every published EAGLE-3 layout."""

import os
from copy import copy
from typing import Any

from transformers import PreTrainedConfig

from ..hub import shareable


ROPE_BASE = 10000.0  # where nobody names another: RoFormer (arXiv 2104.09864) section 3.2.2


class DraftHeadConfig(PreTrainedConfig):
    """Sizes, conventions and identity of a `DraftHead`.

    Attributes:
        hidden_size: width h of the head.
        intermediate_size: width inside the MLP of a layer.
        num_hidden_layers: decoder layers of the head; published ones have one.
        num_attention_heads: of queries.
        num_key_value_heads: of keys and values, which the query heads share evenly.
        head_dim: width hd of an attention head; `None` means h divided by `num_attention_heads`.
        hidden_act: activation of the MLP, by its name in Transformers.
        rms_norm_eps: of every RMSNorm.
        max_position_embeddings: for RoPE kinds that depend on it; the head itself reads texts of any length.
        rope_parameters: as in Transformers; `None` means unscaled RoPE with base 10,000.
        initializer_range: standard deviation of fresh weights.
        attention_bias: of the projections to queries, keys and values.
        attention_output_bias: of the projection behind the attention.
        mlp_bias: of the MLP's projections.
        fc_bias: of `fc`, which fuses the features.
        target_hidden_size: width of the target's hidden states; `None` means h.
        feature_layers: the target's hidden states the head reads, in the `output_hidden_states` convention of
            Transformers (0 is the embedding output, j the output of decoder layer j - 1), ascending; that of the last
            layer is read before the target's final norm. `None` means 2, 15 and 27, EAGLE-3's of a target with 30
            layers.
        vocab_size: the target's vocabulary size v.
        draft_vocab_size: the head's own vocabulary size d; `None` means v, without `d2t`.
        owns_embedding: the file holds an embedding table, because its width differs from the target's.
        owns_output_head: the file holds an output head; otherwise the target's is borrowed.
        norm_before_residual: the residual of the first layer is the normed feature (speculators; EAGLE-3.1).
        norm_before_fc: one RMSNorm over the concatenated features, before `fc`.
        fc_norm: one RMSNorm per feature layer, before `fc` (EAGLE-3.1). Excludes `norm_before_fc`.
        feedback_post_norm: the next level is fed the output after `norm`, not before it (EAGLE-3.1).
        qk_norm: RMSNorm on queries and keys, as in Qwen3.
        default_tree: total_tokens, depth, top_k and perhaps lookup of the tree used when no policy is given; `None`
            means 60, 8 and 10, which EAGLE calls 60/7/10.
        target: name and sizes of the model the head was made for; `None` where nobody knows.
        source: of an imported head, its publisher's format and layer ids as published.
        bos_token_id: the target's.
        eos_token_id: the target's, one or several.
        pad_token_id: the target's.
        tie_word_embeddings: always false: what a head shares with its target it borrows.

    Source: EAGLE-3 (arXiv 2503.01840) section 3; the flags are those of published checkpoints.
    """

    model_type = "resps_eagle3"

    hidden_size: int = 576
    intermediate_size: int = 1536
    num_hidden_layers: int = 1
    num_attention_heads: int = 9
    num_key_value_heads: int = 3
    head_dim: int | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 2048
    rope_parameters: dict[str, Any] | None = None
    initializer_range: float = 0.02
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    fc_bias: bool = False
    target_hidden_size: int | None = None
    feature_layers: list[int] | None = None
    vocab_size: int = 49152
    draft_vocab_size: int | None = None
    owns_embedding: bool = False
    owns_output_head: bool = True
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    feedback_post_norm: bool = False
    qk_norm: bool = False
    default_tree: list[int] | None = None
    target: dict[str, Any] | None = None
    source: dict[str, Any] | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.target_hidden_size is None:
            self.target_hidden_size = self.hidden_size
        if self.feature_layers is None:
            self.feature_layers = [2, 15, 27]
        if self.rope_parameters is None:
            self.rope_parameters = {"rope_type": "default", "rope_theta": ROPE_BASE}
        if self.default_tree is None:
            self.default_tree = [60, 8, 10]
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]  # Transformers leaves it untyped

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """As in Transformers; of a target that lies in a folder here the last part of its path is written alone."""
        told = copy(self)
        told.target = shareable(self.target)
        super(DraftHeadConfig, told).save_pretrained(save_directory, push_to_hub, **kwargs)

    @property
    def draft_rows(self) -> int:
        """Tokens the head can propose: d, or v without a draft vocabulary."""
        return self.vocab_size if self.draft_vocab_size is None else self.draft_vocab_size

    @property
    def features_width(self) -> int:
        """Width F of the concatenated features: `target_hidden_size` for each feature layer."""
        assert self.feature_layers is not None and self.target_hidden_size is not None
        return len(self.feature_layers) * self.target_hidden_size
