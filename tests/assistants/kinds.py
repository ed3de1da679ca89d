"""A tiny target and what drafts for it, of every kind that is no draft head."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from tests.assistants.gemma import gemma_assistant, gemma_target
from tests.assistants.mtp_cases import Case
from tests.conftest import build_target


KINDS = ("MtpHead", "CausalDrafter", "GemmaAssistant")
_NAMES = {"enorm": "mtp.pre_fc_norm_embedding", "hnorm": "mtp.pre_fc_norm_hidden", "eh_proj": "mtp.fc"}
_NAMES |= {"norm": "mtp.norm", "block": "mtp.layers.{k}."}


def add_mtp_layer(folder: Path) -> None:
    """Put a random MTP layer into the files of a Llama target of the sizes of `build_target`."""
    file, config = folder / "model.safetensors", folder / "config.json"
    save_file(load_file(file) | Case("Llama", "llama", _NAMES).raw(), file, {"format": "pt"})
    config.write_text(json.dumps(json.loads(config.read_text()) | {"mtp_num_hidden_layers": 1}))


def pair_of(kind: str, folder: Path) -> tuple[PreTrainedModel, Any]:
    """The pair, as `generate` takes it; `folder` is empty."""
    if kind == "GemmaAssistant":
        return gemma_target(), gemma_assistant()
    sizes: dict[str, Any] = {"vocab_size": 19, "initializer_range": 0.6}
    target = build_target(**sizes, num_hidden_layers=2)
    if kind == "CausalDrafter":
        return target, build_target(**sizes, num_hidden_layers=1, seed=5)
    target.save_pretrained(folder)
    add_mtp_layer(folder)
    target.config.name_or_path = str(folder)
    return target, "mtp"
