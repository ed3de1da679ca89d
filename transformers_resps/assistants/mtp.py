"""Draft with multi-token prediction (MTP) layers, which many checkpoints contain but Transformers does not load.

An MTP layer reads a token's embedding and the hidden state of the token before it, runs a decoder layer of the
target's class, and predicts the next token (DeepSeek-V3, arXiv 2412.19437, section 2.2). This module has, in order,
the layer, its loading and saving, and the layers bound to one target.
"""

import copy
import inspect
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..compat import CACHE_KEYWORD
from ..drafting import ALL, Entries, FileReading, Places, TrainableModel, TrainableSource, Wanted, at_wanted
from ..drafting.kinds import MTP
from ..heads.formats.tensor_names import check_exact
from ..heads.fresh import draft_vocabulary
from ..heads.identity import check_is_model, check_made_for, parameter_fingerprint, target_identity
from ..hub.checkpoint import HUB
from ..hub.upload import plain_card
from ..tree import TreeShape
from ..verifying.attention import GROUPED
from ..verifying.forward import decoder_layers
from ..verifying.masks import AttentionPattern, additive
from ..verifying.prepacking import PackedWeights, packed_linear
from .mtp_layouts import MtpCheckpoint, MtpConfig, Stored


class MtpLayer(nn.Module):
    """One MTP layer: projects the concatenated embedding and hidden state, then runs a decoder layer."""

    def __init__(self, target: PreTrainedModel, config: MtpConfig, depth: int) -> None:
        super().__init__()
        text, size = _layer_config(target, config, depth), target.config.get_text_config().hidden_size
        norm, eps = type(target.get_decoder().norm), text.rms_norm_eps
        if config.own_embedding:
            self.embed_tokens = nn.Embedding(text.vocab_size, size)
        self.enorm, self.hnorm = norm(size, eps=eps), norm(size, eps=eps)
        self.eh_proj = nn.Linear(2 * size, size, bias=config.projection_bias)
        self.block = type(decoder_layers(target)[-1])(text, depth)
        self.norm = norm(size, eps=eps) if config.own_norm else nn.Identity()
        if config.own_output_head:
            self.head = nn.Linear(size, text.vocab_size, bias=False)
        self.is_eager = text._attn_implementation == "eager"
        self._hidden_first = config.hidden_first

    def forward(self, embeddings: Tensor, hidden: Tensor, **block: Any) -> Tensor:
        """Map embeddings and hidden states `[b, t, h]` to outputs before the norm; the decoder layer gets `block`."""
        pair = [self.enorm(embeddings), self.hnorm(hidden)]
        output = self.block(self.eh_proj(torch.cat(pair[::-1] if self._hidden_first else pair, dim=-1)), **block)
        return output[0] if isinstance(output, tuple) else output


def _layer_config(target: PreTrainedModel, config: MtpConfig, depth: int) -> Any:
    """Copy the target's config, and set the type of every layer in the copy to that of MTP layer number `depth`."""
    text = target.config.get_text_config(decoder=True)
    kind, kinds = config.layer_type(depth), getattr(text, "layer_types", None)
    if kinds and kind in kinds and getattr(text, "is_heterogeneous", False):
        text = text.per_layer_config[kinds.index(kind)]
    text, count = copy.deepcopy(text), config.depths
    is_sparse = bool(config.experts) and config.experts[depth]
    alike = {
        "layer_types": [kind] * count,
        "mlp_layer_types": ["sparse" if is_sparse else "dense"] * count,
        "mlp_only_layers": [] if is_sparse else list(range(count)),
        "first_k_dense_replace": 0 if is_sparse else count,
        "decoder_sparse_step": 1,
        "moe_layer_interval": 1,
        "moe_layer_start_index": 0 if is_sparse else count,
        "moe_layer_end_index": count,
        "num_hidden_layers": count,
    }
    for name, value in alike.items():
        if getattr(text, name, None) is not None:
            setattr(text, name, value)
    is_eager = text._attn_implementation == "eager" or not target._supports_sdpa
    text._attn_implementation = "eager" if is_eager else GROUPED
    return text


@dataclass(frozen=True, slots=True)
class MtpReading(FileReading):
    """One way to interpret MTP layers. The fields mean the same as in `MtpConfig`."""

    loader: ClassVar[str] = "MtpHead"

    feature_layer: int
    fed: str
    fed_back: str
    hidden_first: bool
    zero_centred: bool
    own_output_head: bool

    @property
    def told(self) -> dict[str, str]:
        return {
            "layer": str(self.feature_layer),
            "fed": f"{self.fed} norm",
            "fed back": "the target's" if self.fed_back == "target" else f"{self.fed_back} norm",
            "order": "state, token" if self.hidden_first else "token, state",
            "norms": "1 + w" if self.zero_centred else "w",
            "output head": "own" if self.own_output_head else "target's",
        }


class MtpHead(TrainableSource, nn.Module):
    """The MTP layers of a checkpoint, as a drafter: pass it to `generate` as `assistant_model`.

    The layers use the target's final norm, embedding and output head, or the separate embeddings and output heads that
    a checkpoint may have for MTP layers.
    """

    def __init__(self, config: MtpConfig, target: PreTrainedModel) -> None:
        super().__init__()
        self.settings, self.name_or_path = config, ""
        self.layers = nn.ModuleList(MtpLayer(target, config, depth) for depth in range(config.depths))
        self.target = target_identity(target)
        self._stored = {name: Stored(({-1: self._numbered(name)}, {})) for name in self.state_dict()}
        self._shift = 0  # added to the weights of norms in loading, subtracted in saving
        ids = config.draft_token_ids
        kept = None if ids is None else torch.tensor(ids, device="cpu")  # not on meta, even if the layers are
        self.register_buffer("_draft_token_ids", kept, persistent=False)
        self._packed = PackedWeights()
        self.rows = KeptRows()

    def _numbered(self, name: str) -> str:
        """Convert our tensor name to DeepSeek-V3's, which numbers MTP layers after the target's layers."""
        _, depth, rest = name.split(".", 2)
        rest = re.sub(r"^(norm|head)\.", r"shared_head.\1.", rest.removeprefix("block."))
        return f"model.layers.{self.target['num_hidden_layers'] + int(depth)}.{rest}"

    @classmethod
    def from_target(cls, target: PreTrainedModel, **keywords: Any) -> "MtpHead":
        """Load the MTP layers from the target's own checkpoint; keywords as in `from_pretrained`."""
        check_is_model(target)
        name = target.config.name_or_path
        if not name:
            raise ValueError(
                "The target does not know where it was loaded from (its `name_or_path` is empty). Call "
                "`MtpHead.from_pretrained(id, target=model)` with the checkpoint that has the MTP layers."
            )
        commit = getattr(target.config, "_commit_hash", None)
        return cls.from_pretrained(name, target, **({"revision": commit} if commit else {}) | keywords)

    @classmethod
    def from_pretrained(
        cls,
        id_or_folder: str | os.PathLike[str],
        target: PreTrainedModel,
        *,
        draft_token_ids: Tensor | Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
        **keywords: Any,
    ) -> "MtpHead":
        """Load MTP layers for `target` onto its device. No weight is newly initialized.

        `id_or_folder` is a folder that `save_pretrained` wrote, or a checkpoint of the target's kind, such as the
        original of a quantised or fine-tuned target; only files that hold the layers are opened. `draft_token_ids`
        `[d]` are the tokens that can be proposed, in any order; `None` for all. With few ids the output head is
        faster, and a small model spends most of a draft's time there. The layers' `dtype` is the target's by default.
        `keywords` are `revision`, `token` and others of `huggingface_hub.hf_hub_download`; also fields of `MtpConfig`,
        to correct what is inferred from the checkpoint. Raises a `ValueError` if the checkpoint has no supported MTP
        layers, if they are quantised in an unknown way, damaged or incomplete, or if they do not fit `target`.
        """
        check_is_model(target)
        hub = {key: keywords.pop(key) for key in HUB & keywords.keys()}
        checkpoint = MtpCheckpoint(os.fspath(id_or_folder), hub)
        checkpoint.check_target(target_identity(target))
        if draft_token_ids is not None:
            keywords["draft_token_ids"] = tuple(cast(Tensor, draft_vocabulary(target, None, draft_token_ids)).tolist())
        config = _borrowing(_configured(checkpoint.config(), keywords), checkpoint, target)
        with torch.device("meta"):
            head = cls(config, target)
        head.name_or_path = checkpoint.name
        head._load(checkpoint, target, dtype or target.dtype)
        return head.eval()

    def _load(self, checkpoint: MtpCheckpoint, target: PreTrainedModel, dtype: torch.dtype) -> None:
        config = self.settings
        borrowed = {"embed_tokens.weight": not config.own_embedding, "head.weight": not config.own_output_head}
        left_out = tuple(name for name, is_so in borrowed.items() if is_so)
        depths = tuple(f"layers.{depth}." for depth in range(config.depths))
        names = [name for name in checkpoint.stored if name.startswith(depths) and not name.endswith(left_out)]
        check_exact(self.state_dict(), checkpoint.read(names, dtype, sizes_only=True), checkpoint.name)
        tensors = checkpoint.read(names, dtype)
        if config.zero_centred is not None:
            self._shift = int(config.zero_centred) - int(_is_zero_centred(target))
        kept = tuple(target._keep_in_fp32_modules_strict or ()) if dtype.itemsize < 4 else ()
        for name, tensor in tensors.items():
            if name.endswith("norm.weight") and self._shift:
                tensor = tensor + self._shift
            is_fp32 = any(part in name for part in kept)
            tensors[name] = tensor.to(target.device, torch.float32 if is_fp32 else dtype)
        self.load_state_dict(tensors, assign=True)
        self.to(target.device)  # moves the buffer with the draft vocabulary
        self._stored = {name: checkpoint.stored[name] for name in names}
        assert not any(buffer.is_meta for buffer in self.buffers())

    @classmethod
    def fresh(
        cls, target: PreTrainedModel, *, draft_token_ids: Tensor | Sequence[int] | None = None, **settings: Any
    ) -> Self:
        """Create untrained MTP layers in the target's dtype, on its device. Train them with `DraftHeadTrainer`.

        They start as copies of the target's last layer that output the hidden state unchanged: this trains faster.
        `save_pretrained` gives their tensors DeepSeek-V3's names. For `draft_token_ids` see `from_pretrained`;
        `settings` are fields of `MtpConfig`. Raises a `ValueError` if an id is not in the target's vocabulary, or if
        a setting is unknown.
        """
        rows = draft_vocabulary(target, None, draft_token_ids)
        ids = None if rows is None else tuple(rows.tolist())
        config = _configured(MtpConfig(draft_token_ids=ids), settings)
        if not config.experts and "mlp.gate.weight" in decoder_layers(target)[-1].state_dict():
            config = replace(config, experts=(True,) * config.depths)
        head = cls(config, target).to(target.device, target.dtype)
        head._start_from(target)
        return head.eval()

    @classmethod
    def untrained(cls, target: PreTrainedModel, draft_token_ids: Tensor | None, levels: int, **fields: Any) -> Self:
        return cls.fresh(target, draft_token_ids=draft_token_ids, **fields)

    @torch.no_grad()
    def _start_from(self, target: PreTrainedModel) -> None:
        """Copy the target's last layer to each MTP layer, with zero output projections: it then outputs its input."""
        norm, shift = target.get_decoder().norm.weight, int(_is_zero_centred(target))
        factors = (norm.float() + shift).abs().clamp(min=_SMALLEST_FACTOR).copysign(norm.float() + shift)
        for layer in cast(Any, self.layers):
            alike = [one for one in decoder_layers(target) if _sizes(one) == _sizes(layer.block)]
            if alike:
                layer.block.load_state_dict(alike[-1].state_dict())
            for name, parameter in layer.block.named_parameters():
                if any(part in name for part in ("o_proj.", "down_proj")):
                    parameter.zero_()
            if self.settings.fed == "after":
                layer.hnorm.weight.copy_(1 / factors - shift)
            places = (0, 1) if self.settings.hidden_first else (1, 0)
            layer.eh_proj.weight.zero_()[:, places[0] * len(norm) :][:, : len(norm)].fill_diagonal_(1)
            if self.settings.own_norm:
                layer.norm.weight.copy_(norm)
            if self.settings.own_embedding:
                layer.embed_tokens.load_state_dict(target.get_input_embeddings().state_dict())
            if self.settings.own_output_head:
                layer.head.load_state_dict(target.get_output_embeddings().state_dict())

    def load_checkpoint(self, folder: str, target: PreTrainedModel) -> None:
        saved = MtpHead.from_pretrained(folder, target, dtype=self.dtype)
        if saved.settings != self.settings:
            raise ValueError(
                f"{folder} holds MTP layers with other settings than those in training. Pass the "
                "settings of that run, or another `output_dir`."
            )
        self.load_state_dict(saved.state_dict())

    def readings(self, target: PreTrainedModel, whole: "MtpHead", *, has_images: bool) -> Iterator[MtpReading]:
        """Yield all ways to read the checkpoint's layers, the configured one first.

        They differ in the feature layer (the configured one or a neighbour), `fed`, `fed_back`, `hidden_first`,
        `zero_centred` and `own_output_head`.
        """
        settings, last = self.settings, target.config.get_text_config().num_hidden_layers
        layer = last if settings.feature_layer is None else settings.feature_layer

        def axis(configured: Any, *known: Any) -> dict[Any, None]:
            return dict.fromkeys([configured, *known])

        axes = [
            [near for near in (layer, layer + 1, layer - 1) if 0 < near <= last],
            axis(settings.fed, "after", "before"),
            axis(settings.fed_back, *(("after", "before") if settings.own_norm else ()), "target"),
            axis(settings.hidden_first, False, True),
            axis(self.is_zero_centred(target), False, True),
            axis(settings.own_output_head, *((False, True) if whole.output_heads else ())),
        ]
        return (MtpReading(*values) for values in product(*axes))

    def read_as(self, reading: FileReading, target: PreTrainedModel, whole: "MtpHead") -> "MtpHead":
        with torch.device("meta"):
            head = MtpHead(replace(self.settings, **asdict(reading)), target)
        shift = head.is_zero_centred(target) - whole.is_zero_centred(target)
        ours, wanted = whole.state_dict(), head.state_dict()
        tensors = {
            name: ours[name] + shift if shift and name.endswith("norm.weight") else ours[name] for name in wanted
        }
        head.load_state_dict(tensors, assign=True)
        head.name_or_path, head._stored, head._shift = whole.name_or_path, whole._stored, whole._shift + shift
        return head.eval()

    def whole(self, target: PreTrainedModel) -> "MtpHead":
        if self.output_heads or not self.name_or_path:
            return self
        checkpoint = MtpCheckpoint(self.name_or_path, {})
        has_others = _borrowing(checkpoint.config(), checkpoint, target).own_output_head
        return MtpHead.from_pretrained(self.name_or_path, target, dtype=self.dtype) if has_others else self

    def is_zero_centred(self, target: PreTrainedModel) -> bool:
        """Return whether the checkpoint's norms multiply by 1 + weight instead of weight."""
        stated = self.settings.zero_centred
        return _is_zero_centred(target) if stated is None else stated

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write the layers to a folder for `from_pretrained`, under the tensor names of their checkpoint."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {}
        for name, tensor in self.state_dict().items():
            shift = self._shift if name.endswith("norm.weight") else 0
            theirs = self._stored[name].split(tensor - shift if shift else tensor)
            tensors |= {name: part.detach().cpu().contiguous().clone() for name, part in theirs.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        sizes = {key: self.target[key] for key in ("hidden_size", "num_hidden_layers", "vocab_size")}
        config = {"model_type": MTP.saved_as, **sizes, "target": self.target, "mtp": asdict(self.settings)}
        text = json.dumps(config, indent=2)
        if self.settings.draft_token_ids is not None:  # write its thousands of numbers on one line
            text = re.sub(r'("draft_token_ids": )\[[^]]*\]', rf"\g<1>{list(self.settings.draft_token_ids)}", text)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def depths(self) -> int:  # type: ignore[override]  # stored in the settings
        return self.settings.depths

    @property
    def feature_layers(self) -> list[int]:
        """Index of the hidden state to read: `feature_layer`, else the last; last + 1 means after the final norm."""
        last, chosen = self.target["num_hidden_layers"], self.settings.feature_layer
        return [last + (self.settings.fed == "after") if chosen is None else chosen]

    @property
    def default_shape(self) -> TreeShape:
        return TreeShape(16, 4 if self.settings.depths == 1 else min(4, self.settings.depths), 4)

    def check_target(self, target: PreTrainedModel) -> None:
        check_made_for(target, {key: self.target[key] for key in ("hidden_size", "vocab_size")}, self.target, [])

    def fingerprint(self) -> str:
        return parameter_fingerprint(self)

    def identity(self) -> dict[str, Any]:
        ids = self.settings.draft_token_ids
        return {
            "name_or_path": self.name_or_path,
            "feature_layers": self.feature_layers,
            "hidden_size": self.target["hidden_size"],
            "num_hidden_layers": self.settings.depths,
            "vocab_size": self.target["vocab_size"],
            "draft_vocab_size": None if ids is None else len(ids),
            "fingerprint": self.fingerprint(),
        }

    def forward(self, depth: int, embeddings: Tensor, hidden: Tensor, **block: Any) -> Tensor:
        return self.layers[depth](embeddings, hidden, **block)

    @property
    def draft_token_ids(self) -> Tensor:
        kept = cast(Tensor | None, self._draft_token_ids)
        return torch.arange(self.vocab_size, device=self.device) if kept is None else kept.to(self.device)

    @property
    def vocab_size(self) -> int:
        return self.target["vocab_size"]

    @property
    def output_heads(self) -> list[nn.Module]:
        return [layer.head for layer in cast(Any, self.layers)] if self.settings.own_output_head else []

    def plain_card(self, repo_id: str) -> str:
        use = f'head = MtpHead.from_pretrained("{repo_id}", target=model)'
        return plain_card("MTP module", "mtp", self.target["name_or_path"], use)

    def bind(self, target: PreTrainedModel, forward: Callable[..., Tensor] | None = None) -> "BoundMtp":
        self.prepare(target)
        layers = self._packed.view(self.layers) if forward is None else self.layers
        return BoundMtp(self, target, layers, forward)


def _configured(config: MtpConfig, settings: dict[str, Any]) -> MtpConfig:
    unknown = sorted(settings.keys() - {field.name for field in fields(MtpConfig)})
    if unknown:
        raise ValueError(f"MtpHead got {unknown}, but takes {sorted(HUB)} and the fields of `MtpConfig` only.")
    return replace(config, **settings)


def _sizes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


_SMALLEST_FACTOR = 0.1  # Smallest absolute factor of the target's norm that `fresh` divides by.


def _is_zero_centred(target: PreTrainedModel) -> bool:
    """Return whether the target's norms multiply by 1 + weight: new norms of this kind have weights of zero."""
    with torch.device("cpu"):
        return not type(target.get_decoder().norm)(1).weight.any()


def _borrowing(config: MtpConfig, checkpoint: MtpCheckpoint, target: PreTrainedModel) -> MtpConfig:
    """Return `config` without a separate embedding or output head if the stored tensor is a copy of the target's."""

    def differs(part: str, theirs: Any) -> bool:
        names = [f"layers.{depth}.{part}.weight" for depth in range(config.depths)]
        return not all(checkpoint.is_copy(name, theirs.weight) for name in names)

    return replace(
        config,
        own_embedding=config.own_embedding and differs("embed_tokens", target.get_input_embeddings()),
        own_output_head=config.own_output_head and differs("head", target.get_output_embeddings()),
    )


class KeptRows:
    """Keeps, for each MTP layer, copies of the output head's rows for the draft vocabulary, until weights change."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[tuple[int, int], Callable[[Tensor], Tensor]]] = {}

    def __reduce__(self) -> tuple[type["KeptRows"], tuple[()]]:
        return KeptRows, ()

    def of(self, output: nn.Module, ids: Tensor, depth: int) -> Callable[[Tensor], Tensor]:
        """Return a function that maps outputs `[..., h]` of MTP layer `depth` to logits `[..., d]` of tokens `ids`."""
        weight, bias = cast(Tensor, output.weight), cast(Tensor | None, getattr(output, "bias", None))
        version = (weight.data_ptr(), 0 if weight.is_inference() else weight._version)
        if depth not in self._kept or self._kept[depth][0] != version:
            rows = packed_linear(weight.detach()[ids], None if bias is None else bias.detach()[ids])
            self._kept[depth] = version, rows
        return self._kept[depth][1]


_GROWING_ROPES = ("dynamic", "longrope")  # RoPE types whose angles depend on the text's length.


class BoundMtp(TrainableModel):
    """Runs a head's MTP layers with parts of one target; see `MtpHead.bind`. `layers` are the head's, or copies with
    packed weights. If passed, `forward` replaces `MtpHead.forward`, with the same arguments.
    """

    def __init__(
        self, head: MtpHead, target: PreTrainedModel, layers: nn.Module, forward: Callable[..., Tensor] | None
    ) -> None:
        config, decoder, text = head.settings, target.get_decoder(), target.config.get_text_config()
        self._head, self._config, self._layers = head, config, list(cast(Any, layers))
        self._forward = forward
        self.depths = config.depths
        self.device, self.dtype = head.device, head.dtype
        table, output = target.get_input_embeddings(), target.get_output_embeddings()
        self._tables = [layer.embed_tokens if config.own_embedding else table for layer in self._layers]
        self._outputs = [layer.head if config.own_output_head else output for layer in self._layers]
        is_normed = config.feature_layer is not None and config.fed == "after"
        self._final_norm = decoder.norm if is_normed else nn.Identity()
        self._rotary = getattr(decoder, "rotary_emb", None)
        self.has_fixed_places = all(kind not in str(getattr(text, "rope_parameters", None)) for kind in _GROWING_ROPES)
        types = [config.layer_type(depth) for depth in range(config.depths)]
        # The keywords with which to call `_rotary`, for each layer type; nothing if the target has no RoPE.
        self._kinds: dict[str, dict[str, str]] = {}
        if self._rotary is not None:
            is_told = "layer_type" in inspect.signature(self._rotary.forward).parameters
            self._kinds = {kind: {"layer_type": kind} if is_told else {} for kind in types}
        windows = [text.sliding_window if name == "sliding_attention" else None for name in types]
        self._patterns = [AttentionPattern(window) for window in windows]
        is_odd = any(config.experts) or any(windows)  # their control flow depends on values or lengths
        self.is_compilable = config.depths == 1 and not is_odd and config.fed_back != "target"
        self._ids = None if config.draft_token_ids is None else head.draft_token_ids
        self.proposable_tokens = text.vocab_size if self._ids is None else len(self._ids)
        self._projections: list[Any] = self._outputs if self._ids is None else []
        if self._ids is not None and forward is None:  # training changes weights, so no rows are packed
            self._projections = [head.rows.of(one, self._ids, depth) for depth, one in enumerate(self._outputs)]

    @property
    def modules(self) -> nn.ModuleList:
        return nn.ModuleList([self._head, self._final_norm, *self._tables, *self._outputs])

    def fuse(self, features: Tensor) -> Tensor:
        return self._final_norm(features).to(self.device, self.dtype)

    def places(self, positions: Tensor) -> Places:
        """Return a tuple: RoPE's cosine and sine of each layer type, and last the positions `[b or 1, t, 1]`."""
        like = torch.empty(1, 1, 1, dtype=self.dtype, device=self.device)
        angles = [cast(Any, self._rotary)(like, positions, **kind) for kind in self._kinds.values()]
        return (*(part for pair in angles for part in pair), positions[..., None])

    def run(
        self, depth: int, tokens: Tensor, hidden: Tensor | None, places: Places, entries: Entries, wanted: Wanted = ALL
    ) -> Tensor:
        """Run MTP layer number `depth`, then its norm, unless `fed_back` is "before"; return the wanted outputs."""
        embeddings = self._tables[depth](tokens).to(self.device, self.dtype)
        positions = places[-1]
        options: dict[str, Any] = {}
        if self._config.zeroed_start and depth == 0 and entries.first_slot == 0:
            # the first token of each text sees only itself
            starts = positions == 0 if entries.mask is None else entries.mask[:, 0].sum(-1, keepdim=True) == 1
            embeddings = embeddings.masked_fill(starts, 0)
        if self._kinds:
            at = 2 * list(self._kinds).index(self._config.layer_type(depth))
            options["position_embeddings"] = places[at : at + 2]
        pattern, mask = self._patterns[depth], entries.mask
        if pattern.window is not None:
            mask = _near(entries, positions, pattern)
            entries = entries if mask is not None else _Newest(entries, pattern.window)
        if self._layers[depth].is_eager:
            mask = _added(mask, embeddings)
        options |= {"attention_mask": mask, "position_ids": positions[..., 0], CACHE_KEYWORD: entries}
        layer = self._layers[depth] if self._forward is None else partial(self._forward, depth)
        output = at_wanted(layer(embeddings, hidden, **options), wanted)
        return output if self._config.fed_back == "before" else self._layers[depth].norm(output)

    def feedback(self, output: Tensor, hidden: Tensor | None) -> Tensor | None:
        return hidden if self._config.fed_back == "target" else output

    def normed(self, output: Tensor, depth: int = 0) -> Tensor:
        return self._layers[depth].norm(output) if self._config.fed_back == "before" else output

    def normed_logits(self, normed: Tensor, depth: int = 0) -> Tensor:
        head: Any = self._outputs[depth]
        if self._projections:
            project = self._projections[depth]
        else:
            assert self._ids is not None
            project = self._head.rows.of(head, self._ids, depth)
        return project(normed.to(head.weight.device, head.weight.dtype)).to(self.device, torch.float32)

    def output_rows(self, depth: int = 0) -> tuple[Tensor, Tensor | None]:
        head = self._outputs[depth]
        parts = head.weight, getattr(head, "bias", None)
        weight, bias = (part if part is None or self._ids is None else part[self._ids] for part in parts)
        assert weight is not None
        return weight, bias

    def target_ids(self, draft_ids: Tensor) -> Tensor:
        return draft_ids if self._ids is None else self._ids[draft_ids]


def _near(entries: Entries, positions: Tensor, pattern: AttentionPattern) -> Tensor | None:
    """Return the mask of `entries` that also hides text keys outside the pattern's window; `None` for a single query
    without a mask. `positions` `[b or 1, t, 1]` belong to the queries. Keys of the tree, in slots below 0, are kept.
    """
    mask, count = entries.mask, positions.shape[1]
    if mask is None and count == 1:
        return None
    length = count if mask is None else mask.shape[-1]
    slots = torch.arange(length, device=positions.device) + entries.first_slot
    keys = torch.where(slots < 0, positions, slots)
    return pattern.mask(positions[:, None], keys[:, None], mask)


class _Newest(Entries):
    """Wraps `entries` for a single query without a mask: `update` leaves out the text before the window."""

    def __init__(self, entries: Entries, window: int) -> None:
        self._entries, self._window = entries, window
        self.first_slot = entries.first_slot

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        found, tree = self._entries.update(keys, values, layer_idx), -self.first_slot
        gone = found[0].shape[2] - self._window
        if gone <= 0:
            return found
        keys, values = (torch.cat([part[:, :, :tree], part[:, :, tree + gone :]], dim=2) for part in found)
        return keys, values


def _added(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """Convert a bool mask to an additive one with the dtype of `like` `[b, t, h]`; `None`: causal, if t > 1."""
    count = like.shape[1]
    if mask is None and count == 1:
        return None
    if mask is None:
        order = torch.arange(count, device=like.device)
        mask = AttentionPattern().mask(order[:, None], order)[None, None]
    return additive(mask, like.dtype)
