"""Every conversation with every method, in turn and judged, on a tiny model."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.conftest import FakeClock
from tests.tokenizers import letter_tokenizer
from tests.tools.conversations import dialogue, save_rows
from transformers_resps import DraftHead, FixedPolicy, TreeShape, attach
from transformers_resps.data import prompt_fingerprint, read_training_prompts, to_tokens, write_training_prompts
from transformers_resps.tools.methods import (
    Answer,
    Bench,
    Generate,
    Method,
    Prompt,
    draft_model,
    fixed_tree,
    invariant,
    plain,
    plain_steps,
    policies,
    prompt_lookup,
)
from transformers_resps.tools.results import AnswerTiming, Run
from transformers_resps.tools.session import Dialogue, Judge, Session, check_apart, read_dialogues, spread


SHAPE = TreeShape(4, 2, 2)
DIALOGUES = [dialogue("a/0", "defg", "hij"), dialogue("b/0", "klkl")]


class Noting(Bench):
    """Notes which methods were asked, in order."""

    asked: list[str]

    def decode(self, prompt: Prompt, method: Method, *args: Any, **settings: Any) -> Run:
        self.asked.append(method.name)
        return super().decode(prompt, method, *args, **settings)


@pytest.fixture
def bench(tiny_target: PreTrainedModel) -> Noting:
    made = Noting(attach(tiny_target), 6, FakeClock(tick=1.0))
    made.asked = []
    return made


def session(
    bench: Bench, methods: Sequence[Method], repeats: int = 1, temperatures: Sequence[float] = (0.0,)
) -> Session:
    return Session(bench, letter_tokenizer(), DIALOGUES, methods, temperatures, range(repeats))


def test_methods_are_asked_in_an_order_of_each_conversation_that_every_session_draws_alike(
    bench: Noting, tiny_head: DraftHead
) -> None:
    methods = [plain(), prompt_lookup(), fixed_tree(tiny_head, SHAPE)]
    plan = session(bench, methods, repeats=3)
    cells = list(plan.run())
    turns = [tuple(bench.asked[at : at + 3]) for at in range(0, 27, 3)]
    names = [method.name for method in methods]
    assert all(sorted(turn) == sorted(names) for turn in turns)
    assert turns[0] == turns[1]  # of one conversation
    followed = {pair for turn in turns for pair in pairwise(turn)}
    assert len({turn[0] for turn in turns}) > 1 and len(followed) > 3  # a cycle of three has three pairs
    assert [len(runs) for _, runs in cells] == [3] * 9 and plan.total == 27
    assert all([run.timing.method for run in runs] == names for _, runs in cells)
    asked, bench.asked = bench.asked, []
    list(session(bench, methods, repeats=3).run())
    assert bench.asked == asked


def test_to_make_a_session_decodes_nothing(bench: Noting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.target, "forward", lambda *_, **__: pytest.fail("a forward in the constructor"))
    made = session(bench, [plain(), prompt_lookup()])
    assert bench.asked == [] and made.total == 6
    monkeypatch.undo()
    made.warm_up()
    assert bench.asked == ["plain", "prompt lookup"] and not made.runs


@dataclass(frozen=True)
class Parrot(Method):
    """A library of its own: it repeats the last token of the prompt."""

    def prepare(
        self, target: Any, input_ids: Tensor, max_new_tokens: int, temperature: float, ends: Sequence[int]
    ) -> Callable[[], Answer]:
        return lambda: Answer(input_ids[0, -1:].tolist() * max_new_tokens, target_forwards=1)


def test_a_method_of_another_package_takes_part_and_is_judged(bench: Noting) -> None:
    methods = [plain(), Parrot("parrot", seed_exact=False)]
    judge, texts = Judge(bench.target, methods), []
    for prompt, runs in session(bench, methods).run():
        judge.add(prompt, runs)
        texts.append(runs[1].token_ids.tolist())
    assert all(len(set(text)) == 1 and len(text) == 6 for text in texts)
    assert judge.same_text == {"plain": 3, "parrot": 0} and len(judge.unexplained) == 3


def test_each_turn_follows_the_plain_answers_to_those_before_it(bench: Bench, tiny_head: DraftHead) -> None:
    (first, runs), (second, _), _ = session(bench, [plain(), fixed_tree(tiny_head, SHAPE)]).run()
    tokenizer = letter_tokenizer()
    said = tokenizer.decode(runs[0].token_ids, skip_special_tokens=True)
    assert (first.turn, second.turn) == (1, 2)
    assert tokenizer.decode(second.input_ids) == f"defg\n{said}\nhij\n".replace("\n", "a")  # "\n" is no letter


def test_a_conversation_ends_where_the_next_turn_does_not_fit(bench: Bench) -> None:
    long = dialogue("c/0", "d" * 200, "e" * 100)
    plan = Session(bench, letter_tokenizer(), [long], [plain()])
    assert [prompt.turn for prompt, _ in plan.run()] == [1]
    assert plan.cut == {"c/0"} and plan.total == 1
    with pytest.raises(ValueError, match="d/0 has 302 tokens and its answer up to 6, but the target holds 256"):
        Session(bench, letter_tokenizer(), [dialogue("d/0", "d" * 301)], [plain()])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_kind_of_method_writes_the_plain_text(
    bench: Bench, tiny_head: DraftHead, tiny_target: PreTrainedModel, temperature: float
) -> None:
    chosen = [
        plain(),
        prompt_lookup(),
        draft_model(tiny_target),
        fixed_tree(tiny_head, SHAPE),
        fixed_tree(tiny_head, TreeShape(4, 2, 2, lookup=3)),
        fixed_tree(tiny_head, TreeShape(1, 0, 1, lookup=3)),
        *policies(tiny_head, {"auto": "auto", "policy mine": FixedPolicy(SHAPE)}),
    ]
    if temperature:  # Transformers' own assistants draw other random numbers
        chosen = [method for method in chosen if method.seed_exact]
    judge = Judge(bench.target, chosen)
    for prompt, runs in session(bench, chosen, repeats=2, temperatures=[temperature]).run():
        judge.add(prompt, runs)
    assert judge.same_text == {method.name: 3 for method in chosen} and not judge.unexplained


def test_every_user_turn_follows_the_answers_that_are_given() -> None:
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "an answer of the dataset"},
        {"role": "user", "content": "two"},
    ]
    found, asked = Dialogue.of("d/0", messages), list[Any]()
    tokenizer = SimpleNamespace(chat_template="", apply_chat_template=lambda turns, **_: asked.append(turns) or [0])
    for answers in ([], ["mine"]):
        found.prompt(tokenizer, answers)
    mine = {"role": "assistant", "content": "mine"}
    assert asked == [messages[:2], [*messages[:2], mine, {"role": "user", "content": "two"}]]


def letters(text: str) -> dict[str, list[int]]:
    """A tokenizer without a chat template."""
    return {"input_ids": [ord(letter) for letter in text]}


letters.chat_template = None  # type: ignore[attr-defined]


def test_without_a_chat_template_every_message_is_a_line() -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "one"}]
    assert to_tokens(messages, letters).tolist() == [ord(letter) for letter in "be brief\none\n"]


def test_prompts_are_spread_evenly_over_the_file() -> None:
    rows = [dialogue(f"d/{number}", "x") for number in range(10)]
    assert [one.name for one in spread(rows, 3)] == ["d/0", "d/3", "d/6"]
    assert len(spread(rows, 99)) == 10


@pytest.mark.parametrize(
    "row", [{"turns": ["a", "b"]}, {"prompt": "a"}, {"messages": [{"role": "user", "content": "a"}]}]
)
def test_each_layout_of_a_dataset_is_read(tmp_path: Path, row: dict[str, object]) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps(row))
    (found,) = read_dialogues(str(file))
    assert found.name == "mine/0" and found.turns[0] == "a"


def test_a_dataset_without_questions_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps({"messages": [{"role": "assistant", "content": "a"}]}))
    with pytest.raises(ValueError, match="mine/0 has no user turn"):
        read_dialogues(str(file))
    with pytest.raises(ValueError, match="has no rows"):
        read_dialogues(save_rows(tmp_path / "empty.jsonl", []))


def test_training_prompts_are_kept_as_hashes_in_a_folder(tmp_path: Path) -> None:
    assert read_training_prompts(tmp_path) is None
    write_training_prompts(tmp_path, ["a  b", "c", "c"])
    assert read_training_prompts(tmp_path) == {prompt_fingerprint("a b"), prompt_fingerprint("c")}
    assert "a b" not in (tmp_path / "training_prompts.json").read_text()
    (tmp_path / "training_prompts.json").write_text("[]")
    with pytest.raises(ValueError, match="is not what `write_training_prompts` writes"):
        read_training_prompts(tmp_path)


PROMPT = Prompt("a/0", torch.tensor([1, 9, 8, 7]))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_wrong_answer_is_reported(bench: Bench, temperature: float) -> None:
    one = bench.decode(PROMPT, plain(), 0, temperature)
    other = Generate("tree", {"suppress_tokens": one.token_ids[2:3].tolist()})
    judge = Judge(bench.target, [plain(), other])
    judge.add(PROMPT, [one, bench.decode(PROMPT, other, 0, temperature)])
    assert judge.same_text == {"plain": 1, "tree": 0}
    assert len(judge.unexplained) == 1 and judge.unexplained[0].startswith("tree, a/0, turn 1")


def test_a_sampled_text_of_a_stock_assistant_may_differ(bench: Bench) -> None:
    one = bench.decode(PROMPT, plain(), 0, 1.0)
    lookup = prompt_lookup()
    other = Generate(lookup.name, {"suppress_tokens": one.token_ids[2:3].tolist()}, seed_exact=lookup.seed_exact)
    judge = Judge(bench.target, [plain(), other])
    judge.add(PROMPT, [one, bench.decode(PROMPT, other, 0, 1.0)])
    assert judge.same_text["prompt lookup"] == 0 and not judge.unexplained


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_in_half_precision_a_near_tie_is_passed_over_in_the_normal_mode_alone(
    bench: Bench, tiny_head: DraftHead, temperature: float
) -> None:
    bench.target.bfloat16().lm_head.weight.data.zero_()  # every token is as likely as any other
    tree = fixed_tree(tiny_head, SHAPE)
    methods = [plain(), invariant(plain_steps()), tree, invariant(tree)]

    def run(name: str, text: list[int]) -> Run:
        return Run(AnswerTiming(name, PROMPT.name, 0, 2, 2, 1.0, 1, temperature), torch.tensor(text))

    judge, texts = Judge(bench.target, methods), ([3, 4], [3, 5], [3, 6], [3, 6])
    judge.add(PROMPT, [run(method.name, text) for method, text in zip(methods, texts, strict=True)])
    assert judge.same_text == {"plain": 1, "plain, invariant": 0, "tree 4/2/2": 0, "tree 4/2/2, invariant": 0}
    assert judge.same_text_invariant == {"tree 4/2/2, invariant": 0}
    [line] = judge.unexplained
    assert line.startswith("tree 4/2/2, invariant, a/0, turn 1")


def test_prompts_that_were_learned_from_are_refused() -> None:
    rows = [dialogue("d/0", "new"), dialogue("d/1", "Known  question\n")]
    with pytest.raises(ValueError, match="1 of 2 prompts .* among the training prompts of head, for example d/1"):
        check_apart(rows, {prompt_fingerprint("Known question")}, "the training prompts of head")
    check_apart(rows[:1], {prompt_fingerprint("Known question")}, "the training prompts of head")
