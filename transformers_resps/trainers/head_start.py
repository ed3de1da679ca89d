"""Everything that the training of a head starts from, loaded, checked and prepared."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from ..compat import unwrapped
from ..data import vocabulary_of
from ..head import BoundHead, DraftHead
from ..target.prepacking import prepack
from .head_arguments import freeze_output_head
from .head_config import DraftHeadTrainingConfig
from .head_texts import HeadTexts, counted_examples
from .loading import load_head, load_target, new_head


@dataclass(frozen=True, slots=True)
class HeadStart:
    """What `DraftHeadTrainer` trains, and on what.

    Attributes:
        model: the head, or a PEFT model of it.
        origin: folder or Hub id that the head came from; empty for a new one.
        target: the loaded model.
        texts: prepares datasets for it.
        train_rows: the prepared training data.
        eval_rows: the prepared held-out data.
    """

    model: Any
    origin: str
    target: PreTrainedModel
    texts: HeadTexts
    train_rows: Any
    eval_rows: Any

    @property
    def head(self) -> DraftHead:
        """The head itself."""
        return cast(DraftHead, unwrapped(self.model))


def start_head(
    model: Any, target: Any, args: DraftHeadTrainingConfig, processing_class: Any, peft_config: Any, **datasets: Any
) -> HeadStart:
    """Load what is named, make what is missing, and prepare `train_dataset` and `eval_dataset`.

    Args:
        model: see `DraftHeadTrainer`, as are the others.
        target: see there.
        args: see there.
        processing_class: see there.
        peft_config: see there.
        datasets: `train_dataset` and `eval_dataset`.

    Raises:
        ValueError: they do not fit together.
    """
    given = cast(Any, args.model_init_kwargs)
    loaded = load_target(target, cast(Any, args.target_init_kwargs))
    if isinstance(target, str) and loaded.dtype is torch.float32:
        prepack(loaded)  # a sixth faster on a CPU, not in bf16; a model of the caller's stays as it is
    head = load_head(model, loaded, given) if isinstance(model, str) else model
    if head is not None:
        unwrapped(head).check_target(loaded)
    texts = HeadTexts(loaded, processing_class, args)
    if args.log_drafts and texts.tokenizer is None:
        raise ValueError("`log_drafts` is set, but there is no tokenizer. Pass the target's as `processing_class`.")
    rows, held_out = (texts.prepare(datasets[name], name) for name in ("train_dataset", "eval_dataset"))
    if head is None:
        examples = [] if rows is None else counted_examples(rows)
        head = new_head(loaded, examples, texts.tokenizer, args.draft_vocab_size, given)
    elif rows is not None:
        vocabulary_of(unwrapped(head), counted_examples(rows))  # a head that could learn nothing is refused
    origin = unwrapped(head).name_or_path
    if peft_config is not None:
        from peft import get_peft_model

        head = get_peft_model(head, peft_config)
    freeze_output_head(BoundHead(unwrapped(head), loaded).head, args.freeze_output_head)
    return HeadStart(head, origin, loaded, texts, rows, held_out)
