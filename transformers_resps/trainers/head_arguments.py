"""Check what a `DraftHeadTrainer` is given, before it loads or reads anything."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..compat import unwrapped
from ..head import DraftHead, DraftHeadConfig
from .checks import check_dataset, check_kinds
from .head_config import DraftHeadTrainingConfig


def freeze_output_head(head: DraftHead, is_frozen: bool) -> None:
    """Freeze the output rows of a head, or leave them to be trained.

    Raises:
        ValueError: they cannot be frozen, or not be trained.
    """
    config: DraftHeadConfig = head.config
    if not (config.owns_output_head or is_frozen):
        raise ValueError(
            "`freeze_output_head` is false, but the head borrows its output head from the target, which is never "
            "trained. Leave it true, or start from a head with a draft vocabulary of its own."
        )
    if not (config.owns_output_head and is_frozen):
        return
    if config.hidden_size != config.target_hidden_size and config.source is None:
        raise ValueError(
            f"`freeze_output_head` is true, but this head's output rows are {config.hidden_size} wide, the target's "
            f"{config.target_hidden_size}, so they cannot be copied and must be trained. "
            "Pass `freeze_output_head=False`."
        )
    head.lm_head.requires_grad_(False)


def check_arguments(model: Any, args: Any, train_dataset: Any, peft_config: Any) -> None:
    """Check what `DraftHeadTrainer` is given before anything is loaded.

    Raises:
        ValueError: an argument has the wrong type, or two of them contradict each other.
    """
    check_kinds("DraftHeadTrainer", args=(args, DraftHeadTrainingConfig))
    if model is not None and not isinstance(model, str):
        if isinstance(unwrapped(model), PreTrainedModel) and not isinstance(unwrapped(model), DraftHead):
            raise ValueError(
                f"`model` is a {type(unwrapped(model)).__name__}, but must be the draft head to train. Pass this "
                "model as `target`, and `None` as `model` for a new head."
            )
        check_kinds("DraftHeadTrainer", model=(unwrapped(model), DraftHead))
        if args.model_init_kwargs:
            raise ValueError("`model_init_kwargs` is set, but `model` is a loaded head. Leave one of them out.")
    if args.log_drafts and find_spec("rich") is None:
        raise ValueError("`log_drafts` needs the package `rich`. Run `pip install 'transformers-resps[train]'`.")
    if model is None and train_dataset is None and args.draft_vocab_size:
        raise ValueError(
            "`model` and `train_dataset` are missing, but the draft vocabulary of a new head is counted over the "
            "training data. Pass `train_dataset`, or `draft_vocab_size=0`."
        )
    if peft_config is not None and (model is None or hasattr(model, "get_base_model")):
        raise ValueError(
            "`peft_config` is set, but adapters need a head to start from that has none yet. Pass the head as `model`."
        )
    if train_dataset is not None:
        check_dataset(train_dataset, "train_dataset", may_stream=True)
        if not hasattr(train_dataset, "__len__"):
            _check_stream(args)


def _check_stream(args: DraftHeadTrainingConfig) -> None:
    if args.max_steps <= 0:
        raise ValueError(
            "`train_dataset` is an `IterableDataset`, whose length is not known before its end. Set `max_steps`."
        )
    if args.feature_cache_dir is not None:
        raise ValueError(
            "`feature_cache_dir` is set, but features of an `IterableDataset` are not cached. Leave it out, or pass a "
            "`Dataset`."
        )


def check_checkpoint(checkpoint: str, config: DraftHeadConfig) -> None:
    """Check that a run may go on from a checkpoint: that its head has the sizes of this one.

    Raises:
        ValueError: it has another draft vocabulary or other layers.
    """
    if not (Path(checkpoint) / "config.json").is_file():  # of adapters, which hold no head
        return
    saved = DraftHeadConfig.from_pretrained(checkpoint)
    for name in ("draft_vocab_size", "feature_layers", "hidden_size", "intermediate_size", "num_hidden_layers"):
        before, now = getattr(saved, name), getattr(config, name)
        if before != now:
            raise ValueError(
                f"{checkpoint} holds a head with {name} {before}, but this run trains one with {now}. Pass the "
                "settings of that run, or another `output_dir`."
            )
