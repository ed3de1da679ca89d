"""Answer every conversation with every method, in turn."""

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ..generation.defaults import SpeculationDefaults
from ..generation.sequences import end_ids
from ..target.features import decoder_layers
from .methods import Method
from .prompts import Dialogue, Prompt, to_tokens
from .steps import Step, steps_of
from .timing import PLAIN, AnswerTiming, token_count


_WARM_UP_TOKENS = 12


@dataclass(frozen=True, slots=True)
class Run:
    """How long an answer took, the text `[t]` it wrote, and the steps it took where they are told."""

    timing: AnswerTiming
    token_ids: Tensor
    steps: list[Step] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Cell:
    """What is measured at one place: all methods, on one turn of one conversation."""

    dialogue: Dialogue
    turn: int
    temperature: float
    repeat: int


class Memory(Protocol):
    """Stores runs, so that none is made twice."""

    def find(self, cell: Cell, method: str) -> Run | None:
        """The run of `method` there, if it was made before."""
        ...

    def keep(self, run: Run) -> None:
        """Before anything else is done."""
        ...


class Bench:
    """One target that answers with up to `max_new_tokens`, timed by `clock`."""

    def __init__(self, model: Any, max_new_tokens: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.model, self.max_new_tokens, self._clock = model, max_new_tokens, clock
        self._end_ids = end_ids(model)
        self._forwards: list[float] = []  # when each began
        # Not of the model: another library may run its layers without it.
        decoder_layers(model)[0].register_forward_pre_hook(self._note_forward)

    def warm_up(self, prompt: Prompt, methods: Sequence[Method]) -> None:
        """A few tokens with every method."""
        few = min(_WARM_UP_TOKENS, self.max_new_tokens)
        for method in methods:
            self.decode(prompt, method, max_new_tokens=few)

    def decode(
        self,
        prompt: Prompt,
        method: Method,
        repeat: int = 0,
        temperature: float = 0.0,
        *,
        max_new_tokens: int | None = None,
    ) -> Run:
        """One answer, with the repeat as its seed."""
        most = max_new_tokens or self.max_new_tokens
        input_ids = prompt.input_ids[None].to(self.model.device)
        write = self._prepared(method, input_ids, most, temperature)
        torch.manual_seed(repeat)
        self._forwards = []
        started = self._clock()
        answer, report = write()
        seconds = self._clock() - started
        count = token_count(answer, self._end_ids, most)
        prefill = self._forwards[1] - started if len(self._forwards) > 1 else seconds
        measured = AnswerTiming(
            method.name, prompt.name, repeat, count, len(self._forwards), seconds, prompt.turn, temperature, prefill
        )
        return Run(measured, torch.tensor(answer[:count]), [] if report is None else steps_of(report))

    def _prepared(
        self, method: Method, input_ids: Tensor, most: int, temperature: float
    ) -> Callable[[], tuple[list[int], Any]]:
        """All that is timed: the answer, read from the device, and its report where there is one."""
        if method.answer is not None:
            answer, ends = method.answer, sorted(self._end_ids)
            return lambda: (answer(input_ids, most, temperature, ends).tolist(), None)
        keywords = {**method.keywords, **sampling(temperature)}
        if "policy" in keywords:  # each answer meets it as it was loaded; "auto" learns on
            keywords["policy"] = copy.deepcopy(keywords["policy"])

        def generated() -> tuple[list[int], Any]:
            with SpeculationDefaults.suspended():  # plain decoding is plain, whatever the model was attached with
                output = self.model.generate(
                    input_ids,
                    attention_mask=torch.ones_like(input_ids),
                    max_new_tokens=most,
                    return_dict_in_generate=True,
                    **keywords,
                )
            return output.sequences[0, input_ids.shape[1] :].tolist(), getattr(output, "speculation", None)

        return generated

    def _note_forward(self, *_: Any) -> None:
        self._forwards.append(self._clock())


def sampling(temperature: float) -> dict[str, Any]:
    """Keywords of `generate`: greedy at 0, otherwise the target's whole distribution at that temperature."""
    if temperature == 0:
        return {"do_sample": False, "repetition_penalty": 1.0}
    return {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}


class Schedule:
    """Who answers what, in which order.

    Every turn of a conversation follows the target's own answers to the turns before it, as EAGLE's evaluation plays
    MT-Bench: those of plain decoding at the same temperature and seed, so that all methods answer the same prompt. A
    conversation ends early where the next turn would not fit into the target's context.

    Args:
        dialogues: to be answered.
        methods: plain decoding among them.
        temperatures: at which each is answered.
        repeats: of everything.
        tokenizer: of the target.
    """

    def __init__(
        self,
        dialogues: Sequence[Dialogue],
        methods: Sequence[Method],
        temperatures: Sequence[float],
        repeats: int,
        tokenizer: Any,
    ) -> None:
        self.dialogues, self.methods, self.tokenizer = list(dialogues), list(methods), tokenizer
        self.temperatures, self.repeats = list(temperatures), repeats
        self.cut: set[str] = set()
        self._planned = sum(len(dialogue.turns) for dialogue in dialogues) * len(temperatures) * repeats

    @property
    def total(self) -> int:
        """Runs, as far as is known."""
        return self._planned * len(self.methods)

    def first_prompt(self, dialogue: Dialogue) -> Prompt:
        """Of the first turn."""
        return Prompt(dialogue.name, to_tokens(dialogue.asked([]), self.tokenizer))

    def check_room(self, bench: Bench) -> None:
        """Refuse before any work what cannot be answered at all.

        Raises:
            ValueError: a first turn is longer than the target's context allows.
        """
        for dialogue in self.dialogues:
            length = len(self.first_prompt(dialogue).input_ids)
            if length + bench.max_new_tokens > self._most_positions(bench):
                raise ValueError(
                    f"{dialogue.name} has {length} tokens and its answer up to {bench.max_new_tokens}, but the target "
                    f"holds {self._most_positions(bench)}. Lower --max-new-tokens, or leave that prompt out."
                )

    def run(self, bench: Bench, memory: Memory) -> Iterator[tuple[Prompt, list[Run]]]:
        """Yield each prompt and its runs, in the order of `methods`; what `memory` has is not made again.

        Each repeat and conversation begins with the next method, so that none always comes first.
        """
        for repeat in range(self.repeats):
            for number, dialogue in enumerate(self.dialogues):
                first = (number + repeat) % len(self.methods)
                for temperature in self.temperatures:
                    yield from self._converse(bench, memory, Cell(dialogue, 1, temperature, repeat), first)

    def _converse(self, bench: Bench, memory: Memory, opening: Cell, first: int) -> Iterator[tuple[Prompt, list[Run]]]:
        answers: list[str] = []
        dialogue, temperature, repeat = opening.dialogue, opening.temperature, opening.repeat
        for turn in range(1, len(dialogue.turns) + 1):
            prompt = Prompt(dialogue.name, to_tokens(dialogue.asked(answers), self.tokenizer), turn)
            if len(prompt.input_ids) + bench.max_new_tokens > self._most_positions(bench):
                self.cut.add(dialogue.name)
                self._planned -= len(dialogue.turns) - turn + 1
                return
            cell = Cell(dialogue, turn, temperature, repeat)
            runs: dict[str, Run] = {}
            for method in [*self.methods[first:], *self.methods[:first]]:
                run = memory.find(cell, method.name)
                if run is None:
                    run = bench.decode(prompt, method, repeat, temperature)
                    memory.keep(run)
                runs[method.name] = run
            answers.append(self.tokenizer.decode(runs[PLAIN].token_ids, skip_special_tokens=True))
            yield prompt, [runs[method.name] for method in self.methods]

    @staticmethod
    def _most_positions(bench: Bench) -> int:
        return int(bench.model.config.get_text_config().max_position_embeddings)
