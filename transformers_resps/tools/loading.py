"""Load the targets, drafters, policies and prompts that are named on a command line."""

import argparse
import json
import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path, PurePath
from typing import Any

import torch
from transformers import AutoConfig, BitsAndBytesConfig, TorchAoConfig
from transformers.quantizers.auto import AutoQuantizationConfig

from ..assistants import load_drafter
from ..compat import check_extra, load_model
from ..data import Conversation, load_conversations
from ..drafting import DraftSource
from ..generation.attach import attach
from ..generation.request import Assistants
from ..heads.formats.reading import check_is_target
from ..policies.base import Policy
from ..policies.fixed import FixedPolicy
from ..policies.saving import AutoPolicy
from ..tree import TreeShape
from ..verifying.prepacking import prepack
from .cli import QUANTIZATIONS, shape


_GROUP = 32  # Number of inputs that share a scale in int4, as in llama.cpp's Q4_0.

# Folder names that do not identify a model, since every training run has them.
_KINDS = re.compile(r"(head|policy)(-unfinished)?|checkpoint-\d+|model|\.|\.\.|")

# Every task with every subject gives fifty questions, which any chat model answers at some length.
_TASKS = (
    "Explain {} to a child.",
    "Write a short story about {}.",
    "List five facts about {}.",
    "What is the history of {}?",
    "Compare {} fifty years ago and today.",
    "Write a Python function that prints a report about {}.",
    "Give step-by-step advice to someone new to {}.",
    "Summarise the main arguments for and against {}.",
    "Write a polite e-mail asking an expert about {}.",
    "Make a quiz of three questions about {}, with answers.",
)
_SUBJECTS = ("bicycles", "the ocean", "cooking", "public libraries", "numbers")


def default_device() -> str:
    """Return "cuda" if available, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_target(
    name: str, dtype: str | None, device: str | None = None, *, packed: bool = False, quantization: str | None = None
) -> Any:
    """Load a target. Default device: a GPU if there is one. Default dtype: the checkpoint's; on a CPU float32.

    `quantization` is a name in `QUANTIZATIONS`, or a quantization config of Transformers in JSON. A quantized target
    has bfloat16 as its default dtype, because compiled steps read quantized weights only in bfloat16. Raises a
    `ValueError` if `name` is a draft head.
    """
    check_is_target(name)
    device = device or default_device()
    dtype = dtype or ("bfloat16" if quantization else "float32" if device == "cpu" else "auto")
    options: dict[str, Any] = {}
    if quantization:
        options = {"quantization_config": _quantization_config(name, quantization), "device_map": device}
    try:
        target = load_model(name, dtype=dtype, **options).to(device)
    except ImportError as error:  # a quantizer of Transformers lacks its library
        raise ValueError(str(error)) from error
    return prepack(target) if packed else target


def _quantization_config(name: str, quantization: str) -> Any:
    """Make the quantization config; raise `ValueError` if checkpoint `name` is quantized or a library is missing."""
    config = AutoConfig.from_pretrained(name)
    if any(getattr(one, "quantization_config", None) for one in (config, config.get_text_config(decoder=True))):
        raise ValueError(f"The checkpoint {name} is quantized already. Leave out `--quantization`.")
    if quantization not in QUANTIZATIONS:
        return AutoQuantizationConfig.from_dict(json.loads(quantization))
    check_extra("quantized")
    if quantization == "nf4":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup

    if quantization == "int4":
        return TorchAoConfig(IntxWeightOnlyConfig(torch.int4, PerGroup(_GROUP)))  # type: ignore[attr-defined]
    # By default torchao changes inductor's settings, and compiled code is stored for one choice of them.
    return TorchAoConfig(Int8WeightOnlyConfig(version=2, set_inductor_config=False))


def load_source(name: str | None, target: Any, revision: str | None = None) -> DraftSource | None:
    """Attach `target` and load a drafter for it, from a folder, Hub id or "mtp"; the attached target keeps it."""
    assistants: Assistants = attach(target).speculation_state.assistants
    named = name if name is None or revision is None else load_drafter(name, target, revision=revision)
    return assistants.source(target, named)


def load_policy(text: str | None, head: DraftSource | None) -> Policy | str:
    """Return a fixed tree for numbers such as `8,4,2`, a saved policy for a folder or Hub id, or "auto" unchanged.

    For `None` return the head's default tree, or "auto" without a head. Raises a `ValueError` for unknown names.
    """
    if text is None and head is not None:
        return FixedPolicy(head.default_shape)
    if text is None or text == "auto":
        return "auto"
    tree = named_tree(text)
    return AutoPolicy.from_pretrained(text) if tree is None else FixedPolicy(tree)


def named_tree(text: str) -> TreeShape | None:
    """Parse a shape such as `8,4,2`; return `None` for a path or a text without comma, else raise `ValueError`."""
    if "," not in text or Path(text).exists():
        return None
    try:
        return shape(text)
    except argparse.ArgumentTypeError as error:
        raise ValueError(str(error)) from error


def short_name(source: str) -> str:
    """Return the last part of a folder or Hub id that is not a common name such as `head` or `checkpoint-1`.

    >>> short_name("runs/gsm8k/policy"), short_name("runs/chat"), short_name("you/head"), short_name("checkpoint-20")
    ('gsm8k', 'chat', 'you', 'checkpoint-20')
    """
    named = PurePath(source)
    parts = (Path(source).resolve() if Path(source).is_dir() else named).parts
    return next((part for part in reversed(parts) if not _KINDS.fullmatch(part)), named.name)


def read_conversations(args: argparse.Namespace, most: int) -> list[Conversation]:
    """Read the first `most` conversations of `--dataset`, if given; raise `ValueError` if none has a user turn."""
    if not args.dataset:
        return []
    conversations = list(islice(load_conversations(args.dataset, args.split), most))
    if not any(up_to(conversation, "user") for conversation in conversations):
        raise ValueError(
            f"`--dataset {args.dataset}` has no user turns to use as prompts. Pass rows with `messages`, `turns` or a "
            "`prompt`."
        )
    return conversations


def questions_in(conversations: Sequence[Conversation], most: int) -> list[Conversation]:
    """Cut each conversation after its first user turn; without conversations return `most` built-in questions."""
    if conversations:
        return [asked for conversation in conversations if (asked := up_to(conversation, "user"))]
    texts = [task.format(subject) for subject in _SUBJECTS for task in _TASKS]
    return [[{"role": "user", "content": text}] for text in texts[:most]]


def up_to(conversation: Conversation, role: str) -> Conversation:
    """Cut a conversation after its first turn of `role`; return an empty list if there is no such turn."""
    roles = [message["role"] for message in conversation]
    return conversation[: roles.index(role) + 1] if role in roles else []
