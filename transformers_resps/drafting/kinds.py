"""Lists the kinds of drafters that have weights, with all that other modules need to know about each kind.

Most drafter classes are in packages that import this one, so the list holds class names, which are imported on demand.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

from .source import DraftSource


class Reference(str):
    """The name of an object in this library, as `module:name`."""

    __slots__ = ()

    def load(self) -> Any:
        return resolve_name(f"transformers_resps.{self}")


@dataclass(frozen=True, slots=True)
class DrafterKind:
    """One kind of drafter, such as EAGLE heads."""

    source: Reference  # its `DraftSource` class
    saved_as: str = ""  # `model_type` in the config.json that we write; empty if Transformers writes it
    marks: tuple[str, ...] = ()  # parts of the `model_type` or class name in other publishers' config.json
    # Whether a checkpoint is of this kind, given its tensors by their `bare_names`; `None` if config.json decides.
    is_in: Callable[[Mapping[str, Any]], bool] | None = None
    loaded_as: tuple[str, ...] = ()  # `model_type`s of Transformers' models that draft as this kind
    new: str | None = None  # value of the trainer's `new_head` for this kind; `None` if it cannot be trained
    objective: Reference | None = None  # its training objective, an `Objective`
    # Runs a drafter over whole texts for diagnosis; its positional arguments are those of `heads.unrolled.unroll`.
    unroll: Reference | None = None
    records: bool = False  # whether policies can be trained on records of its candidate pools
    exports: tuple[str, ...] = ()  # file layouts of other engines in which it can be exported

    @property
    def name(self) -> str:
        return self.source.split(":")[1]


SHAPING = ("fc.weight", "layers.0.self_attn.q_proj.weight")  # name endings of tensors whose shapes decide the kind
_PREFIXES = ("mtp_dspark.", "model.", "draft_model.")
# Beginnings of tensor names that occur only in block heads.
_OF_BLOCKS = ("prefix_gru.", "logit_head.prefix_gru.", "markov_head.", "candidate_selector.", "encoder.fc.")


def bare_names(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Remove known prefixes from the names of `tensors`, and leave out tensors that the config or target provides."""
    found = {}
    for name, tensor in tensors.items():
        while name.startswith(_PREFIXES):
            name = name.partition(".")[2]
        if not name.startswith("verifier_") and not name.endswith("rotary_emb.inv_freq"):
            found[name] = tensor
    return found


def _is_eagle(tensors: Mapping[str, Any]) -> bool:
    """Whether the first layer reads an embedding joined with a feature, or a name occurs only in EAGLE-3 heads."""
    fused, query = (tensors.get(name) for name in SHAPING)
    is_wide = fused is not None and query is not None and query.shape[1] == 2 * fused.shape[0]
    return is_wide or any("mask_hidden" in name for name in tensors) or "layers.0.hidden_norm.weight" in tensors


def _is_block(tensors: Mapping[str, Any]) -> bool:
    """Whether the tensor names are those of a block head, even of one that this library cannot load."""
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
KINDS = (EAGLE, BLOCK, MTP, GEMMA, CAUSAL)  # in the order in which they are tried


def kind_of_files(config: Mapping[str, Any], tensors: Mapping[str, Any]) -> DrafterKind:
    """Return the kind of head in a checkpoint. If none fits, return EAGLE, whose loader then reports what is missing.

    `tensors` maps published names to tensors. Only the names are read, and the shapes of tensors named in `SHAPING`.
    """
    saved = next((kind for kind in KINDS if kind.saved_as and kind.saved_as == config.get("model_type")), None)
    names = bare_names(tensors)
    return saved or next((kind for kind in KINDS if kind.is_in is not None and kind.is_in(names)), EAGLE)


def kind_of_model(model_type: str | None) -> DrafterKind:
    """Return the kind of drafter that is made from a Transformers model of this `model_type`."""
    return next((kind for kind in KINDS if model_type in kind.loaded_as), CAUSAL)


def kind_of(source: DraftSource) -> DrafterKind:
    """Return the entry of `KINDS` for a source; raise `StopIteration` if there is none."""
    names = {parent.__name__ for parent in type(source).__mro__}
    return next(kind for kind in KINDS if kind.name in names)
