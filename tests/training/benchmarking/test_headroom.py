from typing import Any

import pytest
import torch

from benchmarking.headroom import Replayer, ceiling_of, choose_best_fixed, shapes_for
from transformers_resps import DraftHead, FixedPolicy, TreeShape, attach
from transformers_resps.policies.action_grid import ActionGrid
from transformers_resps.policies.costs import CostTable
from transformers_resps.tools.results import AnswerTiming


PLAIN, SMALL, LARGE = TreeShape.plain(), TreeShape(4, 2, 2), TreeShape(8, 3, 2)
GRID = ActionGrid((PLAIN, SMALL, LARGE))


def test_the_best_fixed_shape_is_the_fastest_that_drafts() -> None:
    best = choose_best_fixed(torch.tensor([4.0, 8.0, 5.0], dtype=torch.float64), GRID, ["a/1"])
    assert best == {"shape": [8, 3, 2, 0], "prompts": ["a/1"], "expected_ratio": 0.8, "considered": 3}


def test_a_ceiling_keeps_prefill_and_shortens_the_rest() -> None:
    plain = AnswerTiming("plain", "a/0", 0, 10, 10, 11.0, prefill_seconds=1.0)
    assert ceiling_of(plain, 0.4).seconds == pytest.approx(5.0)


def test_a_step_costs_its_drafting_its_nodes_and_what_surrounds_them() -> None:
    seconds = CostTable({100: {1: 1.0, 9: 9.0}}, {2: 0.25}, {}, 0.5).step_seconds
    assert seconds(PLAIN, 100) == 1.5
    assert seconds(SMALL, 100) == 0.5 + 2 * 0.25 + 4.0
    assert seconds(TreeShape(4, 2, 2, lookup=3), 100) == 0.5 + 2 * 0.25 + 7.0
    assert seconds(TreeShape(1, 0, 1, lookup=3), 100) == 0.5 + 4.0


def test_shapes_are_a_plain_step_trees_and_lookups(tiny_target: Any) -> None:
    small, large = shapes_for("cpu"), shapes_for("cuda")
    assert PLAIN in small.shapes and TreeShape(1, 0, 1, lookup=4) in small.shapes
    assert max(shape.total_tokens for shape in small.shapes) == 16
    assert max(shape.total_tokens for shape in large.shapes) == 60


def test_a_ceiling_and_a_fixed_shape_are_what_decoding_does(tiny_target: Any, tiny_head: DraftHead) -> None:
    target = attach(tiny_target)
    prompt = torch.tensor([1, 30, 31, 30, 31])
    a_second_a_node = CostTable({1: {nodes: float(nodes) for nodes in range(1, 10)}}, {}, {}, plain={1: 2.0})
    replayer = Replayer(target, tiny_head, GRID, a_second_a_node, 12)
    answer = replayer.answer(prompt, 0.0)
    assert answer.tolist() == target.generate(prompt[None], max_new_tokens=12, do_sample=False)[0, 5:].tolist()

    def seconds(shape: TreeShape) -> float:
        report = target.generate(
            prompt[None], assistant_model=tiny_head, policy=FixedPolicy(shape), max_new_tokens=12, do_sample=False,
            return_dict_in_generate=True,
        ).speculation  # fmt: skip
        return float(sum(shape.total_tokens for _ in report.steps[1:]))

    best = replayer.find_best_fixed([("a/0", prompt)], 0.0)
    taken = {shape: seconds(shape) for shape in GRID.shapes}
    assert TreeShape(*best["shape"]) == min((SMALL, LARGE), key=lambda shape: taken[shape])
    assert best["expected_ratio"] == pytest.approx(taken[PLAIN] / taken[TreeShape(*best["shape"])])
    assert 0 < replayer.ceiling(prompt, answer) <= min(taken.values()) / (2.0 * taken[PLAIN])


def test_answers_of_one_token_have_nothing_to_win(tiny_target: Any, tiny_head: DraftHead) -> None:
    replayer = Replayer(attach(tiny_target), tiny_head, GRID, CostTable({1: {1: 1.0}}, {}, {}), 1)
    assert replayer.ceiling(torch.tensor([1, 9]), torch.tensor([5])) == 1.0
    with pytest.raises(ValueError, match="--search-dataset"):
        replayer.find_best_fixed([("a/0", torch.tensor([1, 9]))], 0.0)
