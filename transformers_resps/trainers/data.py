"""Turns datasets with TRL's columns into batches of texts, or into recordings of the target's answers."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, ProcessorMixin
from transformers.utils.logging import tqdm

from ..calibration import calibrate, device_name, identity_of
from ..compat import text_config
from ..data import Example, prepare_dataset, to_tokens
from ..data.batches import PreparedTexts, StreamedBatches, TokenBudgetBatches, collate
from ..data.conversations import as_messages
from ..data.image_texts import load_processor
from ..data.preparation import shows_images
from ..generation.output import sampling
from ..heads import BlockHead, DraftHead, parameter_fingerprint
from ..policies.action_grid import ActionGrid
from ..policies.costs import CostTable
from ..replay import MOST_NODES, OutcomeTable, RankedText, RecordedText, depths_of, record_pools
from .base import written
from .features import CachedFeatures, FrozenTarget
from .head_config import DraftHeadTrainingConfig
from .loading import Pair, context_of, load_tokenizer
from .policy_config import PolicyTrainingConfig
from .rollouts import LiveRollouts, ReplayRollouts


def check_dataset(dataset: Any, name: str, *, may_stream: bool) -> None:
    """Raise `ValueError` unless the argument `name` is a `Dataset` or, if it `may_stream`, an `IterableDataset`."""
    import datasets

    if isinstance(dataset, Mapping):
        splits = [str(split) for split in dataset]
        raise ValueError(
            f"`{name}` is a {type(dataset).__name__} of the splits {splits}, but must be one of them. Pass, for "
            f"instance, `dataset[{splits[0] if splits else 'train'!r}]`."
        )
    if isinstance(dataset, datasets.IterableDataset) and not may_stream:
        raise ValueError(
            f"`{name}` is an `IterableDataset`, but its prompts are read many times. Take the first n: "
            "`Dataset.from_list(list(dataset.take(200)))`."
        )
    if not isinstance(dataset, datasets.Dataset | datasets.IterableDataset):
        raise ValueError(
            f"`{name}` is a {type(dataset).__name__}, but must be a `Dataset`{' or `IterableDataset`' * may_stream} "
            "of the package `datasets`. Make one with `Dataset.from_list(rows)` or `load_dataset`."
        )


def is_streamed(rows: Any) -> bool:
    """Return whether a dataset is a stream: it has no length and can only be iterated."""
    return not hasattr(rows, "__len__")  # needs no import of `datasets`


_COUNTED_TEXTS = 4096  # Number of a stream's first texts in which tokens are counted for a draft vocabulary.


class HeadTexts:
    """Prepares datasets for a head's trainer, and makes batches of them with at most `tokens_per_batch` tokens."""

    def __init__(self, target: PreTrainedModel, processing_class: Any, args: DraftHeadTrainingConfig) -> None:
        context = context_of(target)
        if (args.max_length or 0) > context:
            raise ValueError(
                f"`max_length` is {args.max_length}, but the target reads at most {context} tokens. Lower "
                "`max_length`."
            )
        sizes = {"max_length": args.max_length or context, "vocab_size": text_config(target).vocab_size}
        self._options: dict[str, Any] = sizes | {"num_proc": args.dataset_num_proc}
        self._args = args
        self._seed = args.seed if args.data_seed is None else args.data_seed
        self.tokenizer = load_tokenizer(target, processing_class)  # may be `None` for datasets of token ids
        self._target, self._processing_class = target, processing_class
        self.processor: ProcessorMixin | None = None  # `None` until a dataset has images

    def collate(self, rows: Any) -> dict[str, Any]:
        return collate(rows, self.processor)

    def prepare(self, dataset: Any, name: str) -> Any:
        """Prepare a dataset, or each dataset in a dict, by `prepare_dataset`; error messages use `name` for it."""
        if dataset is None:
            return None
        if isinstance(dataset, Mapping) and name != "train_dataset":
            return {split: self.prepare(part, f"{name}[{split!r}]") for split, part in dataset.items()}
        check_dataset(dataset, name, may_stream=True)
        if self.processor is None and shows_images(dataset) and "image" in self._target.input_modalities:
            self.processor = load_processor(self._target, self._processing_class)
        with self._args.main_process_first(desc=f"tokenizing {name}"):
            return prepare_dataset(dataset, name, self.tokenizer, processor=self.processor, **self._options)

    def texts(self, rows: Any, target: FrozenTarget) -> PreparedTexts | StreamedBatches:
        """Wrap prepared `rows` for `loader`; with `feature_cache_dir`, add features, which `target` computes."""
        if is_streamed(rows):
            return StreamedBatches(rows, self._args.tokens_per_batch, seed=self._seed)
        if self._args.feature_cache_dir is None:
            return PreparedTexts(rows)
        return CachedFeatures(rows, self._args.feature_cache_dir, target, self.collate)

    def loader(
        self, texts: PreparedTexts | StreamedBatches, collator: Callable[[Any], Any], *, shuffle: bool
    ) -> DataLoader[Any]:
        """Return a loader of batches of at most `tokens_per_batch` tokens; a stream is never shuffled."""
        args = self._args
        options: Any = {"num_workers": args.dataloader_num_workers, "pin_memory": args.dataloader_pin_memory}
        if isinstance(texts, StreamedBatches):  # each item is a batch; the batches are divided among processes
            return DataLoader(texts, batch_size=1, collate_fn=partial(_of_one, collator), **options)
        batches = TokenBudgetBatches(texts.lengths, args.tokens_per_batch, seed=self._seed, shuffle=shuffle)
        return DataLoader(texts, batch_sampler=batches, collate_fn=collator, **options)


def _of_one(collator: Callable[[Any], Any], batches: list[Any]) -> Any:
    (batch,) = batches
    return collator(batch)


def counted_examples(rows: Any) -> Iterator[Example]:
    """Yield the examples in which tokens are counted for a draft vocabulary: all, or a stream's first few thousand."""
    return StreamedBatches(rows, 0).examples(_COUNTED_TEXTS) if is_streamed(rows) else PreparedTexts(rows).examples()


def questions_in(rows: Any) -> set[str]:
    """Return the set of first user turns in a prepared dataset, or in a dict of such datasets; empty for a stream."""
    if isinstance(rows, Mapping):
        return set().union(*map(questions_in, rows.values()))
    questions = () if rows is None or is_streamed(rows) else rows["question"]
    return {question for question in questions if question is not None}


@dataclass(frozen=True, slots=True)
class PolicyPrompts:
    """The distinct prompts of a dataset, in the dataset's order."""

    tokens: dict[str, Tensor]  # hash of a prompt -> its token ids [s]
    first_questions: set[str]  # texts of the first user turns, by which a benchmark recognises training prompts

    @property
    def longest(self) -> int:
        return max(map(len, self.tokens.values()))

    @classmethod
    def of(cls, dataset: Any, name: str, tokenizer: Any) -> "PolicyPrompts":
        """Tokenize a dataset's prompts (see `PolicyTrainer` for the columns); error messages use `name` for it."""
        check_dataset(dataset, name, may_stream=False)
        if not len(dataset):
            raise ValueError(f"`{name}` is empty. Pass a split that has rows, or another dataset.")
        if not {"prompt", "messages"} & set(dataset.column_names):
            raise ValueError(
                f"`{name}` has the columns {sorted(dataset.column_names)}, but needs `prompt` or `messages`. Rename "
                "one with `dataset.rename_column`."
            )
        if shows_images(dataset):
            raise ValueError(
                f"`{name}` has images, but policies learn from prompts of text. Leave out the column and the places "
                "of the images; such a policy decodes prompts with images, too."
            )
        prompts = cls({}, set())
        column = "prompt" if "prompt" in dataset.column_names else "messages"
        for number, row in enumerate(dataset):
            try:
                tokens, question = _tokenized_prompt(row[column], column, tokenizer)
            except ValueError as error:
                raise ValueError(f"Row {number} of `{name}` {error}") from None
            prompts.tokens[name_of(tokens)] = tokens
            prompts.first_questions.add(question)
        return prompts


def _tokenized_prompt(value: Any, column: str, tokenizer: Any) -> tuple[Tensor, str]:
    """Return the token ids `[s]` and first user turn of a prompt `value`: a string or a list of messages."""
    if isinstance(value, str) and column == "prompt" and value.strip():
        return tensor(tokenizer(value)["input_ids"]), value
    messages = as_messages(value, None)
    questions = [index for index, message in enumerate(messages) if message["role"] == "user"]
    if not questions:
        raise ValueError("has no turn of the user, so there is nothing to answer. Leave it out.")
    return to_tokens(messages[: questions[-1] + 1], tokenizer), messages[questions[0]]["content"]


def name_of(tokens: Tensor) -> str:
    """Hash token ids `[s]` to a name of 16 hexadecimal digits."""
    return hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:16]


def digest(value: Any) -> str:
    """Hash JSON values by SHA-256."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


Recorded = TypeVar("Recorded", RankedText, RecordedText)


@dataclass
class AnswerRecorder(Generic[Recorded]):
    """Lets an attached target answer prompts, and stores each answer with the head's drafts in a file in `folder`."""

    target: Any
    head: DraftHead | BlockHead
    recording: type[Recorded]  # class of the recordings
    depths: dict[int, int]  # see `record_pools`
    folder: Path
    generation: dict[str, Any]  # arguments of `generate` as JSON values, with `max_new_tokens`
    block_nodes: int = MOST_NODES  # see `record_pools`

    def record(self, prompts: Sequence[Tensor], what: str = "prompts") -> list[Recorded]:
        """Record missing answers to prompts `[s]`, split among processes; return the answers of two tokens or more."""
        from accelerate import PartialState  # needs the extra `train`

        self.folder.mkdir(parents=True, exist_ok=True)
        state = PartialState()
        share = prompts[state.process_index :: state.num_processes]
        missing = [prompt for prompt in share if not self._file(prompt).is_file()]
        for prompt in tqdm(missing, desc=f"Recording answers to {what}", disable=not missing):
            text = self._answer(prompt)
            if text is not None:
                unfinished = self._file(prompt).with_suffix(f".{os.getpid()}")
                with written(unfinished.parent):
                    text.save(unfinished)
                    unfinished.replace(self._file(prompt))
        state.wait_for_everyone()
        texts = [self.recording.load(file) for file in map(self._file, prompts) if file.is_file()]
        if not texts:
            raise ValueError(
                f"None of {len(prompts)} prompts has an answer of at least two tokens. Pass other prompts, or raise "
                "`max_completion_length`."
            )
        return texts

    def _file(self, prompt: Tensor) -> Path:
        return self.folder / f"{name_of(prompt)}-{self._made_with}.safetensors"

    @cached_property
    def _made_with(self) -> str:
        """Hash of everything that affects a recording, such as the target's weights."""
        recording: Any = self.recording
        answered = [parameter_fingerprint(self.target), str(self.target.dtype), self.generation]
        kept = [self.head.fingerprint(), recording.__name__, recording.FORMAT, sorted(self.depths.items())]
        kept += [self.block_nodes] * (self.block_nodes != MOST_NODES)
        return digest(answered + kept)[:8]

    def _answer(self, prompt: Tensor) -> Recorded | None:
        torch.manual_seed(int(name_of(prompt), 16) % 2**31)  # so that answers do not depend on earlier answers
        inputs = prompt[None].to(self.target.device)
        mask = torch.ones_like(inputs)
        text = self.target.generate(
            inputs, attention_mask=mask, assistant_model=self.head, policy="auto", **self.generation
        )[0]
        answered = len(text) - len(prompt)
        if answered < 2:
            return None
        room = self.generation["max_new_tokens"] - answered
        options: dict[str, Any] = {"depths": self.depths, "spare_room": room, "block_nodes": self.block_nodes}
        pools = record_pools(self.target, self.head, text, len(prompt), **options)
        return cast(Recorded, pools if self.recording is RecordedText else RankedText.from_recording(pools))


_USUAL_CONTEXT = 256  # Assumed number of positions while decoding, if there are no prompts.


class PolicyData:
    """Holds each dataset's prompts; records their answers and measures the costs of steps when they are needed."""

    def __init__(self, pair: Pair, args: PolicyTrainingConfig, **datasets: Any) -> None:
        self.pair, self.prompts = pair, dict[str, PolicyPrompts]()
        self._args = args
        self._folder = Path(str(args.output_dir))
        self._generation = {"max_new_tokens": args.max_completion_length, **sampling(args.temperature)}
        self._replays: dict[str, ReplayRollouts] = {}
        for name, dataset in datasets.items():
            if dataset is not None:
                self.add(name, dataset)

    def add(self, name: str, dataset: Any) -> None:
        prompts = PolicyPrompts.of(dataset, name, self.pair.tokenizer)
        answer, context = self._args.max_completion_length, context_of(self.pair.target)
        if prompts.longest + answer > context:
            raise ValueError(
                f"The longest prompt of `{name}` has {prompts.longest} tokens and its answer up to {answer}, but the "
                f"target reads at most {context} tokens. Leave longer prompts out, or lower `max_completion_length`."
            )
        self.prompts[name] = prompts
        self._replays.pop(name, None)

    def check_has(self, name: str, use: str) -> None:
        """Raise `ValueError` if there is no dataset `name`; `use` says in the message what needs it."""
        if name not in self.prompts:
            raise ValueError(f"`{name}` is missing, but {use} needs prompts. Pass a dataset of them.")

    @cached_property
    def costs(self) -> CostTable:
        """Seconds of steps on this machine, from `OUTPUT_DIR/costs.json`; if that is missing, they are measured."""
        file = self._folder / "costs.json"
        with self._args.main_process_first(desc="measuring what steps cost"):
            if not file.is_file():
                calibrate(self.pair.target, self.pair.head).save(file)
        table = CostTable.load(file)
        table.check_here(identity_of(self.pair.target, self.pair.head))
        return table if self._args.reward_includes_drafting else replace(table, draft={}, draft_start={})

    @property
    def usual_context(self) -> int:
        """A typical number of positions while decoding: the median prompt plus half of the longest answer."""
        lengths = sorted(len(tokens) for prompts in self.prompts.values() for tokens in prompts.tokens.values())
        return lengths[len(lengths) // 2] + self._args.max_completion_length // 2 if lengths else _USUAL_CONTEXT

    @property
    def training(self) -> dict[str, Any]:
        """The training's number of texts, dtype and device, by name, for `metrics.json`."""
        target = self.pair.target
        where = {"dtype": str(target.dtype).removeprefix("torch."), "device": device_name(target.device)}
        return {"texts": len(self.prompts["train_dataset"].tokens), **where}

    def first_questions(self, *names: str) -> set[str]:
        """Return the first user turns in the datasets `names`; missing datasets are skipped."""
        return set().union(*(self.prompts[name].first_questions for name in names if name in self.prompts))

    def learned(self, name: str) -> int:
        """Return how many prompts of the dataset `name` are also in `train_dataset`."""
        learned = self.prompts.get("train_dataset")
        return 0 if learned is None else len(self.prompts[name].tokens.keys() & learned.tokens.keys())

    def replays(self, name: str, grid: ActionGrid) -> ReplayRollouts:
        """Make rollouts with a step's tokens and seconds, for each shape of `grid` at each position of the answers."""
        if name not in self._replays:
            most = max(shape.total_tokens - 1 for shape in grid.shapes)
            texts = self.record(name, RankedText, depths_of(grid), max(most, MOST_NODES))
            self._replays[name] = ReplayRollouts(OutcomeTable([text.outcomes(grid, self.costs) for text in texts]))
        return self._replays[name]

    def record(
        self, name: str, recording: type[Recorded], depths: dict[int, int], block_nodes: int = MOST_NODES
    ) -> list[Recorded]:
        settings = depths, self._folder / "replay", self._generation, block_nodes
        recorder = AnswerRecorder(self.pair.target, self.pair.head, recording, *settings)
        return recorder.record(list(self.prompts[name].tokens.values()), name)

    def live(self) -> LiveRollouts:
        prompts = list(self.prompts["train_dataset"].tokens.values())
        options = self._generation | {"includes_drafting": self._args.reward_includes_drafting}
        return LiveRollouts(self.pair.target, self.pair.head, prompts, **options)

    def facts(self, grid: ActionGrid) -> dict[str, str]:
        """Return a hash of each input of training over `grid`, by name; a run resumes only with the same hashes."""
        longest = max(prompts.longest for prompts in self.prompts.values())
        seconds = [[self.costs.step_seconds(shape, context) for shape in grid.shapes] for context in (0, longest)]
        return {
            "target": parameter_fingerprint(self.pair.target),
            "head": self.pair.head.fingerprint(),
            "prompts": digest([list(prompts.tokens) for prompts in self.prompts.values()]),
            "shapes": digest(grid.to_list()),
            "costs": digest(seconds),
        }
