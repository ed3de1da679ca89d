"""The EAGLE-3 draft head (arXiv 2503.01840, section 3): reads the target's features and proposes tokens. In reading
order: RoPE, the decoder layer, loading and saving, the head, and the head bound to one target.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRotaryEmbedding

from ..compat import input_embedding
from ..drafting import DraftSource, Entries, FileReading, Places, TrainableModel, TrainableSource
from ..drafting.blocks import BlockModel, BlockSlots, Masks
from ..drafting.step_model import ALL, Wanted, at_wanted
from ..hub.upload import Destination, plain_card, push_saved
from ..tree import TreeShape
from ..verifying.attention import attend
from ..verifying.masks import AttentionPattern
from ..verifying.prepacking import PackedWeights
from .config import DraftHeadConfig, HeadConfig
from .formats.reading import canonical_head, read_checkpoint, read_eagle, split_keywords
from .formats.tensor_names import check_exact
from .formats.writing import export_head
from .fresh import draft_vocabulary, fresh_head
from .identity import check_is_model, check_made_for, target_identity


# Attention: (layer index, queries [b, heads, q, hd], keys [b, kv heads, t, hd], values) -> [b, heads, q, hd]. Only the
# q <= t positions whose output is wanted have queries. `Entries` implements this signature.
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class RotaryEmbedding(LlamaRotaryEmbedding):
    """RoPE of Transformers, but `head.to(torch.bfloat16)` does not round its frequencies. Rounding would change them
    by up to 0.4%, an error of a whole turn after about 1,600 positions.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)  # type: ignore[no-untyped-call]  # torch leaves it untyped


class Rope(NamedTuple):
    """Cosines and sines of RoPE's angles, `[b, t, hd]` each; `[b, 1, hd]` if all tokens of a row share a position."""

    cosine: Tensor
    sine: Tensor  # the first half is negated: it multiplies a vector's second half

    def at(self, wanted: Wanted) -> "Rope":
        return Rope(*(at_wanted(part, wanted) for part in self))

    def turn(self, states: Tensor) -> Tensor:
        """Rotate queries or keys `[b, heads, t, hd]` by these angles."""
        half = states.shape[-1] // 2
        return torch.addcmul(states * self.cosine[:, None], states.roll(half, dims=-1), self.sine[:, None])


class HeadAttention(nn.Module):
    """Attention of a head's layer, whose inputs have width `width`; with `qk_norm` queries and keys have RMSNorms."""

    def __init__(self, config: Any, layer_index: int, width: int, *, output_bias: bool, qk_norm: bool) -> None:
        super().__init__()
        self.layer_index, self.head_dim = layer_index, config.head_dim
        query_width, key_width = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(width, query_width, bias=config.attention_bias)
        self.k_proj = nn.Linear(width, key_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(width, key_width, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_width, config.hidden_size, bias=output_bias)
        norms = (nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps) if qk_norm else nn.Identity() for _ in "qk")
        self.q_norm, self.k_norm = norms

    def entries(self, states: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """Compute keys, rotated by RoPE, and values from states `[b, t, width]`: `[b, kv heads, t, hd]` each."""
        keys, values = self._keys_and_values(states)
        return rope.turn(keys), values

    def _keys_and_values(self, states: Tensor) -> tuple[Tensor, Tensor]:
        keys = self.k_norm(self.k_proj(states).unflatten(-1, (-1, self.head_dim))).transpose(1, 2)
        return keys, self.v_proj(states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(self, states: Tensor, rope: Rope, attend: Attend, wanted: Wanted = ALL) -> Tensor:
        """Map states `[b, t, width]` to outputs `[b, q, h]` at the `wanted` positions."""
        queries = self.q_proj(at_wanted(states, wanted)).unflatten(-1, (-1, self.head_dim))
        queries, (keys, values) = self.q_norm(queries).transpose(1, 2), self._keys_and_values(states)
        if isinstance(wanted, slice) and queries.shape[2] == keys.shape[2]:  # rotate both together
            turned = rope.turn(torch.cat([queries, keys], dim=1))
            queries, keys = turned[:, : queries.shape[1]], turned[:, queries.shape[1] :]
        else:
            queries, keys = rope.at(wanted).turn(queries), rope.turn(keys)
        attended = attend(self.layer_index, queries, keys, values)
        return self.o_proj(attended.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]  # nn.Module is untyped


class DraftLayer(nn.Module):
    """A decoder layer of a head. Only the first layer also reads token embeddings (EAGLE-3, section 3.1)."""

    def __init__(self, config: DraftHeadConfig, layer_index: int) -> None:
        super().__init__()
        self.reads_embedding = layer_index == 0
        self.norm_before_residual = config.norm_before_residual
        if self.reads_embedding:
            self.hidden_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        width = config.hidden_size * (1 + self.reads_embedding)  # the first layer reads embedding and feature
        bias, qk_norm = config.attention_output_bias, config.qk_norm
        self.self_attn = HeadAttention(config, layer_index, width, output_bias=bias, qk_norm=qk_norm)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = LlamaMLP(config)

    def forward(self, hidden: Tensor, embeddings: Tensor, rope: Rope, attend: Attend, wanted: Wanted) -> Tensor:
        """Map hidden states and token embeddings, `[b, t, h]` each, to `[b, q, h]` at the `wanted` positions."""
        residual = hidden
        if self.reads_embedding:
            normed = self.hidden_norm(hidden)
            if self.norm_before_residual:
                residual = normed
            states = torch.cat([self.input_layernorm(embeddings), normed], dim=-1)  # embedding first, as published
        else:
            states = self.input_layernorm(hidden)
        residual = at_wanted(residual, wanted) + self.self_attn(states, rope, attend, wanted)
        return residual + self.mlp(self.post_attention_layernorm(residual))  # type: ignore[no-any-return]  # untyped


@dataclass(frozen=True, slots=True)
class HeadReading(FileReading):
    """One way to interpret a head's file. The fields mean the same as in `DraftHeadConfig`."""

    loader: ClassVar[str] = "DraftHead"

    feature_layers: tuple[int, ...]
    rope_theta: float
    norm_before_residual: bool
    before_deepstack: bool = False

    @property
    def told(self) -> dict[str, str]:
        return {
            "feature layers": ", ".join(map(str, self.feature_layers)) + " before DeepStack" * self.before_deepstack,
            "RoPE base": f"{self.rope_theta:g}",
            "norm before residual": "yes" if self.norm_before_residual else "no",
        }


class HeadModel(TrainableSource, PreTrainedModel):  # type: ignore[misc]  # each kind saves in its own way
    """Base class of draft heads and block heads: loads, saves and publishes them, and checks their targets."""

    sizing_fields: ClassVar[tuple[str, ...]]  # config fields that must stay the same when training is resumed
    config_class: type[HeadConfig]
    config: Any
    norm: nn.RMSNorm
    rotary_emb: RotaryEmbedding
    _packed: PackedWeights
    _read: ClassVar[Callable[..., tuple[dict[str, Any], dict[str, Tensor]]]]  # a `Reader` of published layouts
    _export: ClassVar[Callable[..., None]]  # writes the head for another engine

    def _add_last_parts(self) -> None:
        """Add the parts after the layers: the final norm, the output head and draft vocabulary if any, and RoPE."""
        config = self.config
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if config.owns_output_head:
            self.lm_head = nn.Linear(config.hidden_size, config.proposable_tokens, bias=False)
        if config.draft_vocab_size is not None:
            # Offsets, as in published files: the target id of draft id i is i + d2t[i].
            self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.long))
        self.rotary_emb = RotaryEmbedding(config)
        self._packed = PackedWeights()

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        """If Transformers' assisted decoding reads `generation_config`, raise an error that explains `attach`."""
        if name == "generation_config":
            raise AttributeError(
                f"A `{type(self).__name__}` has no `generation_config`: it is no whole model, as others are. "
                "Call `transformers_resps.attach(model)` before `model.generate(..., assistant_model=head)`."
            )
        return super().__getattr__(name)

    def rope(self, positions: Tensor) -> Rope:
        """Compute RoPE's cosines and sines at positions `[b, t]`."""
        cosine, sine = self.rotary_emb(self.norm.weight, positions)
        first, second = sine.chunk(2, dim=-1)
        return Rope(cosine, torch.cat([-first, second], dim=-1))

    @property
    def draft_token_ids(self) -> Tensor:
        order = torch.arange(self.config.proposable_tokens, device=self.device)
        return order if self.config.draft_vocab_size is None else order + cast(Tensor, self.d2t)

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def target(self) -> dict[str, Any]:  # type: ignore[override]  # stored in the config
        self.config.target = self.config.target or {}
        return self.config.target

    @property
    def output_heads(self) -> list[nn.Module]:
        return [self.lm_head] if self.config.owns_output_head else []

    @property
    def feature_layers(self) -> list[int]:
        return self.config.feature_layers or []

    def push_to_hub(  # type: ignore[override]  # one commit with metadata; the options that matter for a head
        self, repo_id: str, *, commit_message: str | None = None, **where: Any
    ) -> str:
        """Publish the head on the Hub in one commit, and return the commit's URL.

        A missing repository is created, and gets a plain model card if it has none. `where` has `private`, `token`,
        `revision` and `create_pr`, see `Destination`. Raises the errors of `upload`.
        """
        card, message = self.plain_card(repo_id), commit_message or f"Upload {type(self).__name__}"
        return push_saved(self.save_pretrained, card, Destination(repo_id, **where), message)

    def plain_card(self, repo_id: str) -> str:
        use = f'head = {type(self).__name__}.from_pretrained("{repo_id}", target=model)'
        return plain_card("draft head", "draft-head", (self.config.target or {}).get("name_or_path"), use)

    def _named(self, *fields: str) -> dict[str, Any]:
        """Return the config's values that identify the head: its name, its sizes, and these further `fields`."""
        sizes = ("name_or_path", "feature_layers", "hidden_size", "num_hidden_layers", "vocab_size", *fields)
        return {name: getattr(self.config, name) for name in sizes}

    def read_as(self, reading: FileReading, target: PreTrainedModel, whole: Self) -> Self:
        fields = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(reading).items()}
        config = type(self.config).from_dict(self.config.to_dict())
        config.rope_parameters = {**(config.rope_parameters or {}), "rope_theta": fields.pop("rope_theta")}
        for name, value in fields.items():
            setattr(config, name, value)
        with torch.device("meta"):
            variant = type(self)(config)
        variant.load_state_dict(whole.state_dict(), assign=True)
        variant.rotary_emb = RotaryEmbedding(config).to(self.device)
        variant.train(False)
        return variant

    def check_target(self, target: PreTrainedModel) -> None:
        needed = {"vocab_size": self.config.vocab_size, "hidden_size": self.config.target_width}
        check_made_for(target, needed, self.config.target or {}, self.feature_layers)

    def near(self, target: PreTrainedModel) -> tuple[list[tuple[int, ...]], list[float]]:
        """Return the feature layers and the RoPE bases that the file may mean, as two lists, configured ones first."""
        text = target.config.get_text_config()
        shifted = [tuple(layer + shift for layer in self.feature_layers) for shift in (0, 1, -1)]
        theirs = getattr(text, "rope_parameters", None) or {}
        theirs = theirs.get("full_attention") or theirs  # Gemma 3 has one entry for each type of layer
        bases = dict.fromkeys([self.config.rope_parameters["rope_theta"], 1e4, 1e6, theirs.get("rope_theta")])
        within = [layers for layers in shifted if layers[0] >= 0 and layers[-1] <= text.num_hidden_layers]
        return within, [base for base in bases if base]

    def packed_view(self) -> Self:
        """Return a copy of the head with weights in a layout that is fast on CPUs (packed); return the head itself if
        packed weights are not faster. The copy shares all parameters with the head. It is valid until modules of the
        head are added or replaced. Packing happens once: the head keeps the packed weights for later calls.
        """
        return self._packed.view(self)

    @classmethod
    def from_pretrained(  # type: ignore[override]  # adds the argument `target`
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        target: PreTrainedModel | None = None,
        **keywords: Any,
    ) -> Self:
        """Load a head in this package's format or a published layout. No weight is newly initialized.

        Without a Hub id or folder pass `config` and `state_dict`. The head must fit `target`, the model to draft for,
        which supplies sizes that the config omits, and the dtype and device unless you pass these. `keywords` are
        the loading arguments of Transformers, such as `revision`; also any field of the head's config, or
        `rope_theta`, to correct the config, for example as `resps doctor` suggests. `sliding_window` limits how many
        tokens a `DraftHead` sees; `None` removes the limit. Raises a `ValueError` if the files are damaged or
        incomplete, hold another kind of drafter, contradict each other, or do not fit `target`.
        """
        hub, loading, overrides = split_keywords(keywords, cls.config_class)
        if target is not None:
            check_is_model(target)
        stated = loading.pop("config", None)
        checkpoint = read_checkpoint(pretrained_model_name_or_path, stated, loading.pop("state_dict", None), **hub)
        config, tensors = canonical_head(checkpoint, target, overrides, cls.config_class, cls._read)
        with torch.device("meta"):
            wanted = cls(config)
        check_exact(wanted.state_dict(), tensors, checkpoint.name)
        if target is not None:
            wanted.check_target(target)
            loading.setdefault("dtype", target.dtype)
        loading.setdefault("dtype", tensors["fc.weight"].dtype)
        head: Any = super().from_pretrained(None, config=config, state_dict=tensors, **loading)
        named = stated.name_or_path if pretrained_model_name_or_path is None else checkpoint.name
        head.name_or_path = head.config.name_or_path = named
        if target is not None and "device_map" not in loading:
            head.to(device=target.device)
        return cast(Self, head)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *args: Any, format: str = "resps", **keywords: Any
    ) -> None:
        """Write the head to a folder, in this package's format or in a layout of another engine.

        `format` is "resps" for this package, which takes the options of Transformers. For other engines a `DraftHead`
        has "specforge" (SGLang, llama.cpp) and "speculators" (vLLM), a `BlockHead` "z-lab" and "speculators". If these
        engines would silently ignore a property of the head, a `ValueError` is raised or a warning logged: see
        docs/train-a-head.md.
        """
        if format == "resps":
            PreTrainedModel.save_pretrained(self, save_directory, *args, **keywords)
            return
        if args or keywords:
            raise ValueError(
                f"`save_pretrained(format={format!r})` got {sorted(keywords) or list(args)}, but an export for other "
                "engines takes no options. Leave them out; publish the folder with `huggingface_hub.upload_folder`."
            )
        self._export(self.config, self.state_dict(), Path(save_directory), format)

    def load_checkpoint(self, folder: str, target: PreTrainedModel) -> None:
        saved = type(self).from_pretrained(folder, dtype=self.dtype)
        for name in self.sizing_fields:
            before, now = getattr(saved.config, name), getattr(self.config, name)
            if before != now:
                raise ValueError(
                    f"{folder} holds a head with {name} {before}, but this run trains one with {now}. Pass the "
                    "settings of that run, or another `output_dir`."
                )
        self.load_state_dict(saved.state_dict())


class DraftHead(HeadModel):
    """An EAGLE-3 draft head: reads the target's hidden states and proposes tokens, which the target then verifies.

    Load a published head with `from_pretrained` or create one with `from_target`, and pass it to `generate` as
    `assistant_model`.

    At each position the head reads the target's feature at token t and the embedding of token t + 1, and predicts
    token t + 2. It usually borrows the target's embedding table and, if it can propose all tokens, the target's output
    head. Borrowed weights are not saved with the head.

    On CPU, decoding uses packed copies of the head's weights. Call `prepack(head)` after writing weights through
    `.data`, as PEFT's merge does. Decoding does not run forward hooks that are registered on the head itself.
    """

    config_class = DraftHeadConfig
    config: DraftHeadConfig
    base_model_prefix = ""
    main_input_name = "features"
    _no_split_modules = ["DraftLayer"]
    sizing_fields = ("draft_vocab_size", "feature_layers", "hidden_size", "intermediate_size", "num_hidden_layers")
    _read, _export = staticmethod(read_eagle), staticmethod(export_head)

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
        if config.mask_token_id is not None:
            self.mask_hidden = nn.Parameter(torch.zeros(config.features_width))
        self._add_last_parts()
        self._fingerprint: tuple[tuple[int, int] | None, str] = (None, "")  # (version of `fc`, fingerprint)
        self.post_init()  # type: ignore[no-untyped-call]  # Transformers leaves it untyped

    def fuse(self, features: Tensor) -> Tensor:
        """Fuse the target's features `[b, t, F]` to `[b, t, h]`."""
        if self.config.norm_before_fc:
            features = self.input_norm(features)
        if self.config.fc_norm:
            parts = features.chunk(len(self.fc_norm), dim=-1)
            features = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], dim=-1)
        return self.fc(features)

    def forward(self, hidden: Tensor, embeddings: Tensor, rope: Rope, attend: Attend, wanted: Wanted = ALL) -> Tensor:
        """Compute hidden states `[b, q, h]`, before the final norm, at the `wanted` positions.

        `hidden` `[b, t, h]` are fused features or, for later drafted tokens, the result of `feedback`; `embeddings`
        `[b, t, h]` belong to the next tokens. `attend` is the attention over the keys and values that the caller
        keeps (see `DraftCache`). At unwanted positions only keys and values are computed, a third of the work.
        """
        for count, layer in enumerate(self.layers, start=1):  # no `is self.layers[-1]`: under `torch.export` it fails
            is_last = count == len(self.layers)
            hidden = layer(hidden, embeddings, rope, attend, wanted if is_last else ALL)
        return hidden

    def feedback(self, hidden: Tensor) -> Tensor:
        """Compute from the output `[b, t, h]` for one drafted token the input `hidden` for the next drafted token."""
        return self.norm(hidden) if self.config.feedback_post_norm else hidden

    def get_input_embeddings(self) -> nn.Embedding | None:  # type: ignore[override]  # PEFT asks when it saves adapters
        return self.embed_tokens if self.config.owns_embedding else None  # type: ignore[no-any-return]

    @property
    def before_deepstack(self) -> bool:  # type: ignore[override]  # stored in the config
        return self.config.before_deepstack

    @property
    def default_shape(self) -> TreeShape:
        assert self.config.default_tree is not None
        return TreeShape(*self.config.default_tree)

    def fingerprint(self) -> str:
        """Hash the weights of `fc` to 16 hexadecimal digits, which are the same in float32 and bfloat16."""
        weight = self.fc.weight.detach()
        version = None if weight.is_inference() else (weight.data_ptr(), weight._version)
        if version is None or version != self._fingerprint[0]:
            raw = weight.to("cpu", torch.bfloat16).contiguous().view(torch.uint8)
            self._fingerprint = (version, hashlib.sha256(raw.numpy().tobytes()).hexdigest()[:16])
        return self._fingerprint[1]

    def identity(self) -> dict[str, Any]:
        """Return the head's name and sizes and, unless it is in float16, its `fingerprint`."""
        identity = self._named("draft_vocab_size")
        if self.dtype != torch.float16:  # float16 loses the last bits of small weights: the hash would differ
            identity["fingerprint"] = self.fingerprint()
        return identity

    def bind(self, target: PreTrainedModel, forward: Callable[..., Tensor] | None = None) -> "BoundHead":
        return (BoundHead if self.config.mask_token_id is None else BoundParallelHead)(self, target, forward)

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
        """Create an untrained head in the target's dtype, on its device. To train it see docs/train-a-head.md.

        The head can propose d = `draft_vocab_size` tokens. Their target ids are `draft_token_ids` `[d]`, by default
        the lowest ids. Without `draft_vocab_size` it proposes all tokens by the target's output head. `feature_layers`
        are EAGLE-3's low, middle and high layer by default; `overrides` are other fields of `DraftHeadConfig`. Raises
        a `ValueError` if an id is not in the target's vocabulary, or if the config does not fit the target.
        """
        layers = {} if feature_layers is None else {"feature_layers": feature_layers}
        rows = draft_vocabulary(target, draft_vocab_size, draft_token_ids)
        return fresh_head(cls, target, rows, layers | overrides)

    @classmethod
    def untrained(cls, target: PreTrainedModel, draft_token_ids: Tensor | None, levels: int, **fields: Any) -> Self:
        defaults: dict[str, Any] = {"fc_norm": True, "default_tree": [8, 4, 2]}
        return cls.from_target(target, draft_token_ids=draft_token_ids, **defaults | fields)

    def readings(self, target: PreTrainedModel, whole: "DraftHead", *, has_images: bool) -> Iterator[HeadReading]:
        """Yield interpretations of the head's file, the configured one first. They combine feature layers (also
        shifted by one), RoPE bases, both values of `norm_before_residual` and, with DeepStack, of `before_deepstack`.
        """
        config = self.config
        tower = getattr(target.config, "vision_config", None)
        is_ambiguous = has_images and bool(getattr(tower, "deepstack_visual_indexes", None))
        residuals = config.norm_before_residual, not config.norm_before_residual
        stacks = (config.before_deepstack, not config.before_deepstack)[: 1 + is_ambiguous]
        return (HeadReading(*values) for values in product(*self.near(target), residuals, stacks))


class BoundModel(TrainableModel):
    """A head together with the embedding table and output head that it borrows from its target; see `bind`.

    Each call of `generate` makes a new object. So the head itself holds no part of its target, and can be saved,
    copied or moved alone. On CPU the layers use weights in a faster layout (packed), unless `forward` is passed.
    """

    is_compilable = True

    def __init__(self, head: Any, target: PreTrainedModel, forward: Callable[..., Tensor] | None = None) -> None:
        head.prepare(target)
        config, rope = head.config, head.config.rope_parameters
        self.device, self.dtype = head.device, head.dtype
        self.proposable_tokens = config.proposable_tokens
        # Other kinds of RoPE turn a position by the same angles in texts of any length
        self.has_fixed_places = (rope.get("rope_type") or rope.get("type")) not in ("dynamic", "longrope")
        self.head = head.packed_view() if forward is None else head
        self._forward = forward or self.head.forward
        self.embed_tokens = input_embedding(target)
        self._output = self.head.lm_head if config.owns_output_head else target.get_output_embeddings()
        self._output_weight = self._output.weight
        self.draft_token_ids = None if config.draft_vocab_size is None else head.draft_token_ids

    @property
    def modules(self) -> nn.ModuleList:
        return nn.ModuleList([self.head, self.embed_tokens, self._output])

    def fuse(self, features: Tensor) -> Tensor:
        return self.head.fuse(features)

    def places(self, positions: Tensor) -> Places:
        return self.head.rope(positions)

    def normed_logits(self, normed: Tensor, depth: int = 0) -> Tensor:
        logits = self._output(normed.to(self._output_weight.dtype))
        return logits.to(normed.device, torch.float32)  # a borrowed output head may be on another device

    def output_rows(self, depth: int = 0) -> tuple[Tensor, Tensor | None]:
        return self._output_weight, getattr(self._output, "bias", None)  # some targets have a bias

    def target_ids(self, draft_ids: Tensor) -> Tensor:
        if self.draft_token_ids is None:
            return draft_ids
        if torch.compiler.is_compiling():  # saved compiled code can refer only to buffers of the head
            return draft_ids + cast(Tensor, self.head.d2t)[draft_ids]
        return self.draft_token_ids[draft_ids]


class BoundHead(BoundModel):
    """An EAGLE-3 head together with the parts of its target that it uses."""

    def __init__(self, head: DraftHead, target: PreTrainedModel, forward: Callable[..., Tensor] | None = None) -> None:
        super().__init__(head, target, forward)
        self.sliding_window = head.config.sliding_window
        if head.config.owns_embedding:
            self.embed_tokens = head.embed_tokens

    def embed(self, tokens: Tensor) -> Tensor:
        """Look up the embeddings `[b, t, h]` of target ids `[b, t]`, in the head's dtype."""
        return self.embed_tokens(tokens).to(self.dtype)

    def run(
        self, depth: int, tokens: Tensor, hidden: Tensor | None, places: Places, entries: Entries, wanted: Wanted = ALL
    ) -> Tensor:
        assert hidden is not None
        return self._forward(hidden, self.embed(tokens), Rope(*places), entries, wanted)

    def normed(self, output: Tensor, depth: int = 0) -> Tensor:
        return self.head.norm(output)

    def feedback(self, output: Tensor, hidden: Tensor | None) -> Tensor:
        return self.head.feedback(output)


def with_masks(entries: Entries, masks: Masks) -> Attend:
    """Return an `Attend` function that stores keys and values in `entries`, and uses each layer's mask in `masks`."""
    return lambda layer, queries, keys, values: attend(queries, *entries.update(keys, values, layer), masks[layer])


class BoundParallelHead(BoundHead, BlockModel):
    """A P-EAGLE head (arXiv 2602.01469, section 3) together with parts of its target. It cannot be trained.

    The newest pair of feature and token predicts the first drafted token. After this pair come placeholders, which
    are pairs of a learnt feature and the mask token; each predicts one more token. A placeholder sees all pairs of the
    text and all earlier placeholders. Keys and values of placeholders are not kept.
    """

    def __init__(self, head: DraftHead, target: PreTrainedModel, forward: Callable[..., Tensor] | None = None) -> None:
        if forward is not None:
            raise ValueError(
                "This is a P-EAGLE head, which can draft, but neither be trained nor diagnosed here. Train an EAGLE-3 "
                "head or a block head with `DraftHeadTrainer`."
            )
        super().__init__(head, target)
        config = head.config
        assert config.parallel_levels is not None and config.mask_token_id is not None
        self.block_levels, self.mask_token_id = config.parallel_levels, config.mask_token_id
        self.most_children = self.proposable_tokens
        self.patterns = [AttentionPattern(config.sliding_window)] * config.num_hidden_layers

    def width(self, levels: int) -> int:
        return max(levels - 1, 1)

    def fill(
        self, newest: Tensor, root: Tensor, levels: int, places: Places, entries: Entries, masks: Masks
    ) -> BlockSlots:
        tokens = root.new_full((len(root), self.width(levels)), self.mask_token_id)
        hidden = self.fuse(self.head.mask_hidden.expand(*tokens.shape, -1))
        output = self._forward(hidden, self.embed(tokens), Rope(*places), with_masks(entries, masks), ALL)
        normed = self.normed(torch.cat([newest, output], dim=1)[:, :levels])
        return BlockSlots(normed, self.normed_logits(normed))


def pair_identity(target: PreTrainedModel, source: DraftSource | None) -> dict[str, dict[str, Any]]:
    """Return the identities of the "target" and, if any, the "head", to store with a policy or with measurements."""
    identity = {"target": target_identity(target)}
    return identity if source is None else identity | {"head": source.identity()}
