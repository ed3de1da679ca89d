"""The EAGLE-3 draft head: reads the target's features, proposes the tokens after next.

Knows nothing of trees, policies or how it is decoded.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..tree import TreeShape
from .configuration import DraftHeadConfig
from .formats import canonical_head, export_head, given_checkpoint, read_checkpoint, refuse_inexact, split_keywords
from .fresh import draft_vocabulary, fresh_config, start_from
from .identity import refuse_no_model, target_identity
from .layer import Attend, DraftLayer
from .publishing import PublishableHead
from .rotary import RotaryEmbedding


class DraftHead(PublishableHead):
    """An EAGLE-3 head in canonical layout.

    A position pairs the target's feature at token t with the embedding of token t + 1 and predicts token t + 2. What
    the head shares with its target, the embedding table and (with a full draft vocabulary) the output head, is
    borrowed when decoding and stored nowhere: see `BoundHead`. On a processor decoding packs its layers: after weights
    were written through `.data`, as PEFT's merge does, call `pack(head)`.
    """

    config_class = DraftHeadConfig
    config: DraftHeadConfig
    base_model_prefix = ""
    main_input_name = "features"
    _no_split_modules = ["DraftLayer"]

    def __init__(self, config: DraftHeadConfig) -> None:
        super().__init__(config)
        assert config.feature_layers is not None and config.target_hidden_size is not None
        layer_count = len(config.feature_layers)
        if config.norm_before_fc:
            self.input_norm = nn.RMSNorm(config.features_width, eps=config.rms_norm_eps)
        if config.fc_norm:
            self.fc_norm = nn.ModuleList(
                nn.RMSNorm(config.target_hidden_size, eps=config.rms_norm_eps) for _ in range(layer_count)
            )
        if config.owns_embedding:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.fc = nn.Linear(config.features_width, config.hidden_size, bias=config.fc_bias)
        self.layers = nn.ModuleList(DraftLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if config.owns_output_head:
            self.lm_head = nn.Linear(config.hidden_size, config.draft_rows, bias=False)
        if config.draft_vocab_size is not None:
            # Offsets, as published: the target id of draft id i is i + d2t[i].
            self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.long))
        self.rotary_emb = RotaryEmbedding(config)
        self.post_init()  # type: ignore[no-untyped-call]  # Transformers leaves it untyped

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        """Transformers' own assisted generation asks for `generation_config` first: who forgot `attach` is told."""
        if name == "generation_config":
            raise AttributeError(
                "A DraftHead has no `generation_config`: it is no whole model, as the assistants of Transformers are. "
                "Its trees need a model that is attached. Call `transformers_resps.attach(model)` before "
                "`model.generate(..., assistant_model=head)`."
            )
        return super().__getattr__(name)

    def fuse(self, features: Tensor) -> Tensor:
        """The target's features `[b, t, F]` -> fused `[b, t, h]`."""
        if self.config.norm_before_fc:
            features = self.input_norm(features)
        if self.config.fc_norm:
            parts = features.chunk(len(self.fc_norm), dim=-1)
            features = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], dim=-1)
        return cast(Tensor, self.fc(features))

    def forward(
        self, hidden: Tensor, embeddings: Tensor, positions: Tensor, attend: Attend, *, newest_only: bool = False
    ) -> Tensor:
        """One pass over positions in parallel.

        Args:
            hidden: `[b, t, h]`: fused features, or the previous level's `feedback`.
            embeddings: `[b, t, h]` of the token after each feature.
            positions: `[b, t]` RoPE positions.
            attend: attention over what the caller keeps (see `HeadCache`).
            newest_only: compute the output of the last position alone. A prompt's other positions are read for their
                keys and values, a third of the work.

        Returns:
            `[b, t or 1, h]`, before the final norm.
        """
        rope = self.rotary_emb(hidden, positions)
        for layer in self.layers:
            wanted = slice(-1, None) if newest_only and layer is self.layers[-1] else slice(None)
            hidden = layer(hidden, embeddings, rope, attend, wanted)
        return hidden

    def feedback(self, hidden: Tensor) -> Tensor:
        """What the next level reads in place of a fused feature: `[b, t, h]`."""
        return cast(Tensor, self.norm(hidden)) if self.config.feedback_post_norm else hidden

    @property
    def draft_token_ids(self) -> Tensor:
        """Target ids of the draft vocabulary `[d]`, ascending."""
        if self.config.draft_vocab_size is None:
            return torch.arange(self.config.vocab_size, device=self.device)
        offsets = cast(Tensor, self.d2t)
        return torch.arange(len(offsets), device=offsets.device) + offsets

    @property
    def default_shape(self) -> TreeShape:
        """The tree used when `generate` gets no policy."""
        assert self.config.default_tree is not None
        return TreeShape(*self.config.default_tree)

    @classmethod
    def from_target(
        cls,
        target: PreTrainedModel,
        draft_vocab_size: int | None = None,
        *,
        draft_token_ids: Tensor | Sequence[int] | None = None,
        feature_layers: list[int] | None = None,
        **overrides: Any,
    ) -> "DraftHead":
        """A fresh, untrained head for `target`, in its dtype and on its device.

        Args:
            target: the model whose features the head will read.
            draft_vocab_size: tokens the head can propose; `None` for all, with the target's own output head.
            draft_token_ids: which target ids those are, `[d]`, in any order; the lowest ids when `None`.
            feature_layers: as in `DraftHeadConfig`; EAGLE-3's low, middle and high layer when `None`.
            overrides: any other field of `DraftHeadConfig`.

        Raises:
            ValueError: the draft vocabulary is no part of the target's, or no head of this target can have such a
                config.
        """
        rows = draft_vocabulary(target, draft_vocab_size, draft_token_ids)
        head = cls(fresh_config(target, None if rows is None else len(rows), feature_layers, overrides))
        head.to(device=target.device, dtype=target.dtype)  # type: ignore[call-arg]  # wrapped by Transformers
        start_from(head, target, rows)
        return head

    @classmethod
    def from_pretrained(  # type: ignore[override]  # the target is ours
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        target: PreTrainedModel | None = None,
        **keywords: Any,
    ) -> "DraftHead":
        """A head of ours or in any published EAGLE-3 layout, recognised by its tensors.

        Args:
            pretrained_model_name_or_path: Hub id or folder; `None` with `config` and `state_dict` among the keywords.
            target: the model it will draft for: gives what the config leaves out (layers, sizes), is checked, and
                decides dtype and device unless they are passed.
            keywords: `revision` and the other loading arguments of Transformers; and any field of `DraftHeadConfig`,
                or `rope_theta`, to correct what the config says, as `resps doctor` suggests; `sliding_window=None`
                reads a head without the window of its layers.

        Raises:
            ValueError: the files are damaged or incomplete, hold another kind of drafter, contradict each other, or do
                not fit `target`. Nothing is ever newly initialized.
        """
        hub, loading, overrides = split_keywords(keywords)
        if target is not None:
            refuse_no_model(target)
        if "torch_dtype" in loading:
            loading["dtype"] = loading.pop("torch_dtype")
        stated, given = loading.pop("config", None), loading.pop("state_dict", None)
        name = pretrained_model_name_or_path
        if name is None or given is not None:
            checkpoint = given_checkpoint(name, stated, given)
        else:
            checkpoint = read_checkpoint(name, **hub)
            if stated is not None:  # as `AutoModel` passes it
                checkpoint = replace(checkpoint, config=stated.to_dict())
        if checkpoint.commit is not None:  # a branch that moves meanwhile must not mix two heads
            hub |= {"revision": checkpoint.commit, "force_download": False}
        config, tensors = canonical_head(checkpoint, target, overrides)
        with torch.device("meta"):
            wanted = cls(config)
        refuse_inexact(wanted.state_dict(), tensors, checkpoint.name)
        if target is not None:
            wanted.check_target(target)
            loading.setdefault("dtype", target.dtype)
        if checkpoint.is_canonical and name is not None:
            head = super().from_pretrained(name, config=config, **hub, **loading)
        else:
            loading.setdefault("dtype", tensors["fc.weight"].dtype)
            head = super().from_pretrained(None, config=config, state_dict=tensors, **loading)
            head.name_or_path = head.config.name_or_path = stated.name_or_path if name is None else checkpoint.name
        if target is not None and "device_map" not in loading:
            head.to(device=target.device)  # type: ignore[call-arg]  # wrapped by Transformers
        return head

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *args: Any, format: str = "resps", **keywords: Any
    ) -> None:
        """Write the head, in our own format or for other engines.

        Args:
            save_directory: made when missing.
            args: as in Transformers; own format only.
            format: "resps"; "specforge" for SGLang, vLLM and llama.cpp; "speculators" for vLLM. An engine that is
                older than a field of the head drops it without a word: see docs/train-a-head.md.
            keywords: as in Transformers; own format only.

        Raises:
            ValueError: the format is unknown, cannot say what this head does, or is another's and gets options.
        """
        if format == "resps":
            super().save_pretrained(save_directory, *args, **keywords)
            return
        if args or keywords:
            raise ValueError(
                f"`save_pretrained(format={format!r})` got {sorted(keywords) or list(args)}, but an export for other "
                "engines is one folder on this machine, without options. Leave them out; to publish the folder, use "
                "`huggingface_hub.upload_folder`."
            )
        export_head(self, self.config, Path(save_directory), format)

    def check_target(self, target: PreTrainedModel) -> None:
        """Refuse a target the head was not made for.

        Raises:
            ValueError: a size differs; the message names both models.
        """
        refuse_no_model(target)
        theirs = target_identity(target)
        ours = self.config.target or {}
        needed: dict[str, Any] = {
            "vocab_size": self.config.vocab_size,
            "hidden_size": self.config.target_hidden_size,
            **{key: ours[key] for key in ("num_hidden_layers", "model_type") if key in ours},
        }
        wrong = [f"{key} {needed[key]} (this target: {theirs[key]})" for key in needed if needed[key] != theirs[key]]
        if wrong:
            raise ValueError(
                f"This head was made for {ours.get('name_or_path') or 'another target'}, not for "
                f"{theirs['name_or_path'] or type(target).__name__}: it needs {', '.join(wrong)}. Load the head that "
                "belongs to this target, or train one with training/train_head.py."
            )
