"""Replayed decisions belong to one grid; live ones obey planted costs and no clock is believed blindly."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.conftest import FakeClock
from tests.trainers.policies import FEATURES, GRID, config, task
from transformers_resps import DraftHead, TreeShape, attach, detach
from transformers_resps.decoding.loop import TreeDecoding
from transformers_resps.policies.action_grid import ActionGrid
from transformers_resps.policies.base import Observation
from transformers_resps.policies.resps import ReSpSConfig, ReSpSPolicy
from transformers_resps.replay import OutcomeTable, TextOutcomes
from transformers_resps.telemetry import RowCounts, StepRecord
from transformers_resps.trainers import ReplayRollouts
from transformers_resps.trainers.policy_trainer import RolloutTrainer
from transformers_resps.trainers.rollouts import DecisionRecorder, LiveRollouts


OTHER = ActionGrid((*GRID.shapes[:2], TreeShape(16, 4, 4)))


def texts(grid: ActionGrid | None) -> TextOutcomes:
    return dataclasses.replace(TextOutcomes(torch.zeros(2, FEATURES), torch.ones(2, 3), torch.ones(2, 3)), grid=grid)


def test_a_policy_of_another_grid_of_the_same_size_is_refused() -> None:
    policy = ReSpSPolicy(ReSpSConfig(FEATURES, OTHER))
    for grid, known in ((OTHER, True), (None, True), (GRID, False)):
        rollouts = ReplayRollouts(OutcomeTable([texts(grid)]))
        if known:
            rollouts.collect(policy, 1, 1, torch.Generator())
            continue
        with pytest.raises(ValueError, match="3 shapes, but is used with another grid of 3, which lacks 1 of them"):
            rollouts.collect(policy, 1, 1, torch.Generator())
    task(1, 0).collect(policy, 1, 1, torch.Generator())


def test_texts_of_two_grids_make_no_table() -> None:
    with pytest.raises(ValueError, match="of 2 grids.*one grid"):
        OutcomeTable([texts(GRID), texts(OTHER)])


WIDE = ActionGrid((TreeShape.plain(), TreeShape(73, 2, 8)))  # every token has 8 candidates: always two accepted


@pytest.fixture
def small_vocabulary(make_target: Callable[..., PreTrainedModel]) -> tuple[PreTrainedModel, DraftHead]:
    target = attach(make_target(vocab_size=8, bos_token_id=None, eos_token_id=None))
    return target, DraftHead.from_target(target, draft_vocab_size=None).eval()


def live(pair: tuple[PreTrainedModel, DraftHead], **options: Any) -> tuple[ReSpSPolicy, LiveRollouts]:
    target, head = pair
    prompts = [torch.tensor([1, 2, 3, 4]), torch.tensor([5, 6, 7])]
    rollouts = LiveRollouts(target, head, prompts, max_new_tokens=16, do_sample=False, **options)
    return ReSpSPolicy(ReSpSConfig(head.config.features_width, WIDE, persistence=1)), rollouts


def plant_costs(
    monkeypatch: pytest.MonkeyPatch, pair: tuple[PreTrainedModel, DraftHead], node_seconds: float, level_seconds: float
) -> FakeClock:
    """A target's forward takes a second and `node_seconds` for each token, a pass of the head `level_seconds`."""
    clock = FakeClock()
    monkeypatch.setitem(TreeDecoding.__init__.__kwdefaults__, "clock", clock)
    target, head = pair
    target.register_forward_pre_hook(
        lambda module, args, kwargs: clock.advance(1 + node_seconds * kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    head.layers[0].register_forward_pre_hook(lambda module, args: clock.advance(level_seconds))
    return clock


@pytest.mark.parametrize(
    ("node_seconds", "level_seconds", "includes_drafting", "wanted"),
    [
        (0.0, 0.0, True, 1),  # deep trees are free
        (1.0, 0.0, True, 0),  # nodes are ruinous
        (0.0, 5.0, True, 0),  # drafting is ruinous
        (0.0, 5.0, False, 1),  # ... and as free as in the code of Re-SpS, whose clock leaves it out
    ],
)
def test_planted_costs_in_live_decoding_are_obeyed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    small_vocabulary: tuple[PreTrainedModel, DraftHead],
    node_seconds: float,
    level_seconds: float,
    includes_drafting: bool,
    wanted: int,
) -> None:
    plant_costs(monkeypatch, small_vocabulary, node_seconds, level_seconds)
    learner, rollouts = live(small_vocabulary, includes_drafting=includes_drafting)
    settings = config(
        tmp_path, objective="max_entropy_ppo", max_steps=48, save_steps=48, num_mini_batches=1, learning_rate=2e-3
    )
    trainer = RolloutTrainer(learner, settings, rollouts, reward_func="mean_rate")
    trainer.train()
    decisions = rollouts.collect(learner, 2, 1, torch.Generator().manual_seed(0), greedy=True)
    assert (decisions.actions == wanted).all()


def record(shape: TreeShape, emitted: int, seconds: float, draft_seconds: float = 0.0) -> StepRecord:
    return StepRecord(
        shape, 0, shape.total_tokens, RowCounts([emitted - 1]), RowCounts([emitted]), draft_seconds, 0.0, seconds
    )


def test_each_step_is_booked_under_the_decision_that_shaped_it() -> None:
    learner = ReSpSPolicy(ReSpSConfig(FEATURES, GRID))
    recorder = DecisionRecorder(learner, persistence=3, generator=torch.Generator().manual_seed(0))
    for step in range(8):
        shape = recorder.choose(Observation(torch.full((1, FEATURES), float(step)), 10, step, 100, list))
        recorder.observe(record(shape, emitted=step + 1, seconds=1.0))
    assert [[int(one.emitted) for one in decision.records] for decision in recorder.decisions] == [
        [1, 2, 3],
        [4, 5, 6],
        [7, 8],
    ]
    assert [float(decision.features[0, 0]) for decision in recorder.decisions] == [0, 3, 6]  # no zeros put in
    for decision in recorder.decisions:
        assert {one.shape for one in decision.records} == {GRID[decision.action]}


def test_a_clock_that_jumps_or_stands_still_is_not_believed(
    monkeypatch: pytest.MonkeyPatch, small_vocabulary: tuple[PreTrainedModel, DraftHead]
) -> None:
    clock = plant_costs(monkeypatch, small_vocabulary, 0.01, 0.1)
    learner, rollouts = live(small_vocabulary)
    steady = rollouts.collect(learner, 2, 1, torch.Generator().manual_seed(0))
    assert steady.dropped == 0 and len(steady) > 8
    calls = iter(range(10_000))
    jumps = {5: 3600.0, 9: -7200.0}  # the machine slept; then the clock was set back
    target = small_vocabulary[0]
    handle = target.register_forward_hook(lambda *_: clock.advance(jumps.get(next(calls), 0.0)))
    jumped = rollouts.collect(learner, 2, 1, torch.Generator().manual_seed(0))
    handle.remove()
    assert jumped.dropped == 2 and len(jumped) == len(steady) - 2
    rates = [float(one.outcomes.emitted.sum() / one.outcomes.seconds.sum()) for one in (jumped, steady)]
    assert rates[0] == pytest.approx(rates[1], rel=0.2)
    clock.advance = lambda seconds: None  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"None of the \d+ decisions over 2 prompts.*Check the clock"):
        rollouts.collect(learner, 2, 1, torch.Generator().manual_seed(0))


def test_bad_input_is_refused_by_name(tmp_path: Path, small_vocabulary: tuple[PreTrainedModel, DraftHead]) -> None:
    target, head = small_vocabulary
    with pytest.raises(ValueError, match="Got no prompts.*Pass a dataset"):
        LiveRollouts(target, head, [])
    with pytest.raises(ValueError, match="`DraftHead` or `BlockHead`, got .* and NoneType.*Pass `attach"):
        LiveRollouts(target, None, [torch.arange(3)])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="attached target.*, got LlamaForCausalLM and .*Pass `attach"):
        LiveRollouts(detach(target), head, [torch.arange(3)])
    attach(target)
    learner, rollouts = live(small_vocabulary)
    with pytest.raises(ValueError, match="'full_information' with LiveRollouts.*objective='ppo'"):
        RolloutTrainer(learner, config(tmp_path), rollouts)


def test_a_policy_that_reads_other_features_is_refused(small_vocabulary: tuple[PreTrainedModel, DraftHead]) -> None:
    _, rollouts = live(small_vocabulary)
    with pytest.raises(ValueError, match=f"features of width {FEATURES}, but the head provides.*use that target"):
        rollouts.collect(ReSpSPolicy(ReSpSConfig(FEATURES, GRID)), 1, 1, torch.Generator())
