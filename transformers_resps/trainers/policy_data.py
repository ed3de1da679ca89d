"""The prompts that a policy learns from: a dataset in TRL's columns, in tokens.

Answers of the target to prompts, recorded with what its head would have drafted at every position.

What steps cost on the machine that a policy is trained on: measured once for each run.

What a policy is trained and judged on: prompts, the target's answers to them, and what steps cost.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor, tensor
from transformers import PreTrainedModel
from transformers.utils.logging import tqdm

from ..calibration import calibrate, identity_of
from ..data import to_tokens
from ..data.conversations import as_messages
from ..generation.output import sampling
from ..heads import DraftHead, parameter_fingerprint
from ..policies import ActionGrid, CostTable
from ..replay import OutcomeTable, RankedText, RecordedText, record_pools, record_ranks
from ..replay.ranked_text import FORMAT
from .base import check_dataset, written
from .loading import Pair
from .policy_config import PolicyTrainingConfig
from .rollouts import LiveRollouts, ReplayRollouts


@dataclass(frozen=True, slots=True)
class PolicyPrompts:
    """Distinct prompts, in the order of their dataset.

    Attributes:
        tokens: `[s]` each.
        first_questions: what the first user turns say, by which a benchmark recognises them.
    """

    tokens: list[Tensor]
    first_questions: set[str]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def names(self) -> list[str]:
        """A hash of each prompt."""
        return list(map(name_of, self.tokens))

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(map(len, self.tokens))

    @classmethod
    def of(cls, dataset: Any, name: str, tokenizer: Any) -> "PolicyPrompts":
        """Read the prompts of a dataset.

        Args:
            dataset: a `datasets.Dataset` with a column `prompt` (a string, which is taken as it is, or messages) or
                `messages`. Of messages, all turns up to the last question are the prompt, in the chat template.
            name: of the argument, for errors.
            tokenizer: of the target.

        Raises:
            ValueError: it is something else, is empty, or a row holds something else.
        """
        _check(dataset, name)
        found: dict[str, Tensor] = {}
        questions = set()
        column = "prompt" if "prompt" in dataset.column_names else "messages"
        for number, row in enumerate(dataset):
            try:
                tokens, question = _read(row[column], column, tokenizer)
            except ValueError as error:
                raise ValueError(f"Row {number} of `{name}` {error}") from None
            found[name_of(tokens)] = tokens
            questions.add(question)
        return cls(list(found.values()), questions)

    def check_context(self, target: PreTrainedModel, max_completion_length: int, name: str) -> None:
        """Check that the longest prompt leaves room for its answer.

        Raises:
            ValueError: it does not.
        """
        context = getattr(target.config.get_text_config(), "max_position_embeddings", None)
        if context is not None and self.longest + max_completion_length > context:
            raise ValueError(
                f"The longest prompt of `{name}` has {self.longest} tokens and its answer up to "
                f"{max_completion_length}, but the target reads at most {context} tokens. Leave longer prompts out, "
                "or lower `max_completion_length`."
            )


def name_of(tokens: Tensor) -> str:
    """A hash of token ids `[s]`."""
    return hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:16]


def _check(dataset: Any, name: str) -> None:
    """Check that a dataset has rows, and prompts in them.

    Raises:
        ValueError: it has not.
    """
    check_dataset(dataset, name, may_stream=False)
    if not len(dataset):
        raise ValueError(f"`{name}` is empty. Pass a split that has rows, or another dataset.")
    if not {"prompt", "messages"} & set(dataset.column_names):
        raise ValueError(
            f"`{name}` has the columns {sorted(dataset.column_names)}, but needs `prompt` or `messages`. Rename one "
            "with `dataset.rename_column`."
        )


def _read(value: Any, column: str, tokenizer: Any) -> tuple[Tensor, str]:
    """A prompt in tokens `[s]`, and its first question.

    Raises:
        ValueError: says what it is instead.
    """
    if isinstance(value, str) and column == "prompt" and value.strip():
        return tensor(tokenizer(value)["input_ids"]), value
    messages = as_messages(value, None)
    asked = [place for place, message in enumerate(messages) if message["role"] == "user"]
    if not asked:
        raise ValueError("has no turn of the user, so there is nothing to answer. Leave it out.")
    return to_tokens(messages[: asked[-1] + 1], tokenizer), messages[asked[0]]["content"]


class _Recording(Protocol):
    def save(self, file: str | Path) -> None: ...

    @classmethod
    def load(cls, file: str | Path) -> Self: ...


Recorded = TypeVar("Recorded", bound=_Recording)


@dataclass(frozen=True, slots=True)
class Form(Generic[Recorded]):
    """What is kept of an answer.

    Attributes:
        kind: class of the recordings.
        record: makes one, of a target, a head, `[s]` prompt and answer, the prompt's length and `spare_room`.
        facts: JSON values that change with everything that changes a recording.
    """

    kind: type[Recorded]
    record: Callable[..., Recorded]
    facts: list[Any]


def outcomes_for(grid: ActionGrid) -> Form[RankedText]:
    """Keep what gives the outcome of every shape of `grid`."""
    return Form(RankedText, partial(record_ranks, grid=grid), [FORMAT, grid.to_list()])


def pools_of(depths: dict[int, int]) -> Form[RecordedText]:
    """Keep the pools themselves: for each `top_k` of `depths`, of so many levels."""
    return Form(RecordedText, partial(record_pools, depths=depths), ["pools", sorted(depths.items())])


@dataclass
class Recorder(Generic[Recorded]):
    """Lets the target answer prompts, and records the answers in a folder; those that are there are used again.

    Args:
        target: attached.
        head: drafts.
        form: what is kept.
        folder: one file for each answer.
        generation: passed to `generate`, with `max_new_tokens`; JSON values.
    """

    target: Any
    head: DraftHead
    form: Form[Recorded]
    folder: Path
    generation: dict[str, Any]

    def record(self, prompts: Sequence[Tensor], what: str = "prompts") -> list[Recorded]:
        """Recordings of all prompts with an answer of at least two tokens, in their order.

        Each of several processes records its share, then reads the recordings of all.

        Args:
            prompts: `[s]` each.
            what: their name in the progress bar.

        Raises:
            ValueError: no prompt has such an answer.
        """
        from accelerate import PartialState  # of the extra `train`; heads are checked without it

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
        found = [self.form.kind.load(file) for file in map(self._file, prompts) if file.is_file()]
        if not found:
            raise ValueError(
                f"None of {len(prompts)} prompts has an answer of at least two tokens. Pass other prompts, or raise "
                "`max_completion_length`."
            )
        return found

    def _file(self, prompt: Tensor) -> Path:
        return self.folder / f"{name_of(prompt)}-{self._made_with}.safetensors"

    @cached_property
    def _made_with(self) -> str:
        """Changes with everything that changes a recording: the target's weights, not its path."""
        answered = [parameter_fingerprint(self.target), str(self.target.dtype), self.generation]
        return digest([*answered, self.head.fingerprint(), *self.form.facts])[:8]

    def _answer(self, prompt: Tensor) -> Recorded | None:
        torch.manual_seed(int(name_of(prompt), 16) % 2**31)  # an answer does not depend on earlier ones
        inputs = prompt[None].to(self.target.device)
        mask = torch.ones_like(inputs)
        text = self.target.generate(
            inputs, attention_mask=mask, assistant_model=self.head, policy="auto", **self.generation
        )[0]
        answered = len(text) - len(prompt)
        if answered < 2:
            return None
        room = self.generation["max_new_tokens"] - answered
        return self.form.record(self.target, self.head, text, len(prompt), spare_room=room)


def digest(value: Any) -> str:
    """SHA-256 of JSON values."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def measured_costs(pair: Pair, args: PolicyTrainingConfig) -> CostTable:
    """What steps cost on this machine, from `OUTPUT_DIR/costs.json`: a resumed run keeps those it started with.

    One process measures while the others wait: together they would slow each other and learn different costs.

    Raises:
        ValueError: the run started on another machine, or with another target or head.
    """
    file = Path(str(args.output_dir)) / "costs.json"
    with args.main_process_first(desc="measuring what steps cost"):
        if not file.is_file():
            calibrate(pair.target, pair.head).save(file)
    table = CostTable.load(file)
    table.check_here(identity_of(pair.target, pair.head))
    return table if args.reward_includes_drafting else replace(table, draft={})


_USUAL_CONTEXT = 256  # positions, where there are no prompts yet


class PolicyData:
    """The prompts of a trainer by the names of its arguments; answers and costs are made when they are first needed.

    Args:
        pair: answers, and is measured.
        args: where and how.

    Attributes:
        prompts: name of a dataset -> its prompts.
    """

    def __init__(self, pair: Pair, args: PolicyTrainingConfig) -> None:
        self.pair, self.prompts = pair, dict[str, PolicyPrompts]()
        self._args = args
        self._replays: dict[str, ReplayRollouts] = {}
        self._texts: dict[str, list[RecordedText]] = {}

    def add(self, name: str, dataset: Any) -> None:
        """Read a dataset; one of the same name is replaced.

        Raises:
            ValueError: it is no dataset of prompts, or one is too long for the target.
        """
        prompts = PolicyPrompts.of(dataset, name, self.pair.tokenizer)
        prompts.check_context(self.pair.target, self._args.max_completion_length, name)
        self.prompts[name] = prompts
        self._replays.pop(name, None)
        self._texts.pop(name, None)

    @cached_property
    def costs(self) -> CostTable:
        """What steps cost on this machine."""
        return measured_costs(self.pair, self._args)

    @property
    def usual_context(self) -> int:
        """Positions in the middle of the answer to a prompt of middle length."""
        lengths = sorted(len(tokens) for prompts in self.prompts.values() for tokens in prompts.tokens)
        return lengths[len(lengths) // 2] + self._args.max_completion_length // 2 if lengths else _USUAL_CONTEXT

    @property
    def first_questions(self) -> set[str]:
        """Of all prompts that a policy is trained on or chosen by."""
        return {one for name in ("train_dataset", "eval_dataset") for one in self._questions_of(name)}

    def _questions_of(self, name: str) -> set[str]:
        return self.prompts[name].first_questions if name in self.prompts else set()

    def learned(self, name: str) -> int:
        """How many prompts of a dataset are in `train_dataset`, too."""
        learned = self.prompts.get("train_dataset")
        return 0 if learned is None else len({*self.prompts[name].names} & {*learned.names})

    def replays(self, name: str, grid: ActionGrid) -> ReplayRollouts:
        """The outcome of every shape of `grid` at every position of the answers."""
        if name not in self._replays:
            texts: list[RankedText] = self._record(name, outcomes_for(grid))
            self._replays[name] = ReplayRollouts(OutcomeTable([text.outcomes(grid, self.costs) for text in texts]))
        return self._replays[name]

    def texts(self, name: str, depths: dict[int, int]) -> list[RecordedText]:
        """The answers with the pools of `depths`."""
        if name not in self._texts:
            self._texts[name] = self._record(name, pools_of(depths))
        return self._texts[name]

    def live(self) -> LiveRollouts:
        """Decoding of the training prompts."""
        prompts, includes = self.prompts["train_dataset"], self._args.reward_includes_drafting
        return LiveRollouts(
            self.pair.target, self.pair.head, prompts.tokens, includes_drafting=includes, **self._generation
        )

    def facts(self, grid: ActionGrid) -> dict[str, str]:
        """Hashes of what a policy over `grid` learns from: a checkpoint is resumed only with the same."""
        longest = max(prompts.longest for prompts in self.prompts.values())
        seconds = [[self.costs.step_seconds(shape, context) for shape in grid.shapes] for context in (0, longest)]
        return {
            "target": parameter_fingerprint(self.pair.target),
            "head": self.pair.head.fingerprint(),
            "prompts": digest([prompts.names for prompts in self.prompts.values()]),
            "shapes": digest(grid.to_list()),
            "costs": digest(seconds),
        }

    @property
    def _generation(self) -> dict[str, Any]:
        return {"max_new_tokens": self._args.max_completion_length, **sampling(self._args.temperature)}

    def _record(self, name: str, form: Form[Recorded]) -> list[Recorded]:
        folder = Path(str(self._args.output_dir)) / "replay"
        recorder = Recorder(self.pair.target, self.pair.head, form, folder, self._generation)
        return recorder.record(self.prompts[name].tokens, name)
