"""Answer conversations with every method, and compare each text with the text of plain decoding."""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import tqdm

from ..data import Conversation, load_conversations, prompt_fingerprint, to_tokens
from ..testing import explain_divergence
from .methods import Bench, Method, Prompt
from .results import PLAIN, AnswerTiming, Run


_MAX_ROWS = 20_000  # maximum number of rows to read of one dataset
_WARM_UP_TOKENS = 12


@dataclass(frozen=True, slots=True)
class Dialogue:
    """The user's turns of one conversation, to which the target writes its own answers in place of the dataset's."""

    name: str  # `dataset/row`
    opening: Conversation  # messages before the first user turn, such as a system message
    turns: tuple[str, ...]

    @classmethod
    def of(cls, name: str, messages: Conversation) -> "Dialogue":
        """Make a dialogue of the user turns in `messages`; raise `ValueError` if there are none."""
        users = [index for index, message in enumerate(messages) if message["role"] == "user"]
        if not users:
            raise ValueError(f"{name} has no user turn. Remove that row, or give it `turns`, `messages` or `prompt`.")
        return cls(name, messages[: users[0]], tuple(messages[index]["content"] for index in users))

    def prompt(self, tokenizer: Any, answers: Sequence[str] = ()) -> Prompt:
        """Return the tokens of the conversation up to the next user turn, given `answers` to the turns before it."""
        messages = [*self.opening]
        for turn, answer in zip(self.turns, answers, strict=False):
            messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": answer}]
        messages.append({"role": "user", "content": self.turns[len(answers)]})
        return Prompt(self.name, to_tokens(messages, tokenizer), len(answers) + 1)

    @property
    def fingerprint(self) -> str:
        return prompt_fingerprint(self.turns[0])


def read_dialogues(source: str, split: str = "test") -> list[Dialogue]:
    """Read the conversations of a file or Hub dataset; raise `ValueError` if there are none."""
    name = Path(source).stem
    rows = islice(load_conversations(source, split), _MAX_ROWS)
    dialogues = [Dialogue.of(f"{name}/{number}", messages) for number, messages in enumerate(rows)]
    if not dialogues:
        raise ValueError(f"{source} has no rows. Pass a dataset with at least one.")
    return dialogues


def spread(dialogues: Sequence[Dialogue], limit: int) -> list[Dialogue]:
    """Choose up to `limit` dialogues, at even distances in the given order."""
    count = min(limit, len(dialogues))
    return [dialogues[index * len(dialogues) // count] for index in range(count)]


def check_apart(evaluated: Sequence[Dialogue], others: set[str], what: str) -> None:
    """Raise `ValueError` if a prompt's fingerprint is in `others`; `what` describes `others` in the message."""
    shared = [dialogue.name for dialogue in evaluated if dialogue.fingerprint in others]
    if shared:
        raise ValueError(
            f"{len(shared)} of {len(evaluated)} prompts to evaluate are among {what}, for example {shared[0]}. Pass a "
            "dataset with other prompts."
        )


class Judge:
    """Compares answers with those of plain decoding, and lists in `unexplained` the differences that must not occur.

    In the invariant mode no answer may differ. Otherwise greedy answers may differ by rounding, but sampled answers
    of a `seed_exact` method must not differ in float32 or float64. Differences of sampled answers in half precision
    are not listed, because a near-tie may cause them, and this cannot be checked afterwards.
    """

    def __init__(self, target: Any, methods: Sequence[Method]) -> None:
        self._target, self._methods = target, {method.name: method for method in methods}
        # Method -> how many answers of the first repeat equal plain decoding; below: plain decoding in the same mode
        self.same_text: Counter[str] = Counter({method.name: 0 for method in methods})
        in_mode = [method.name for method in methods if method.reference not in (PLAIN, method.name)]
        self.same_text_invariant: Counter[str] = Counter(dict.fromkeys(in_mode, 0))
        self.unexplained: list[str] = []

    def add(self, prompt: Prompt, runs: Sequence[Run]) -> None:
        by_name = {run.timing.method: run for run in runs}
        for name, run in by_name.items():
            timing, reference = run.timing, by_name[self._methods[name].reference]
            same = torch.equal(run.token_ids, reference.token_ids)
            if timing.repeat == 0:
                self.same_text[name] += torch.equal(run.token_ids, by_name[PLAIN].token_ids)
                if name in self.same_text_invariant:
                    self.same_text_invariant[name] += same
            difference = None if same else self._difference(prompt, reference, run)
            if difference is not None:
                cell = f"turn {timing.turn}, temperature {timing.temperature:g}, repeat {timing.repeat}"
                self.unexplained.append(f"{name}, {timing.prompt}, {cell}, {difference}")

    def _difference(self, prompt: Prompt, reference: Run, run: Run) -> str | None:
        name, ids = run.timing.method, (reference.token_ids, run.token_ids)
        is_invariant = name in self.same_text_invariant
        if run.timing.temperature == 0:
            divergence = explain_divergence(self._target, prompt.input_ids, *ids, invariant=is_invariant)
            return None if divergence is None or divergence.explained else str(divergence)
        exact = is_invariant or self._target.dtype in (torch.float32, torch.float64)
        if self._methods[name].seed_exact and exact:
            return "sampled another text than plain decoding with the same seed"
        return None


class Session:
    """Answers every conversation with every method, at every temperature and with every seed in `repeats`.

    All methods answer the same prompts: the answers to the earlier turns in a prompt are those of the method `base`
    at the same temperature and seed, as in EAGLE's evaluation on MT-Bench. A conversation ends early if the next turn
    would not fit into the target's context.
    """

    def __init__(
        self,
        bench: Bench,
        tokenizer: Any,
        dialogues: Sequence[Dialogue],
        methods: Sequence[Method],
        temperatures: Sequence[float] = (0.0,),
        repeats: Sequence[int] = (0,),
        base: str = PLAIN,
    ) -> None:
        twice = [name for name, count in Counter(method.name for method in methods).items() if count > 1]
        if twice:
            raise ValueError(
                f"Several methods have the name {', '.join(twice)}. Pass each policy and shape once, and give policy "
                "folders different names."
            )
        self.bench, self.dialogues, self.methods = bench, dialogues, methods
        self._tokenizer, self._temperatures, self._repeats, self._base = tokenizer, temperatures, repeats, base
        self.runs: list[Run] = []  # only turns that every method has answered
        self.cut: set[str] = set()  # names of conversations that ended early
        turns = sum(len(dialogue.turns) for dialogue in dialogues)
        self.total = turns * len(temperatures) * len(repeats) * len(methods)  # number of answers
        context: int = bench.target.config.get_text_config().max_position_embeddings
        self._max_length = context - bench.max_new_tokens
        for dialogue in dialogues:
            length = len(dialogue.prompt(tokenizer).input_ids)
            if length > self._max_length:
                raise ValueError(
                    f"{dialogue.name} has {length} tokens and its answer up to {bench.max_new_tokens}, but the target "
                    f"holds {context}. Lower --max-new-tokens, or leave that prompt out."
                )

    @property
    def timings(self) -> list[AnswerTiming]:
        return [run.timing for run in self.runs]

    def warm_up(self) -> None:
        """Decode a few tokens with every method, so that no timed answer has to compile or allocate."""
        first, few = self.dialogues[0].prompt(self._tokenizer), min(_WARM_UP_TOKENS, self.bench.max_new_tokens)
        for method in tqdm(self.methods, desc="Warming up", unit="method"):
            self.bench.decode(first, method, max_new_tokens=few)
        # "auto" learns from answer to answer, and must not start with what the warm-up taught it
        self.bench.target.speculation_state.policy_cache.clear()

    def run(self, done: Callable[[], Any] = lambda: None) -> Iterator[tuple[Prompt, list[Run]]]:
        """Yield each prompt with its timed answers, in the order of `methods`; call `done` after each answer.

        The order of methods is shuffled for each repeat and conversation, in the same way in every session, because
        a method may leave the machine faster or slower for the next method.
        """
        for repeat in self._repeats:
            for dialogue in self.dialogues:
                order = random.Random(f"{repeat} {dialogue.name}").sample(self.methods, len(self.methods))
                for temperature in self._temperatures:
                    yield from self._converse(dialogue, temperature, repeat, order, done)

    def _converse(
        self, dialogue: Dialogue, temperature: float, repeat: int, order: Sequence[Method], done: Callable[[], Any]
    ) -> Iterator[tuple[Prompt, list[Run]]]:
        answers: list[str] = []
        for turn in range(1, len(dialogue.turns) + 1):
            prompt = dialogue.prompt(self._tokenizer, answers)
            if len(prompt.input_ids) > self._max_length:
                self.cut.add(dialogue.name)
                self.total -= (len(dialogue.turns) - turn + 1) * len(self.methods)
                return
            runs: dict[str, Run] = {}
            for method in order:
                runs[method.name] = self.bench.decode(prompt, method, repeat, temperature)
                done()
            if turn < len(dialogue.turns):
                answers.append(self._tokenizer.decode(runs[self._base].token_ids, skip_special_tokens=True))
            told = [runs[method.name] for method in self.methods]
            self.runs += told
            yield prompt, told
