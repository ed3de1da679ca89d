"""The texts that a head is trained and evaluated on: from datasets in TRL's columns to batches of a token budget."""

import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from ..data import Example, prepare_dataset
from ..data.batches import PreparedTexts, StreamedBatches, TokenBudgetBatches
from .base import check_dataset
from .features import CachedFeatures, FrozenTarget
from .head_config import DraftHeadTrainingConfig
from .loading import load_tokenizer


_COUNTED_TEXTS = 4096  # of a dataset that is streamed


class HeadTexts:
    """Prepares datasets for one target.

    Args:
        target: the model that the texts are for.
        processing_class: its tokenizer; `None` for the one that lies where the target came from.
        args: `max_length` and how to tokenize.

    Attributes:
        tokenizer: the target's; `None` where there is none, which is enough for texts that are token ids.

    Raises:
        ValueError: `max_length` is more than the target reads, or the tokenizer belongs to another model.
    """

    def __init__(self, target: PreTrainedModel, processing_class: Any, args: DraftHeadTrainingConfig) -> None:
        config = target.config.get_text_config()
        context = getattr(config, "max_position_embeddings", None) or sys.maxsize
        if (args.max_length or 0) > context:
            raise ValueError(
                f"`max_length` is {args.max_length}, but the target reads at most {context} tokens. Lower "
                "`max_length`."
            )
        self._vocab_size: int = config.vocab_size
        self._max_length: int = args.max_length or context
        self._args = args
        self.tokenizer = load_tokenizer(target, processing_class)

    def prepare(self, dataset: Any, name: str) -> Any:
        """Tokenize and mask a dataset, or each in a dict of them; `None` stays `None`.

        Args:
            dataset: a `Dataset` or `IterableDataset`; for evaluation also a dict of them.
            name: of the argument, for errors and the progress bar.

        Raises:
            ValueError: it is something else, or cannot be learned from.
        """
        if dataset is None:
            return None
        if isinstance(dataset, Mapping) and name != "train_dataset":
            return {split: self.prepare(part, f"{name}[{split!r}]") for split, part in dataset.items()}
        check_dataset(dataset, name, may_stream=True)
        with self._args.main_process_first(desc=f"tokenizing {name}"):
            return prepare_dataset(
                dataset,
                name,
                self.tokenizer,
                max_length=self._max_length,
                vocab_size=self._vocab_size,
                num_proc=self._args.dataset_num_proc,
            )

    def texts(self, rows: Any, target: FrozenTarget) -> PreparedTexts | StreamedBatches:
        """The texts of a prepared dataset; with `feature_cache_dir` with the target's features, computed as needed."""
        if not hasattr(rows, "__len__"):
            return StreamedBatches(rows, self._args.tokens_per_batch, seed=_data_seed(self._args))
        if self._args.feature_cache_dir is None:
            return PreparedTexts(rows)
        return CachedFeatures(rows, self._args.feature_cache_dir, target)


def counted_examples(rows: Any) -> Iterator[Example]:
    """The examples of a prepared dataset that a draft vocabulary is counted over: all, or the first of a stream."""
    import datasets

    if isinstance(rows, datasets.IterableDataset):
        return StreamedBatches(rows, 0).examples(_COUNTED_TEXTS)
    return PreparedTexts(rows).examples()


def some_texts(rows: Any, count: int) -> Iterator[dict[str, Tensor]]:
    """Up to `count` texts of a prepared dataset, or of the first of several, as rows of a batch."""
    if isinstance(rows, Mapping):
        rows = next(iter(rows.values()))
    return (PreparedTexts(rows) if hasattr(rows, "__len__") else StreamedBatches(rows, 0)).some(count)


def questions_in(rows: Any) -> set[str]:
    """The first user turns of a prepared dataset, or of several; of a stream there are none before it is read."""
    if isinstance(rows, Mapping):
        return set().union(*map(questions_in, rows.values()))
    found = rows["question"] if rows is not None and hasattr(rows, "__len__") else ()
    return {question for question in found if question is not None}


def positions_seen(texts: PreparedTexts | StreamedBatches, args: DraftHeadTrainingConfig) -> int:
    """How many positions a run trains on, at most: all epochs, all processes, padding included."""
    if isinstance(texts, PreparedTexts) and args.max_steps <= 0:
        return int(args.num_train_epochs * sum(texts.lengths))
    batches = args.max_steps * args.gradient_accumulation_steps * args.world_size
    return int(batches * args.tokens_per_batch)


def token_budget_loader(
    texts: PreparedTexts | StreamedBatches,
    args: DraftHeadTrainingConfig,
    collator: Callable[[Any], Any],
    *,
    shuffle: bool,
) -> DataLoader[Any]:
    """Batches of up to `args.tokens_per_batch` tokens.

    Args:
        texts: what they are made of.
        args: how large they are and who loads them.
        collator: makes a batch of rows.
        shuffle: whether they come in random order, rather than in a fixed one.
    """
    how: dict[str, Any] = {"num_workers": args.dataloader_num_workers, "pin_memory": args.dataloader_pin_memory}
    if isinstance(texts, StreamedBatches):  # whose items are batches, which processes share out as if they were rows
        return DataLoader(texts, batch_size=1, collate_fn=partial(_of_one, collator), **how)
    batches = TokenBudgetBatches(texts.lengths, args.tokens_per_batch, seed=_data_seed(args), shuffle=shuffle)
    return DataLoader(texts, batch_sampler=batches, collate_fn=collator, **how)


def _of_one(collator: Callable[[Any], Any], batches: list[Any]) -> Any:
    (batch,) = batches
    return collator(batch)


def _data_seed(args: DraftHeadTrainingConfig) -> int:
    return args.seed if args.data_seed is None else args.data_seed
