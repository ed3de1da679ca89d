"""Load a drafter of any kind: a draft head, MTP layers, or a model of Transformers."""

import os
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.generation.candidate_generator import CandidateGenerator

from ..compat import load_model
from ..drafting import DraftSource, TrainableSource
from ..drafting.foreign import ForeignSource
from ..drafting.kinds import CAUSAL, MTP, kind_of_model
from ..heads import BlockHead, DraftHead
from ..heads.formats.reading import WholeModelError, kind_in
from ..hub.checkpoint import HUB
from .mtp import MtpHead
from .mtp_layouts import names_mtp
from .self_draft import SelfDraft


# Names to pass instead of a folder or Hub id: the MTP layers in the target's checkpoint, and the target itself.
CAME_ALONG, ITSELF = "mtp", "self"


class AutoDraftHead:
    """Loads a draft head of any kind: `from_pretrained` recognises the kind by its tensors."""

    @staticmethod
    def from_pretrained(
        id_or_folder: str | os.PathLike[str], target: PreTrainedModel, **keywords: Any
    ) -> DraftHead | BlockHead | MtpHead | PreTrainedModel:
        """Load a drafter for `target`, to pass to `generate` as `assistant_model`.

        Returns a `DraftHead` (EAGLE-3), a `BlockHead` (DFlash, DSpark, JetSpec, DFlash 2, Muse-Glimmer), a saved
        `MtpHead`, or an assistant of Gemma 4. `keywords` are arguments of `from_pretrained` of that class, such as
        `revision`. Raises the errors of that method, and a `WholeModelError` for a model that is not an assistant.
        """
        hub = {key: keywords[key] for key in HUB & keywords.keys()}
        source = kind_in(id_or_folder, **hub).source.load()
        try:
            return source.from_pretrained(id_or_folder, target, **keywords)
        except WholeModelError as error:
            if kind_of_model(error.model_type) is CAUSAL:
                raise
            return _load_whole(id_or_folder, target, hub)


def load_drafter(
    name: str | os.PathLike[str], target: PreTrainedModel, **keywords: Any
) -> DraftSource | PreTrainedModel:
    """Load a drafter in the target's dtype, on its device; "mtp" is the target's MTP layers, "self" a `SelfDraft`."""
    if name == ITSELF:
        return SelfDraft(target)
    if name == CAME_ALONG:
        return MtpHead.from_target(target, **keywords)
    try:
        return AutoDraftHead.from_pretrained(name, target, **keywords)
    except WholeModelError:
        return _load_whole(name, target, {key: keywords[key] for key in HUB & keywords.keys()})


def load_head(name: str, target: PreTrainedModel, **keywords: Any) -> TrainableSource:
    """Load a head that can be trained or diagnosed; from the checkpoint of a whole model, load its MTP layers.

    Raises the errors of `from_pretrained` of the head's class, and a `WholeModelError` if a model has no MTP layers.
    """
    if name == CAME_ALONG:
        return MtpHead.from_target(target, **{key: value for key, value in keywords.items() if value is not None})
    hub = {key: keywords[key] for key in HUB & keywords.keys()}
    config = PreTrainedConfig.get_config_dict(name, **hub)[0]
    kind = MTP if names_mtp(config) else kind_in(name, **hub)
    return kind.source.load().from_pretrained(name, target=target, **keywords)


def source_of(model: PreTrainedModel | CandidateGenerator, target: PreTrainedModel) -> DraftSource:
    """Wrap a model or candidate generator in a `DraftSource`; raise a `ValueError` if it cannot draft for `target`."""
    if isinstance(model, CandidateGenerator):
        return ForeignSource(model)
    return kind_of_model(model.config.model_type).source.load().of_model(model, target)


def _load_whole(name: str | os.PathLike[str], target: PreTrainedModel, hub: dict[str, Any]) -> PreTrainedModel:
    return load_model(os.fspath(name), dtype=target.dtype, **hub).to(target.device)
