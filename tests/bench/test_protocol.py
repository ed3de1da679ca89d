"""The protocol on a tiny model, with a clock that ticks."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.bench.conversations import Ticking, dialogue
from tests.tokenizers import letter_tokenizer
from transformers_resps import DraftHead, FixedPolicy, TreeShape, attach
from transformers_resps.bench.judging import Judge
from transformers_resps.bench.methods import Method, draft_model, fixed_tree, plain, policies, prompt_lookup
from transformers_resps.bench.profile import Stopwatch, profile
from transformers_resps.bench.prompts import Prompt
from transformers_resps.bench.protocol import Bench, Cell, Run, Schedule


SHAPE = TreeShape(4, 2, 2)
PROMPTS = [Prompt("a/0", torch.tensor([1, 9, 8, 7])), Prompt("b/0", torch.tensor([1, 30, 31, 30, 31]))]
DIALOGUES = [dialogue("a/0", "defg", "hij"), dialogue("b/0", "klkl")]


class Forgetful:
    """Keeps nothing: every run is made."""

    def __init__(self) -> None:
        self.kept: list[Run] = []

    def find(self, cell: Cell, method: str) -> Run | None:
        return None

    def keep(self, run: Run) -> None:
        self.kept.append(run)


@pytest.fixture
def bench(tiny_target: PreTrainedModel) -> Bench:
    return Bench(attach(tiny_target), 6, Ticking())


def schedule(methods: Sequence[Method], repeats: int = 1, temperatures: Sequence[float] = (0.0,)) -> Schedule:
    return Schedule(DIALOGUES, methods, temperatures, repeats, letter_tokenizer())


def test_methods_take_turns_and_each_begins_as_often(bench: Bench, tiny_head: DraftHead) -> None:
    plan, memory = schedule([plain(), prompt_lookup(), fixed_tree(tiny_head, SHAPE)], repeats=3), Forgetful()
    cells = list(plan.run(bench, memory))
    order = [run.timing.method for run in memory.kept]
    assert order[:9] == ["plain", "prompt lookup", "tree 4/2/2"] * 2 + ["prompt lookup", "tree 4/2/2", "plain"]
    assert [len(runs) for _, runs in cells] == [3] * 9 and plan.total == 27
    assert all([run.timing.method for run in runs] == order[:3] for _, runs in cells)


def test_each_turn_follows_the_plain_answers_to_those_before_it(bench: Bench, tiny_head: DraftHead) -> None:
    (first, runs), (second, _), _ = schedule([plain(), fixed_tree(tiny_head, SHAPE)]).run(bench, Forgetful())
    tokenizer = letter_tokenizer()
    said = tokenizer.decode(runs[0].token_ids, skip_special_tokens=True)
    assert (first.turn, second.turn) == (1, 2)
    assert tokenizer.decode(second.input_ids) == f"defg\n{said}\nhij\n".replace("\n", "a")  # "\n" is no letter


def test_a_conversation_ends_where_the_next_turn_does_not_fit(bench: Bench) -> None:
    long = dialogue("c/0", "d" * 200, "e" * 100)
    plan = Schedule([long], [plain()], [0.0], 1, letter_tokenizer())
    plan.check_room(bench)
    assert [prompt.turn for prompt, _ in plan.run(bench, Forgetful())] == [1]
    assert plan.cut == {"c/0"} and plan.total == 1
    with pytest.raises(ValueError, match="d/0 has 302 tokens and its answer up to 6, but the target holds 256"):
        Schedule([dialogue("d/0", "d" * 301)], [plain()], [0.0], 1, letter_tokenizer()).check_room(bench)


def test_every_method_is_counted_alike(bench: Bench, tiny_head: DraftHead) -> None:
    one = bench.decode(PROMPTS[0], plain())
    tree = bench.decode(PROMPTS[0], fixed_tree(tiny_head, SHAPE))
    assert one.token_ids.tolist() == tree.token_ids.tolist()
    assert one.timing.target_forwards == one.timing.tokens == tree.timing.tokens
    assert tree.timing.target_forwards <= one.timing.target_forwards
    assert len(tree.steps) == tree.timing.target_forwards and not one.steps


def test_prefill_ends_where_the_second_forward_begins(bench: Bench) -> None:
    m = bench.decode(PROMPTS[0], plain()).timing
    assert m.target_forwards == 6
    assert m.seconds == 7.0 and m.prefill_seconds == 2.0  # a tick at the start, at each forward, and at the end


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
    judge = Judge(bench.model, chosen)
    for prompt, runs in schedule(chosen, repeats=2, temperatures=[temperature]).run(bench, Forgetful()):
        judge.add(prompt, runs)
    assert judge.same_text == {method.name: 3 for method in chosen} and not judge.unexplained


def test_each_repeat_is_another_seed_and_nothing_else_changes(bench: Bench) -> None:
    texts = [bench.decode(PROMPTS[0], plain(), repeat, 1.0).token_ids.tolist() for repeat in (0, 1, 2, 0)]
    assert texts[0] == texts[3] and texts[0] != texts[1] != texts[2]


def test_an_answer_meets_the_policy_as_it_was_loaded(bench: Bench, tiny_head: DraftHead) -> None:
    class Forgetting(FixedPolicy):
        asked = 0

        def choose(self, observation: Any) -> TreeShape:
            self.asked += 1
            return TreeShape.plain() if self.asked > 1 else SHAPE

    (method,) = policies(tiny_head, {"mine": Forgetting(SHAPE)})
    shapes = [[step.verified for step in bench.decode(PROMPTS[0], method).steps] for _ in range(2)]
    assert shapes[0] == shapes[1] and shapes[0][1] == 4


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_wrong_answer_is_reported(bench: Bench, temperature: float) -> None:
    one = bench.decode(PROMPTS[0], plain(), 0, temperature)
    other = Method("tree", {"suppress_tokens": one.token_ids[2:3].tolist()})
    judge = Judge(bench.model, [plain(), other])
    judge.add(PROMPTS[0], [one, bench.decode(PROMPTS[0], other, 0, temperature)])
    assert judge.same_text == {"plain": 1, "tree": 0}
    assert len(judge.unexplained) == 1 and judge.unexplained[0].startswith("tree, a/0, turn 1")


def test_a_sampled_text_of_a_stock_assistant_may_differ(bench: Bench) -> None:
    one = bench.decode(PROMPTS[0], plain(), 0, 1.0)
    lookup = prompt_lookup()
    other = Method(lookup.name, {"suppress_tokens": one.token_ids[2:3].tolist()}, seed_exact=lookup.seed_exact)
    judge = Judge(bench.model, [plain(), other])
    judge.add(PROMPTS[0], [one, bench.decode(PROMPTS[0], other, 0, 1.0)])
    assert judge.same_text["prompt lookup"] == 0 and not judge.unexplained


def test_a_stopwatch_times_calls_and_leaves_no_trace(tiny_target: PreTrainedModel) -> None:
    watch = Stopwatch(Ticking())
    with watch.around(tiny_target, "forward", "target"):
        tiny_target(input_ids=torch.tensor([[1, 2]]))
    assert watch.seconds == {"target": [1.0]}
    assert "forward" not in vars(tiny_target)


def test_a_profile_accounts_for_all_the_time(tiny_target: PreTrainedModel, tiny_head: DraftHead) -> None:
    bench = Bench(attach(tiny_target), 6)
    found = profile(bench, tiny_head, fixed_tree(tiny_head, SHAPE), PROMPTS)
    assert 0 < found.overhead_share < 1
    assert found.prefill_ratio > 0 and found.level_cost > 0
    assert found.peak_bytes_tree >= found.peak_bytes_plain > 0
