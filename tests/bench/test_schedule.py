"""Every conversation with every method, on a tiny model."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from tests.bench.conversations import Ticking, dialogue
from tests.tokenizers import letter_tokenizer
from transformers_resps import DraftHead, FixedPolicy, TreeShape, attach
from transformers_resps.bench.journal import Journal
from transformers_resps.bench.judging import Judge
from transformers_resps.bench.methods import Method, draft_model, fixed_tree, plain, policies, prompt_lookup
from transformers_resps.bench.runs import Bench
from transformers_resps.bench.schedule import Schedule


SHAPE = TreeShape(4, 2, 2)
DIALOGUES = [dialogue("a/0", "defg", "hij"), dialogue("b/0", "klkl")]


@pytest.fixture
def bench(tiny_target: PreTrainedModel) -> Bench:
    return Bench(attach(tiny_target), 6, Ticking())


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path, {})


def schedule(
    bench: Bench, methods: Sequence[Method], repeats: int = 1, temperatures: Sequence[float] = (0.0,)
) -> Schedule:
    return Schedule(bench, DIALOGUES, methods, temperatures, repeats, letter_tokenizer())


def test_methods_take_turns_and_each_begins_as_often(bench: Bench, tiny_head: DraftHead, journal: Journal) -> None:
    plan = schedule(bench, [plain(), prompt_lookup(), fixed_tree(tiny_head, SHAPE)], repeats=3)
    cells = list(plan.run(journal))
    order = [run.timing.method for run in journal.runs]
    assert order[:9] == ["plain", "prompt lookup", "tree 4/2/2"] * 2 + ["prompt lookup", "tree 4/2/2", "plain"]
    assert [len(runs) for _, runs in cells] == [3] * 9 and plan.total == 27
    assert all([run.timing.method for run in runs] == order[:3] for _, runs in cells)


def test_each_turn_follows_the_plain_answers_to_those_before_it(
    bench: Bench, tiny_head: DraftHead, journal: Journal
) -> None:
    (first, runs), (second, _), _ = schedule(bench, [plain(), fixed_tree(tiny_head, SHAPE)]).run(journal)
    tokenizer = letter_tokenizer()
    said = tokenizer.decode(runs[0].token_ids, skip_special_tokens=True)
    assert (first.turn, second.turn) == (1, 2)
    assert tokenizer.decode(second.input_ids) == f"defg\n{said}\nhij\n".replace("\n", "a")  # "\n" is no letter


def test_a_conversation_ends_where_the_next_turn_does_not_fit(bench: Bench, journal: Journal) -> None:
    long = dialogue("c/0", "d" * 200, "e" * 100)
    plan = Schedule(bench, [long], [plain()], [0.0], 1, letter_tokenizer())
    assert [prompt.turn for prompt, _ in plan.run(journal)] == [1]
    assert plan.cut == {"c/0"} and plan.total == 1
    with pytest.raises(ValueError, match="d/0 has 302 tokens and its answer up to 6, but the target holds 256"):
        Schedule(bench, [dialogue("d/0", "d" * 301)], [plain()], [0.0], 1, letter_tokenizer())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_kind_of_method_writes_the_plain_text(
    bench: Bench, tiny_head: DraftHead, tiny_target: PreTrainedModel, journal: Journal, temperature: float
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
    judge = Judge(bench.model, chosen)
    for prompt, runs in schedule(bench, chosen, repeats=2, temperatures=[temperature]).run(journal):
        judge.add(prompt, runs)
    assert judge.same_text == {method.name: 3 for method in chosen} and not judge.unexplained
