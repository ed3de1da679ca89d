"""The page of the API reference, from the docstrings of the public names: part of what `make site` writes."""

import dataclasses
import re
from typing import Any

import griffe
from griffe2md import ConfigDict, render_object_docs
from transformers import Trainer, TrainingArguments

import transformers_resps
from transformers_resps import trainers


OPENING = """# API reference

Every public name, from its docstring. Shapes: `b` rows, `t` positions, `h` hidden size, `n` nodes, `d` draft
vocabulary; the whole legend is in `transformers_resps/tree.py`.
"""
TRAINERS = """## Trainers

In `transformers_resps.trainers`; both are `transformers.Trainer`s, and need the extra `train`. The tables list the
settings that Transformers' `TrainingArguments` lack, or have with another default.
"""
HOOKS = set(vars(Trainer)) - {"__init__", "train", "evaluate", "save_model", "push_to_hub"}  # that Transformers calls


def render() -> str:
    """The page."""
    package = griffe.load("transformers_resps", docstring_parser="google", resolve_aliases=True)
    config = ConfigDict(
        show_root_full_path=False,
        show_root_members_full_path=False,
        show_object_full_path=False,
        show_if_no_docstring=False,
        show_signature_annotations=True,
        inherited_members=False,
        members_order="source",
        summary=False,
        line_length=100,
    )
    parts = [render_object_docs(package[name].final_target, config) for name in transformers_resps.__all__]
    parts.append(TRAINERS)
    for name in ["ArtefactTrainer", *trainers.__all__]:
        kind: Any = getattr(trainers, name, trainers.base.ArtefactTrainer)
        documented: Any = package[f"{kind.__module__.removeprefix('transformers_resps.')}.{name}"]
        for hook in HOOKS.intersection(documented.members):
            del documented.members[hook]
        parts.append(render_object_docs(documented, config))
        if isinstance(kind, type) and issubclass(kind, TrainingArguments):
            parts.append(options(kind))
    text = "\n\n".join([OPENING.strip(), *(part.strip() for part in parts)])
    return "\n".join(without_links(line).rstrip() for line in text.splitlines()) + "\n"


def options(config: type[TrainingArguments]) -> str:
    """The settings of a trainer that Transformers does not have, or with another default."""
    inherited = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    rows = ["| setting | default | |", "|---|---|---|"]
    for field in dataclasses.fields(config):
        if field.name not in inherited or inherited[field.name] != field.default:
            rows.append(f"| `{field.name}` | {_default(field)} | {field.metadata.get('help', '')} |")
    return "\n".join(rows)


def _default(field: dataclasses.Field[Any]) -> str:
    made = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    return f"`{made!r}`"


def without_links(line: str) -> str:
    """Types as code: griffe2md links them to anchors that a page of ours does not have."""
    line = re.sub(r"\[([^][]*(?:\[\])?[^][]*)\]\(#[^)]*\)", r"\1", line)
    return re.sub(r"</?code>", "`", line)
