"""The kinds of drafters that have weights: all that they differ in outside of their own classes, a row for each.

Most classes stand in rooms below this one, so a row names them, and imports them when they are needed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from .source import DraftSource


class Reference(str):
    """A name in this package, `module:name`."""

    __slots__ = ()

    def load(self) -> Any:
        """Import what it names."""
        module, name = self.split(":")
        return getattr(import_module(f"..{module}", __package__), name)


@dataclass(frozen=True, slots=True)
class DrafterKind:
    """One kind of drafter.

    Attributes:
        source: its `DraftSource`.
        saved_as: `model_type` in the config.json that it writes; empty where Transformers writes it.
        marks: parts of a `model_type` or a class in the config.json of other publishers.
        is_in: whether tensors, under `bare_names`, are such a drafter's; `None` where the config.json says it.
        loaded_as: `model_type` of models of Transformers that draft as this kind.
        new: word that asks the trainer for a new one; `None` where it is not trained.
        objective: how it is trained, an `Objective`.
        unroll: runs it over whole texts for a diagnosis: as `unroll`, without its keywords.
        records: whether its pools can be recorded, to train policies on them.
        exports: layouts of other engines in which it can be written.
    """

    source: Reference
    saved_as: str = ""
    marks: tuple[str, ...] = ()
    is_in: Callable[[Mapping[str, Any]], bool] | None = None
    loaded_as: tuple[str, ...] = ()
    new: str | None = None
    objective: Reference | None = None
    unroll: Reference | None = None
    records: bool = False
    exports: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The name of its class."""
        return self.source.split(":")[1]


SHAPING = ("fc.weight", "layers.0.self_attn.q_proj.weight")  # ends of names of tensors whose shapes tell kinds apart
_PREFIXES = ("mtp_dspark.", "model.", "draft_model.")
# Beginnings of names that only tensors of block heads have.
_OF_BLOCKS = ("prefix_gru.", "logit_head.prefix_gru.", "markov_head.", "candidate_selector.", "encoder.fc.")


def bare_names(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Strip prefixes from the names of tensors, and leave out what a config or the target says."""
    found = {}
    for name, tensor in tensors.items():
        while name.startswith(_PREFIXES):
            name = name.partition(".")[2]
        if not name.startswith("verifier_") and not name.endswith("rotary_emb.inv_freq"):
            found[name] = tensor
    return found


def _is_eagle(tensors: Mapping[str, Any]) -> bool:
    """Whether a layer reads embedding and feature side by side, or has the norms and placeholders of EAGLE-3."""
    fused, query = (tensors.get(name) for name in SHAPING)
    is_wide = fused is not None and query is not None and query.shape[1] == 2 * fused.shape[0]
    return is_wide or any("mask_hidden" in name for name in tensors) or "layers.0.hidden_norm.weight" in tensors


def _is_block(tensors: Mapping[str, Any]) -> bool:
    """Whether fused features are normed at the top. Block heads that cannot be read count, too."""
    return "hidden_norm.weight" in tensors or any(name.startswith(_OF_BLOCKS) for name in tensors)


_LEVEL_OBJECTIVE, _UNROLL = Reference("trainers.objectives:LevelObjective"), Reference("heads.unrolled:unroll")
EAGLE = DrafterKind(
    Reference("heads:DraftHead"),
    saved_as="resps_eagle3",
    marks=("eagle",),
    is_in=_is_eagle,
    new="eagle3",
    objective=_LEVEL_OBJECTIVE,
    unroll=_UNROLL,
    records=True,
    exports=("specforge", "speculators"),
)
BLOCK = DrafterKind(
    Reference("heads:BlockHead"),
    saved_as="resps_block",
    marks=("dflash", "dspark"),
    is_in=_is_block,
    loaded_as=("muse_glimmer_assistant",),
    new="block",
    objective=Reference("trainers.objectives:BlockObjective"),
    unroll=Reference("heads.unrolled:unroll_blocks"),
    records=True,
    exports=("z-lab", "speculators"),
)
MTP = DrafterKind(
    Reference("assistants:MtpHead"),
    saved_as="resps_mtp",
    new="mtp",
    objective=_LEVEL_OBJECTIVE,
    unroll=_UNROLL,
)
GEMMA = DrafterKind(Reference("assistants:GemmaAssistant"), loaded_as=("gemma4_assistant", "gemma4_unified_assistant"))
CAUSAL = DrafterKind(Reference("assistants:CausalDrafter"))
KINDS = (EAGLE, BLOCK, MTP, GEMMA, CAUSAL)  # the first one that fits


def kind_of_files(config: Mapping[str, Any], tensors: Mapping[str, Any]) -> DrafterKind:
    """Find the kind of head in a checkpoint; by default EAGLE-3's, whose reader names what is missing.

    Args:
        config: config.json.
        tensors: by their published names. Only names count, and the shapes of names that end as `SHAPING`.
    """
    saved = next((kind for kind in KINDS if kind.saved_as and kind.saved_as == config.get("model_type")), None)
    names = bare_names(tensors)
    return saved or next((kind for kind in KINDS if kind.is_in is not None and kind.is_in(names)), EAGLE)


def kind_of_model(model_type: str | None) -> DrafterKind:
    """The kind as which a model of Transformers drafts."""
    return next((kind for kind in KINDS if model_type in kind.loaded_as), CAUSAL)


def kind_of(source: DraftSource) -> DrafterKind:
    """The kind of a source that has a row.

    Raises:
        StopIteration: it has none.
    """
    names = {parent.__name__ for parent in type(source).__mro__}
    return next(kind for kind in KINDS if kind.name in names)
