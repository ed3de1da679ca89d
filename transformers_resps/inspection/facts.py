"""Says what a page tells about models and machine. Names only, no local paths: pages are shared."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from ..calibration import device_name
from ..heads import DraftHead
from ..policies import Policy


def facts_of(model: PreTrainedModel, head: DraftHead | None, policy: Policy, decoding: str) -> dict[str, str]:
    """Return facts by name, in the order of the page.

    Args:
        model: the target.
        head: `None` for lookup drafts alone.
        policy: of the call.
        decoding: how tokens were picked, in words.
    """
    threads = f", {torch.get_num_threads()} threads" if model.device.type == "cpu" else ""
    return {
        "target": _name(model),
        **({} if head is None else {"head": _name(head)}),
        "policy": str(policy),
        "decoding": decoding,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": device_name(model.device) + threads,
        "versions": f"transformers-resps {version('transformers-resps')}, transformers {transformers.__version__}, "
        f"torch {torch.__version__}",
    }


def _name(model: Any) -> str:
    """Return the Hub id, or the last part of a local path."""
    name = str(model.config.name_or_path or type(model).__name__)
    return Path(name).resolve().name if Path(name).exists() else name
