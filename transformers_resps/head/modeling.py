"""The EAGLE-3 draft head: reads the target's features and proposes tokens."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..tree import TreeShape
from .configuration import DraftHeadConfig
from .formats import canonical_head, check_exact, export_head, read_checkpoint
from .fresh import draft_vocabulary, fresh_config, start_from
from .identity import check_is_model, target_identity
from .layer import Attend, DraftLayer, Rope, Wanted
from .loading_options import split_keywords
from .publishing import PublishableHead
from .rotary import RotaryEmbedding


class DraftHead(PublishableHead):
    """An EAGLE-3 draft head: reads the target's hidden states and proposes tokens, which the target then verifies.

    Load a published head with `from_pretrained`, or make a new one with `from_target`, and pass it to `generate` as
    `assistant_model`.

    A position pairs the target's feature at token t with the embedding of token t + 1 and predicts token t + 2. The
    embedding table and, with a full draft vocabulary, the output head are usually the target's: the head uses them
    when it decodes and does not store them. On CPU, decoding prepacks the head's weights: call `prepack(head)` after
    weights were written through `.data`, as PEFT's merge does. Decoding calls the parts of the head: hooks on its
    layers and modules fire, hooks on the head itself fire in `forward` alone.
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
            self.lm_head = nn.Linear(config.hidden_size, config.proposable_tokens, bias=False)
        if config.draft_vocab_size is not None:
            # Offsets, as published: the target id of draft id i is i + d2t[i].
            self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.long))
        self.rotary_emb = RotaryEmbedding(config)
        self._fingerprint: tuple[tuple[int, int] | None, str] = (None, "")  # of which version of `fc`, and what it is
        self.post_init()  # type: ignore[no-untyped-call]  # Transformers leaves it untyped

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        """Transformers' own assisted generation reads `generation_config` first: say that `attach` is missing."""
        if name == "generation_config":
            raise AttributeError(
                "A `DraftHead` has no `generation_config`: it is not a whole model, as other assistants are. "
                "Call `transformers_resps.attach(model)` before `model.generate(..., assistant_model=head)`."
            )
        return super().__getattr__(name)

    def fuse(self, features: Tensor) -> Tensor:
        """Fuse the target's features: `[b, t, F]` -> `[b, t, h]`."""
        if self.config.norm_before_fc:
            features = self.input_norm(features)
        if self.config.fc_norm:
            parts = features.chunk(len(self.fc_norm), dim=-1)
            features = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], dim=-1)
        return cast(Tensor, self.fc(features))

    def forward(
        self,
        hidden: Tensor,
        embeddings: Tensor,
        positions: Tensor,
        attend: Attend,
        *,
        wanted: Wanted = slice(None),
    ) -> Tensor:
        """Run the head's layers over all positions in parallel.

        Args:
            hidden: `[b, t, h]` fused features, or the previous level's `feedback`.
            embeddings: `[b, t, h]` embeddings of the token after each feature.
            positions: `[b, t]` RoPE positions.
            attend: attention over the keys and values that the caller keeps (see `HeadCache`).
            wanted: the positions whose output is computed, a slice or `[b, q]` of each text. The others
                give only their keys and values, which is a third of the work.

        Returns:
            `[b, q, h]` hidden states, before the final norm.
        """
        return self.run_layers(hidden, embeddings, self.rope(positions), attend, wanted)

    def rope(self, positions: Tensor) -> Rope:
        """The angles of RoPE at positions `[b, t]`, which any number of `run_layers` may share."""
        cosine, sine = self.rotary_emb(self.norm.weight, positions)
        return Rope.of(cosine, sine)

    def run_layers(
        self, hidden: Tensor, embeddings: Tensor, rope: Rope, attend: Attend, wanted: Wanted = slice(None)
    ) -> Tensor:
        """As `forward`, at positions whose `rope` is known."""
        for layer in self.layers:
            is_last = layer is self.layers[-1]
            hidden = layer(hidden, embeddings, rope, attend, wanted if is_last else slice(None))
        return hidden

    def get_input_embeddings(self) -> nn.Embedding | None:  # type: ignore[override]  # PEFT asks when it saves adapters
        """The embeddings of the head's own; `None` where it reads the target's."""
        return self.embed_tokens if self.config.owns_embedding else None  # type: ignore[no-any-return]

    def feedback(self, hidden: Tensor) -> Tensor:
        """What the next level reads in place of fused features: `[b, t, h]` -> `[b, t, h]`."""
        return cast(Tensor, self.norm(hidden)) if self.config.feedback_post_norm else hidden

    @property
    def draft_token_ids(self) -> Tensor:
        """Target ids of the tokens the head can propose, `[d]`, ascending."""
        if self.config.draft_vocab_size is None:
            return torch.arange(self.config.vocab_size, device=self.device)
        offsets = cast(Tensor, self.d2t)
        return torch.arange(len(offsets), device=offsets.device) + offsets

    @property
    def default_shape(self) -> TreeShape:
        """The tree that is used when `generate` gets no policy."""
        assert self.config.default_tree is not None
        return TreeShape(*self.config.default_tree)

    def fingerprint(self) -> str:
        """Hash the weights that read the features (`fc`): 16 hexadecimal digits.

        The hash changes when the head is trained further. It is the same in float32 and bfloat16, however the head
        was saved.
        """
        weight = self.fc.weight.detach()
        version = None if weight.is_inference() else (weight.data_ptr(), weight._version)
        if version is None or version != self._fingerprint[0]:
            raw = weight.to("cpu", torch.bfloat16).contiguous().view(torch.uint8)
            self._fingerprint = (version, hashlib.sha256(raw.numpy().tobytes()).hexdigest()[:16])
        return self._fingerprint[1]

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
        """Make a new, untrained head for `target`, in its dtype and on its device.

        Args:
            target: the model whose features the head will read.
            draft_vocab_size: number d of tokens the head can propose; `None` for all, with the target's output head.
            draft_token_ids: the target ids of these tokens, `[d]`, in any order; `None` for the lowest ids.
            feature_layers: as in `DraftHeadConfig`; `None` for EAGLE-3's low, middle and high layer.
            overrides: any other field of `DraftHeadConfig`.

        Returns:
            The head. Train it before use: see docs/train-a-head.md.

        Raises:
            ValueError: the draft vocabulary is not part of the target's, or a head of this target cannot have this
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
        """Load a head saved by this package, or one in a published EAGLE-3 layout, recognised by its tensors.

        Args:
            pretrained_model_name_or_path: Hub id or folder; `None` if `config` and `state_dict` are passed instead.
            target: the model the head will draft for. It is checked, gives sizes that the config leaves out, and
                decides the dtype and device unless they are passed.
            keywords: `revision` and the other loading arguments of Transformers. Also any field of `DraftHeadConfig`,
                or `rope_theta`, to correct the head's config as `resps doctor` suggests; `sliding_window=None` ignores
                a sliding window.

        Returns:
            The head, with every weight read from the files: nothing is newly initialized.

        Raises:
            ValueError: the files are damaged or incomplete, hold another kind of drafter, contradict each other, or do
                not fit `target`.
        """
        hub, loading, overrides = split_keywords(keywords)
        if target is not None:
            check_is_model(target)
        name, stated = pretrained_model_name_or_path, loading.pop("config", None)
        checkpoint = read_checkpoint(name, stated, loading.pop("state_dict", None), **hub)
        config, tensors = canonical_head(checkpoint, target, overrides)
        with torch.device("meta"):
            wanted = cls(config)
        check_exact(wanted.state_dict(), tensors, checkpoint.name)
        if target is not None:
            wanted.check_target(target)
            loading.setdefault("dtype", target.dtype)
        loading.setdefault("dtype", tensors["fc.weight"].dtype)
        head = super().from_pretrained(None, config=config, state_dict=tensors, **loading)
        head.name_or_path = head.config.name_or_path = stated.name_or_path if name is None else checkpoint.name
        if target is not None and "device_map" not in loading:
            head.to(device=target.device)  # type: ignore[call-arg]  # wrapped by Transformers
        return head

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *args: Any, format: str = "resps", **keywords: Any
    ) -> None:
        """Write the head to a folder, in this package's format or one for another engine.

        Args:
            save_directory: the folder; made if missing.
            args: as in Transformers; for format "resps" only.
            format: "resps" for this package; "specforge" for SGLang, vLLM and llama.cpp; "speculators" for vLLM.
                Engines silently ignore config fields that they do not support: see docs/train-a-head.md.
            keywords: as in Transformers; for format "resps" only.

        Raises:
            ValueError: the format is unknown, cannot express this head, or is another engine's and gets options.
        """
        if format == "resps":
            super().save_pretrained(save_directory, *args, **keywords)
            return
        if args or keywords:
            raise ValueError(
                f"`save_pretrained(format={format!r})` got {sorted(keywords) or list(args)}, but an export for other "
                "engines takes no options. Leave them out; publish the folder with `huggingface_hub.upload_folder`."
            )
        export_head(self, self.config, Path(save_directory), format)

    def check_target(self, target: PreTrainedModel) -> None:
        """Check that the head was made for `target`.

        Args:
            target: the loaded model.

        Raises:
            ValueError: a size or the model type differs; the message names both models.
        """
        check_is_model(target)
        theirs = target_identity(target)
        ours = self.config.target or {}
        needed: dict[str, Any] = {
            "vocab_size": self.config.vocab_size,
            "hidden_size": self.config.target_hidden_size,
            **{key: ours[key] for key in ("num_hidden_layers", "model_type") if key in ours},
        }
        wrong = [f"{key} {needed[key]} (this target: {theirs[key]})" for key in needed if needed[key] != theirs[key]]
        layers = self.config.feature_layers or [0]
        if layers[-1] > theirs["num_hidden_layers"]:
            wrong.append(f"the hidden states {layers} (this target: 0 to {theirs['num_hidden_layers']})")
        if wrong:
            raise ValueError(
                f"This head was made for {ours.get('name_or_path') or 'another target'}, not for "
                f"{theirs['name_or_path'] or type(target).__name__}: it needs {', '.join(wrong)}. Load the head that "
                "belongs to this target, or train one with training/train_head.py."
            )
