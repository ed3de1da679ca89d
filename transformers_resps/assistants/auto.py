"""Which source a checkpoint or a loaded model makes."""

import os
from typing import Any

from transformers import PreTrainedModel

from ..compat import load_model
from ..drafting import DraftSource
from ..heads import BlockHead, DraftHead
from ..heads.formats.reading import WholeModelError, class_in
from ..hub.checkpoint import HUB
from .causal import CausalDrafter
from .gemma import GemmaAssistant
from .mtp import MtpHead


_MUSE = "muse_glimmer_assistant"


class AutoDraftHead:
    """Loads a draft head of any kind, told by its tensors; see `from_pretrained`."""

    @staticmethod
    def from_pretrained(
        id_or_folder: str | os.PathLike[str], target: PreTrainedModel, **keywords: Any
    ) -> DraftHead | BlockHead | MtpHead | PreTrainedModel:
        """Load what drafts for `target`.

        Args:
            id_or_folder: a Hub id or a folder.
            target: the model that it will draft for.
            keywords: `revision` and others of the `from_pretrained` of the class that reads the checkpoint.

        Returns:
            A `DraftHead` (EAGLE-3), a `BlockHead` (DFlash, DSpark, JetSpec, DFlash 2, Muse-Glimmer's), an `MtpHead`
            that was saved, or a loaded assistant of Gemma 4. All are passed to `generate` as `assistant_model`.

        Raises:
            ValueError: as `DraftHead.from_pretrained`; a `WholeModelError` for a model that is no assistant.
        """
        found = class_in(id_or_folder, **{key: value for key, value in keywords.items() if key in HUB})
        if found == "MtpHead":
            return MtpHead.from_pretrained(id_or_folder, target, **keywords)
        if found == "BlockHead":
            return BlockHead.from_pretrained(id_or_folder, target, **keywords)
        try:
            return DraftHead.from_pretrained(id_or_folder, target, **keywords)
        except WholeModelError as error:
            if not GemmaAssistant.is_named(error.model_type):
                raise
        model: PreTrainedModel = load_model(os.fspath(id_or_folder), dtype=target.dtype).to(target.device)
        return model


def source_of(model: PreTrainedModel, target: PreTrainedModel) -> DraftSource:
    """What a loaded model of Transformers drafts as.

    Raises:
        ValueError: it cannot draft for this target.
    """
    if model.config.model_type == _MUSE:
        return BlockHead.from_pretrained(None, target, config=model.config, state_dict=model.state_dict())
    return GemmaAssistant(model, target) if GemmaAssistant.is_one(model) else CausalDrafter(model, target)
