"""The step loop: what a report says, what a policy may answer, when the clock is read."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from transformers import PreTrainedModel

from tests.conftest import FakeClock
from tests.lossless.answering import both
from transformers_resps import DraftHead, FixedPolicy, Observation, Policy, TreeShape
from transformers_resps.compat import CACHE_KEYWORD
from transformers_resps.decoding.loop import TreeDecoding, wait_for
from transformers_resps.drafting.model_drafter import ModelDrafter
from transformers_resps.drafting.suffixes import Suffixes
from transformers_resps.tree import DraftTree
from transformers_resps.verifying.growing import TreeVerifier


def test_the_report_adds_up(target: PreTrainedModel, head: DraftHead, prompt: torch.Tensor) -> None:
    _, tree = both(target, head, prompt, eos_token_id=-1)
    report = tree.speculation
    assert report.emitted_total == tree.sequences.shape[1] - prompt.shape[1] == 24
    assert report.target_forwards == len(report.steps)
    assert report.tau == report.emitted_total / report.target_forwards > 1
    for step in report.steps:
        assert int(step.emitted) == int(step.accepted) + 1
        assert step.verified <= step.shape.total_tokens
        assert int(step.accepted) <= step.shape.depth
        assert step.draft_seconds + step.verify_seconds <= step.step_seconds


def test_the_head_reads_the_prompt_only_when_a_step_follows_and_the_policy_is_told_its_seconds(
    target: PreTrainedModel, head: DraftHead, prompt: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, told = FakeClock(), []
    read = ModelDrafter.read

    def slow_read(self: ModelDrafter, at_least: int = 1) -> None:
        clock.advance(3.0)
        read(self, at_least)

    class Told(Policy):
        def choose(self, observation: Observation) -> TreeShape:
            told.append(observation.prompt_seconds)
            return TreeShape.plain()

    monkeypatch.setattr(ModelDrafter, "read", slow_read)
    monkeypatch.setitem(TreeDecoding.__init__.__kwdefaults__, "clock", clock)
    options = {"assistant_model": head, "policy": Told(), "return_dict_in_generate": True}
    target.generate(prompt, max_new_tokens=1, **options)
    assert clock.now == 0.0 and not told, "nothing will be drafted"
    prefill = target.generate(prompt, max_new_tokens=3, **options).speculation.steps[0]
    assert told == [3.0] * 2
    assert (prefill.draft_seconds, prefill.verify_seconds, prefill.step_seconds) == (3.0, 0.0, 3.0)


def test_compiling_while_the_prompt_is_read_is_no_time_of_the_prompt(
    target: PreTrainedModel, head: DraftHead, prompt: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, read, compiling = FakeClock(), ModelDrafter.read, [40.0]

    def slow_read(self: ModelDrafter, at_least: int = 1) -> None:
        clock.advance(43.0)
        read(self, at_least)

    monkeypatch.setattr(ModelDrafter, "read", slow_read)
    monkeypatch.setattr(
        ModelDrafter, "take_compile_seconds", lambda self: compiling.pop() if clock.now and compiling else 0.0
    )
    monkeypatch.setitem(TreeDecoding.__init__.__kwdefaults__, "clock", clock)
    options = {"assistant_model": head, "policy": FixedPolicy(TreeShape(4, 3, 1)), "return_dict_in_generate": True}
    report = target.generate(prompt, max_new_tokens=3, **options).speculation
    assert (report.steps[0].draft_seconds, report.compile_seconds) == (3.0, 40.0)


def test_a_head_that_a_policy_does_not_want_reads_nothing_and_the_policy_is_told_so(
    target: PreTrainedModel, head: DraftHead, prompt: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, told = [], []

    class Refuses(Policy):
        def wants_head(self, rows: int, tokens: int, room: int) -> bool:
            asked.append((rows, tokens, room))
            return False

        def choose(self, observation: Observation) -> TreeShape:
            told.append(observation.can_draft)
            return TreeShape(4, 3, 1, lookup=2)

    monkeypatch.setattr(ModelDrafter, "observe", MagicMock(side_effect=AssertionError))
    options = {"max_new_tokens": 6, "assistant_model": head, "return_dict_in_generate": True}
    out = target.generate(prompt.repeat(2, 1), policy=Refuses(), **options)
    assert asked == [(2, 2 * prompt.shape[1], 6)] and not any(told)
    assert torch.equal(out.sequences, target.generate(prompt.repeat(2, 1), max_new_tokens=6))
    cached = target.generate(prompt, max_new_tokens=2, return_dict_in_generate=True)
    target.generate(cached.sequences, policy=Refuses(), **{CACHE_KEYWORD: cached[CACHE_KEYWORD]}, **options)
    assert asked[1] == (1, 1, 6), "what an earlier call has read is not read again"


@pytest.mark.parametrize(("lookup", "indexed"), [(4, 8.0), (0, 0.0)])
def test_the_prompt_is_indexed_before_the_first_step_where_a_policy_looks_up(
    lookup: int, indexed: float, target: PreTrainedModel, prompt: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, extend = FakeClock(), Suffixes.extend

    def slow_extend(self: Suffixes, tokens: list[int]) -> None:
        clock.advance(float(len(tokens)))
        extend(self, tokens)

    monkeypatch.setattr(Suffixes, "extend", slow_extend)
    monkeypatch.setitem(TreeDecoding.__init__.__kwdefaults__, "clock", clock)
    options = {"policy": FixedPolicy(TreeShape(1, 0, 1, lookup)), "return_dict_in_generate": True}
    if not lookup:
        options["assistant_model"] = DraftHead.from_target(target)
    prefill, *steps = target.generate(prompt, max_new_tokens=4, **options).speculation.steps
    assert prefill.draft_seconds == indexed
    assert steps[0].draft_seconds == 0.0


def test_the_clock_is_read_after_the_device_has_finished(
    target: PreTrainedModel, head: DraftHead, prompt: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device that has launched a forward at once, and takes a second to finish it."""
    clock = FakeClock()
    monkeypatch.setattr("transformers_resps.decoding.loop.wait_for", lambda states: clock.advance(1.0))
    monkeypatch.setitem(TreeDecoding.__init__.__kwdefaults__, "clock", clock)
    for step in both(target, head, prompt)[1].speculation.steps[1:]:
        assert (step.draft_seconds, step.verify_seconds, step.rest_seconds) == (0.0, 1.0, 0.0)


def test_seconds_of_compiling_are_told_and_no_step_counts_them(
    target: PreTrainedModel, head: DraftHead, prompt: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, verify, planted = FakeClock(), TreeVerifier.verify, [30.0, 0.0, 60.0]

    def slow_verify(self: TreeVerifier, tree: DraftTree) -> Any:
        clock.advance(1.0 + sum(planted[:1]))
        return verify(self, tree)

    monkeypatch.setattr(TreeVerifier, "take_compile_seconds", lambda self: planted.pop(0) if planted else 0.0)
    monkeypatch.setattr(TreeVerifier, "verify", slow_verify)
    monkeypatch.setitem(TreeDecoding.__init__.__kwdefaults__, "clock", clock)
    report = both(target, head, prompt)[1].speculation
    assert report.compile_seconds == report.to_dict()["compile_seconds"] == 90.0
    assert {step.step_seconds for step in report.steps[1:]} == {1.0}


@pytest.mark.parametrize(("device", "waits"), [("cpu", 0), ("cuda", 1), ("mps", 1)])
def test_only_an_accelerator_is_waited_for(device: str, waits: int) -> None:
    states = MagicMock()
    states.device.type = device
    wait_for(states)
    assert states.__getitem__.return_value.item.call_count == waits


def test_the_default_tree_of_the_head_is_used_without_a_policy(target: PreTrainedModel, prompt: torch.Tensor) -> None:
    head = DraftHead.from_target(target, default_tree=[4, 3, 1])
    out = target.generate(prompt, assistant_model=head, max_new_tokens=10, return_dict_in_generate=True)
    assert out.speculation.steps[1].shape == TreeShape(4, 3, 1)
    assert out.speculation.steps[1].verified == 4


def test_plain_steps_need_no_head(target: PreTrainedModel, prompt: torch.Tensor) -> None:
    out = target.generate(
        prompt, policy=FixedPolicy(TreeShape.plain()), max_new_tokens=10, return_dict_in_generate=True
    )
    assert out.sequences.tolist() == target.generate(prompt, max_new_tokens=10).tolist()
    assert {step.verified for step in out.speculation.steps} == {1}


@pytest.mark.parametrize("answer", [None, (8, 3, 2), "auto"])
def test_a_policy_that_chooses_no_shape_is_told_so(
    target: PreTrainedModel, head: DraftHead, prompt: torch.Tensor, answer: Any
) -> None:
    class Odd(Policy):
        def choose(self, observation: Any) -> Any:
            return answer

    with pytest.raises(ValueError, match="from `choose`. Return a `TreeShape`"):
        target.generate(prompt, assistant_model=head, policy=Odd(), max_new_tokens=8)
    plain, tree = both(target, head, prompt)
    assert tree.sequences.tolist() == plain.sequences.tolist()


@pytest.mark.parametrize("size", [-3, 0, 1, 10**9, 4.7])
def test_any_number_of_nodes_a_policy_asks_for_is_survived(
    target: PreTrainedModel, head: DraftHead, prompt: torch.Tensor, size: float
) -> None:
    class Greedy(FixedPolicy):
        def size(self, scores: torch.Tensor, levels: torch.Tensor) -> Any:
            return size

    plain = target.generate(prompt, max_new_tokens=16)
    policy = Greedy(TreeShape(10**6, 3, 10**6))
    assert target.generate(prompt, assistant_model=head, policy=policy, max_new_tokens=16).tolist() == plain.tolist()


def test_a_policy_may_stop_growing_and_choose_the_number_of_nodes(
    target: PreTrainedModel, head: DraftHead, prompt: torch.Tensor
) -> None:
    class Careful(FixedPolicy):
        grows = True

        told: list[Any] = []

        def grow(self, level: Any) -> bool:
            assert level.scores.shape == (1, 4)
            return level.depth < 2

        def size(self, scores: torch.Tensor, levels: torch.Tensor) -> int:
            one_level = len(levels) == 4  # where the text may grow by one token
            assert levels.tolist() == ([1] * 4 if one_level else [1] * 4 + [2] * 16)
            assert scores.shape == (1, len(levels))
            return 5

        def observe(self, record: Any) -> None:
            self.told.append(record)

    policy: Policy = Careful(TreeShape(30, 6, 4))
    options = {"max_new_tokens": 20, "eos_token_id": -1}
    out = target.generate(prompt, assistant_model=head, policy=policy, return_dict_in_generate=True, **options)
    assert out.sequences.tolist() == target.generate(prompt, **options).tolist()
    assert [step.verified for step in out.speculation.steps[1:-3]] == [5] * (len(out.speculation.steps) - 4)
    assert policy.told == out.speculation.steps[1:]  # type: ignore[attr-defined]


# What a step may ask of an accelerator beside the target's forward, counted on a device that no machine has.
ROOT = Path(__file__).parents[2]

# Call -> kernels and synchronisations of a step, at most. Stock decoding stands beside ours.
BUDGETS = {
    "stock plain": (16, 1.0),
    "stock prompt lookup": (42, 13.0),
    "plain": (7, 1.0),
    "8/4/2": (163, 1.0),
    "60/8/10": (285, 1.0),
    # The draft is one launch, and so is what the target computes for a tree; what is accepted moves in a few.
    "8/4/2 captured": (13, 2.0),
    "60/8/10 captured": (15, 2.0),
    "auto captured": (23.4, 3.9),
    # In the invariant mode what each node reads is laid out on the device, too; waits are of a copy to it and a read.
    "8/4/2 with one text": (266, 2.0),
    "8/4/2 with one text, captured": (21, 2.0),
    "8/4/2 in a window": (167, 1.0),  # so small that it moves on at every step
    "8/4/2 in a window, captured": (18, 2.0),
    "8/4/2 sampled": (177, 1.0),
    "8/4/2 sampled, penalty": (238, 2.0),
    "8/4/2 of three rows": (207, 3.3),
    "auto": (207, 2.7),
    "mtp 8/3/2": (238, 2.0),
    "mtp 8/4/2": (292, 2.0),
    "lookups": (7, 1.23),
}
MTP_LEVEL = 25  # kernels beside those of the decoder layer
# Kernels of a block draft of seven levels beside those of its layers; a correction follows each path.
BLOCKS = {
    "block": 40,
    "causal block of a window": 40,
    "block of a draft vocabulary": 40,
    "corrected block": 58,
    "corrected block with confidence": 66,
    "selected block": 60,
}
BLOCK_CAPTURED = 4  # a launch, and what tells it where to write

# Kernels per recurrent layer that reading any tree adds to a plain step, in which what has a kernel of its own counts
# once, and those that keeping nodes launches for three such layers, at most. Neither waits.
RECURRENT = {"qwen3_5_text": (40, 33), "granitemoehybrid": (30, 33)}
TREES = ("chain", "whole chain", "tree", "whole leaf of a tree")


def test_steps_stay_within_their_budgets_and_texts_are_those_of_plain_decoding() -> None:
    """One test, because counts and texts come from one process, which takes half a minute."""
    command = [sys.executable, "-m", "tests.pretend"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    found: dict[str, Any] = json.loads(ran.stdout)
    for call, (kernels, waits) in BUDGETS.items():
        counted = found["counts"][call]
        assert counted["kernels"] <= kernels and counted["waits"] <= waits, (call, counted)
    deep, shallow = (found["counts"][f"mtp 8/{depth}/2"]["kernels"] for depth in (4, 3))
    assert found["layer"] > 0 and deep - shallow <= found["layer"] + MTP_LEVEL, (deep, shallow, found["layer"])
    for head, kernels in BLOCKS.items():
        drafted, captured = found["blocks"][head]["drafted"], found["blocks"][head]["captured"]
        assert drafted["layers"] > 0 and drafted["kernels"] <= kernels and drafted["waits"] == 0, (head, drafted)
        assert captured["kernels"] <= BLOCK_CAPTURED and captured["waits"] == 0, (head, captured)
    for target, counted in found["hybrids"].items():
        (read, kept), plain = RECURRENT[target], counted["plain"]["verify"]
        for tree in TREES:
            verify, keep = counted[tree]["verify"], counted[tree]["keep"]
            assert verify["own"] <= plain["own"] + read and keep["beside"] <= kept, (target, tree, verify, keep)
            assert verify["waits"] == keep["waits"] == 0, (target, tree, verify, keep)
            assert keep["own"] == keep["fallback"] == 0, "no mixer reads accepted nodes again"
    assert found["texts"], "nothing was written"
    for call, (plain, drafted) in found["texts"].items():
        assert drafted == plain, call
