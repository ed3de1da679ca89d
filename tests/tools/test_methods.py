"""One answer on a tiny model, with a clock that ticks."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.conftest import FakeClock
from transformers_resps import DraftHead, FixedPolicy, TreeShape, attach
from transformers_resps.tools import methods
from transformers_resps.tools.methods import Bench, Prompt, fixed_tree, plain, policies
from transformers_resps.verifying.growing import TreeVerifier


SHAPE = TreeShape(4, 2, 2)
PROMPT = Prompt("a/0", torch.tensor([1, 9, 8, 7]))


@pytest.fixture
def bench(tiny_target: PreTrainedModel) -> Bench:
    return Bench(attach(tiny_target), 6, FakeClock(tick=1.0))


def test_every_method_is_counted_alike(bench: Bench, tiny_head: DraftHead) -> None:
    one = bench.decode(PROMPT, plain())
    tree = bench.decode(PROMPT, fixed_tree(tiny_head, SHAPE))
    assert one.token_ids.tolist() == tree.token_ids.tolist()
    assert one.timing.target_forwards == one.timing.tokens == tree.timing.tokens
    assert tree.timing.target_forwards <= one.timing.target_forwards
    assert len(tree.steps) == tree.timing.target_forwards and not one.steps


def test_prefill_ends_where_the_second_forward_begins(bench: Bench) -> None:
    m = bench.decode(PROMPT, plain()).timing
    assert m.target_forwards == 6
    assert m.seconds == 7.0 and m.prefill_seconds == 2.0  # a tick at the start, at each forward, and at the end


def test_prefill_of_our_methods_ends_where_the_first_token_is_given(
    bench: Bench, tiny_head: DraftHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(methods, "time", SimpleNamespace(perf_counter=FakeClock(tick=1.0)))
    m = bench.decode(PROMPT, fixed_tree(tiny_head, SHAPE)).timing
    assert m.prefill_seconds == 2.0  # a tick at the start, for the prompt, and for each token


def test_each_repeat_is_another_seed_and_nothing_else_changes(bench: Bench) -> None:
    texts = [bench.decode(PROMPT, plain(), repeat, 1.0).token_ids.tolist() for repeat in (0, 1, 2, 0)]
    assert texts[0] == texts[3] and texts[0] != texts[1] != texts[2]


def test_an_answer_in_which_something_was_compiled_is_decoded_again(
    bench: Bench, tiny_head: DraftHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the second and the third forward over a tree were the first of their sizes."""
    asked, left = [], iter([0.0, 0.0, 0.0, 9.0, 9.0])  # the prompt is asked first, and after the head has read it

    def take_compile_seconds(self: TreeVerifier) -> float:
        asked.append(next(left, 0.0))
        return asked[-1]

    monkeypatch.setattr(TreeVerifier, "take_compile_seconds", take_compile_seconds)
    run = bench.decode(PROMPT, fixed_tree(tiny_head, SHAPE))
    assert len(asked) == 2 * (1 + len(run.steps))
    assert run.token_ids.tolist() == bench.decode(PROMPT, plain()).token_ids.tolist()


def test_an_answer_meets_the_policy_as_it_was_loaded(bench: Bench, tiny_head: DraftHead) -> None:
    class Forgetting(FixedPolicy):
        asked = 0

        def choose(self, observation: Any) -> TreeShape:
            self.asked += 1
            return TreeShape.plain() if self.asked > 1 else SHAPE

    (method,) = policies(tiny_head, {"mine": Forgetting(SHAPE)})
    shapes = [[step.verified for step in bench.decode(PROMPT, method).steps] for _ in range(2)]
    assert shapes[0] == shapes[1] and shapes[0][1] == 4
