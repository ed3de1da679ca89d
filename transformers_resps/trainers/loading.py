"""Loads the target, tokenizer and head for training, or makes a new head."""

import copy
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from ..assistants import load_head
from ..compat import load_model, text_config, unwrapped
from ..data import Example, choose_draft_vocabulary
from ..drafting import TrainableSource
from ..drafting.kinds import KINDS
from ..generation.attach import attach
from ..heads import BlockHead, DraftHead, pair_identity
from ..heads.formats.reading import WholeModelError, check_is_target
from .base import check_type
from .head_config import DraftHeadTrainingConfig
from .policy_config import PolicyTrainingConfig


_WHERE = ("revision", "subfolder", "token", "cache_dir")  # Arguments of `from_pretrained` that locate files.
_ODD_SHARE = 0.01  # A fine-tune's tokenizer may give other ids to this share of the tokens, such as reserved tokens.


def default_folder(target: Any, artefact_name: str) -> str:
    """Return the output folder for a run without `args`: the target's name and `artefact_name`, as in TRL."""
    name = target if isinstance(target, str) else getattr(getattr(target, "config", None), "name_or_path", "")
    return f"{Path(name).name or 'target'}-{artefact_name}"


def as_target(target: PreTrainedModel | str, init_kwargs: dict[str, Any] | None = None) -> PreTrainedModel:
    """Return `target`, or load it if it is a folder or Hub id, by default in the dtype of its checkpoint."""
    if not isinstance(target, str):
        check_type("target", target, PreTrainedModel)
        if isinstance(target, TrainableSource):
            raise ValueError(
                f"`target` is a `{type(target).__name__}`, but must be the model that the head drafts for."
            )
        if init_kwargs:
            raise ValueError("`target_init_kwargs` is set, but `target` is a loaded model. Leave one of them out.")
        return target
    options = init_kwargs or {}
    check_is_target(target, **{name: options[name] for name in _WHERE if name in options})
    return load_model(target, **{"dtype": "auto", **options})


def context_of(target: PreTrainedModel) -> int:
    """Return the maximum number of positions that a target can read."""
    return getattr(text_config(target), "max_position_embeddings", None) or sys.maxsize


def load_tokenizer(target: PreTrainedModel, processing_class: Any = None) -> PreTrainedTokenizerBase | None:
    """Return `processing_class` or its tokenizer, by default the target's; `ValueError` if it is another model's."""
    if processing_class is None:
        return _tokenizer_at(target.config.name_or_path)
    is_processor = isinstance(processing_class, ProcessorMixin)
    tokenizer: Any = getattr(processing_class, "tokenizer", None) if is_processor else processing_class
    check_type("processing_class", tokenizer, PreTrainedTokenizerBase)
    if is_processor and tokenizer.chat_template is None:
        tokenizer = copy.copy(tokenizer)  # the caller's tokenizer stays unchanged
        tokenizer.chat_template = processing_class.chat_template
    own = _tokenizer_at(target.config.name_or_path, local_files_only=True)
    if own is not None:
        ids, ours = tokenizer.get_vocab(), own.get_vocab()
        is_other = sum(ids.get(token) != number for token, number in ours.items()) > _ODD_SHARE * len(ours)
    else:  # the target has no tokenizer, so only its end tokens can be compared
        special, ends = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder), end_tokens(target)
        is_other = bool(special and ends) and not special & ends
    if is_other:
        raise ValueError(
            f"`processing_class` ({tokenizer.name_or_path or type(tokenizer).__name__}) is another model's tokenizer: "
            f"it gives other ids to the tokens of {target.config.name_or_path or type(target).__name__}. Pass the "
            "target's own, or leave `processing_class` out."
        )
    return tokenizer


def end_tokens(target: PreTrainedModel) -> set[int]:
    """Return the ids of the end tokens that the target's text config and generation config name."""
    token_ids: set[int] = set()
    for config in (text_config(target), target.generation_config):
        ids = getattr(config, "eos_token_id", None)  # missing in the text configs of Qwen-VL and GLM-V
        token_ids |= {ids} if isinstance(ids, int) else set(ids or ())
    return token_ids


def load_named_head(argument: str, name: str, target: PreTrainedModel, **init_kwargs: Any) -> TrainableSource:
    """Load the head `name`, a folder or Hub id; raise `ValueError`, naming `argument`, if it holds a whole model."""
    try:
        return load_head(name, target, **init_kwargs)
    except WholeModelError as error:
        raise ValueError(
            f"`{argument}` is {name!r}, which holds no draft head. Pass the folder or Hub id of one, or make a new "
            "head with `DraftHeadTrainer(None, ...)`; the model that it drafts for is `target`."
        ) from error


def new_head(
    target: PreTrainedModel,
    examples: Iterable[Example],
    tokenizer: PreTrainedTokenizerBase | None,
    args: DraftHeadTrainingConfig,
    **init_kwargs: Any,
) -> TrainableSource:
    """Make a float32 head for `target`, of the kind `args.new_head`, with the config fields `init_kwargs`.

    Its draft vocabulary has end tokens, special tokens, and the most frequent tokens of the answers in `examples`. If
    `args.draft_vocab_size` is 0, it has the whole vocabulary, and `examples` are not read.
    """
    everything = text_config(target).vocab_size
    ids = None
    if args.draft_vocab_size:
        always = end_tokens(target) | set([] if tokenizer is None else tokenizer.all_special_ids)
        ids = choose_draft_vocabulary(examples, everything, args.draft_vocab_size, always).token_ids
    kind = next(kind for kind in KINDS if kind.new == args.new_head)
    return kind.source.load().untrained(target, ids, args.ttt_steps, **init_kwargs).to(torch.float32)


def _tokenizer_at(name: str | None, **where: Any) -> PreTrainedTokenizerBase | None:
    if not name:
        return None
    try:
        return AutoTokenizer.from_pretrained(name, **where)
    except (OSError, ValueError):  # the target was not loaded from there, or has no tokenizer
        return None


@dataclass(frozen=True, slots=True)
class Pair:
    """An attached target, its head, and the target's tokenizer."""

    target: Any
    head: DraftHead | BlockHead
    tokenizer: PreTrainedTokenizerBase

    @property
    def identity(self) -> dict[str, Any]:
        return pair_identity(self.target, self.head)

    @property
    def names(self) -> dict[str, str | None]:
        return {"target": self.target.config.name_or_path or None, "head": unwrapped(self.head).name_or_path or None}

    @classmethod
    def of(
        cls,
        target: PreTrainedModel | str,
        head: DraftHead | BlockHead | str,
        tokenizer: Any,
        args: PolicyTrainingConfig,
    ) -> "Pair":
        """Make a pair: load models given by name, attach the target, check that head and tokenizer fit the target."""
        model: Any = attach(as_target(target, cast(Any, args.target_init_kwargs)))
        if isinstance(target, str):
            model.to(args.device)
        loaded: Any = load_named_head("head", head, model) if isinstance(head, str) else head
        check_type("head", unwrapped(loaded), *(kind.source.load() for kind in KINDS if kind.records))
        unwrapped(loaded).check_target(model)
        reads = load_tokenizer(model, tokenizer)
        if reads is None:
            raise ValueError(
                f"There is no tokenizer where the target came from ({model.config.name_or_path or 'nowhere'}), but "
                "prompts are text. Pass it as `processing_class`."
            )
        return cls(model, loaded.eval(), reads)
