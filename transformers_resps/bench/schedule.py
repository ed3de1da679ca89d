"""Answers every conversation with every method, in turn."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .journal import Journal
from .methods import Method
from .prompts import Dialogue, Prompt
from .runs import Bench, Run
from .timing import PLAIN, Cell


class Schedule:
    """Says who answers what, in which order.

    Every turn of a conversation follows the target's own answers to the turns before it, as EAGLE's evaluation plays
    MT-Bench: those of plain decoding at the same temperature and seed, so that all methods answer the same prompt. A
    conversation ends early where the next turn would not fit into the target's context.

    Args:
        bench: answers.
        dialogues: to be answered.
        methods: plain decoding among them.
        temperatures: at which each is answered.
        repeats: of everything.
        tokenizer: of the target.

    Attributes:
        cut: names of conversations that ended early.

    Raises:
        ValueError: a first turn is longer than the target's context allows.
    """

    def __init__(
        self,
        bench: Bench,
        dialogues: Sequence[Dialogue],
        methods: Sequence[Method],
        temperatures: Sequence[float],
        repeats: int,
        tokenizer: Any,
    ) -> None:
        self.bench, self.dialogues, self.methods, self.tokenizer = bench, dialogues, methods, tokenizer
        self.temperatures, self.repeats = temperatures, repeats
        self.cut: set[str] = set()
        self._planned = sum(len(dialogue.turns) for dialogue in dialogues) * len(temperatures) * repeats
        self._max_length = bench.model.config.get_text_config().max_position_embeddings - bench.max_new_tokens
        self._check_room()

    @property
    def total(self) -> int:
        """Number of runs, as far as is known."""
        return self._planned * len(self.methods)

    def _check_room(self) -> None:
        for dialogue in self.dialogues:
            length = len(dialogue.prompt(self.tokenizer).input_ids)
            if length > self._max_length:
                most = self.bench.max_new_tokens
                raise ValueError(
                    f"{dialogue.name} has {length} tokens and its answer up to {most}, but the target holds "
                    f"{self._max_length + most}. Lower --max-new-tokens, or leave that prompt out."
                )

    def run(self, journal: Journal, done: Callable[[], Any] = lambda: None) -> Iterator[tuple[Prompt, list[Run]]]:
        """Yield each prompt and its runs, in the order of `methods`; what `journal` has is not made again.

        Each repeat and conversation begins with the next method, so that none always comes first.

        Args:
            journal: keeps the runs.
            done: called after each run, to move a progress bar.
        """
        for repeat in range(self.repeats):
            for number, dialogue in enumerate(self.dialogues):
                first = (number + repeat) % len(self.methods)
                order = [*self.methods[first:], *self.methods[:first]]
                for temperature in self.temperatures:
                    yield from self._converse(journal, dialogue, temperature, repeat, order, done)

    def _converse(
        self,
        journal: Journal,
        dialogue: Dialogue,
        temperature: float,
        repeat: int,
        order: Sequence[Method],
        done: Callable[[], Any],
    ) -> Iterator[tuple[Prompt, list[Run]]]:
        answers: list[str] = []
        for turn in range(1, len(dialogue.turns) + 1):
            prompt = dialogue.prompt(self.tokenizer, answers)
            if len(prompt.input_ids) > self._max_length:
                self.cut.add(dialogue.name)
                self._planned -= len(dialogue.turns) - turn + 1
                return
            cell = Cell(dialogue.name, turn, temperature, repeat)
            runs: dict[str, Run] = {}
            for method in order:
                run = journal.find(cell, method.name)
                if run is None:
                    run = self.bench.decode(prompt, method, repeat, temperature)
                    journal.keep(run)
                runs[method.name] = run
                done()
            answers.append(self.tokenizer.decode(runs[PLAIN].token_ids, skip_special_tokens=True))
            yield prompt, [runs[method.name] for method in self.methods]
