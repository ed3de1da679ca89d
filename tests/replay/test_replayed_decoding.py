"""Policies on recordings against the same policies in `generate`."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from transformers_resps import DraftHead, FixedPolicy, SuffixMemory, TreeShape
from transformers_resps.policies.base import Level, Observation, Policy
from transformers_resps.policies.costs import CostTable
from transformers_resps.policies.throughput import ThroughputPolicy
from transformers_resps.replay import RecordedText, record_pools, replay_policy
from transformers_resps.telemetry.report import StepRecord
from transformers_resps.tree import Branches, CandidatePool


PROMPT = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])
COSTS = CostTable({1: {1: 1.1, 11: 2.1}}, {1: 0.05}, {}, 0.01)


class Changing(Policy):
    """Uses all three decisions, differently at every step, from nothing but what it sees."""

    def __init__(self) -> None:
        self.seen: list[object] = []

    def choose(self, observation: Observation) -> TreeShape:
        prefix_accept_probs = observation.prefix_accept_probs()
        self.seen.append((observation.context_length, observation.room, [round(s, 9) for s in prefix_accept_probs]))
        here = observation.context_length
        return (TreeShape.plain(), TreeShape(9, 4, 3), TreeShape(1, 0, 1, 5), TreeShape(6, 3, 3, 4))[here % 4]

    def grow(self, level: Level) -> bool:
        self.seen.append((level.depth, [round(score, 3) for score in level.scores[0].tolist()]))
        return len(self.seen) % 5 > 0

    def size(self, scores: torch.Tensor, levels: torch.Tensor) -> int:
        self.seen.append((scores.shape[1], levels.tolist()))
        return 2 + len(self.seen) % 7

    def observe(self, record: StepRecord) -> None:
        self.seen.append((record.shape, record.verified, record.accepted, record.drafted, record.drafted_match))


@pytest.fixture(scope="module")
def head(target: PreTrainedModel) -> DraftHead:
    torch.manual_seed(1)
    return DraftHead.from_target(target).double().eval()


def recorded(target: PreTrainedModel, head: DraftHead, policy: Policy) -> RecordedText:
    text = target.generate(
        PROMPT[None], assistant_model=head, policy=policy, do_sample=True, max_new_tokens=60, eos_token_id=None
    )[0]
    return record_pools(target, head, text, len(PROMPT), depths={3: 4, 1: 4})


def test_a_policy_sees_and_gets_the_same_on_a_recording_as_live(
    target: PreTrainedModel, head: DraftHead, tmp_path: Path
) -> None:
    torch.manual_seed(4)
    live = Changing()
    text = recorded(target, head, live)
    text.save(tmp_path / "text.safetensors")
    replayed = Changing()
    report = replay_policy(RecordedText.load(tmp_path / "text.safetensors"), replayed, COSTS)
    differing = [(a, b) for a, b in zip(live.seen, replayed.seen, strict=True) if not _alike(a, b)]
    assert not differing
    assert any(step.accepted_total for step in report.steps) and report.emitted_total == 59


def _alike(live: object, replayed: object) -> bool:
    """Lookups of a step add to what was drafted live; a recording counts the head's candidates alone."""
    if isinstance(live, tuple) and isinstance(live[0], TreeShape) and isinstance(replayed, tuple):
        return live[:3] + live[4:] == replayed[:3] + replayed[4:]
    return live == replayed


def test_seconds_come_from_the_costs(target: PreTrainedModel, head: DraftHead) -> None:
    text = recorded(target, head, FixedPolicy(TreeShape(2, 1, 1)))
    report = replay_policy(text, FixedPolicy(TreeShape(4, 3, 1)), COSTS)
    assert report.steps[0].step_seconds == pytest.approx(1.4 + 0.15 + 0.01)
    plain = replay_policy(text, FixedPolicy(TreeShape.plain()), COSTS)
    assert plain.seconds == pytest.approx(59 * 1.11)
    with pytest.raises(ValueError, match=r"recorded for top_k \[1, 3\].*Record it again"):
        replay_policy(text, FixedPolicy(TreeShape(9, 2, 2)), COSTS)


@pytest.mark.parametrize(
    ("method", "answer", "refusal"),
    [
        ("choose", (4, 2, 2), "from `choose`. Return a `TreeShape`"),
        ("grow", torch.ones(2), "from `grow`. Return True or False"),
        ("size", "many", "from `size`. Return an integer"),
    ],
)
def test_what_no_step_could_follow_is_refused_as_live(
    target: PreTrainedModel,
    head: DraftHead,
    method: str,
    answer: object,
    refusal: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = recorded(target, head, FixedPolicy(TreeShape(9, 4, 3)))
    policy = FixedPolicy(TreeShape(9, 4, 3))
    policy.grows = True
    monkeypatch.setattr(policy, method, lambda *_: answer)
    with pytest.raises(ValueError, match=refusal):
        replay_policy(text, policy, COSTS)


class Phrasebook:
    """Texts of common phrases and rare words, and a head that is right about four of five tokens, and says so."""

    def __init__(self) -> None:
        self.draws = random.Random(0)
        self.phrases = [self.words(length) for length in (2, 3, 4, 5, 6) * 8]

    def words(self, count: int) -> list[int]:
        return [self.draws.randrange(5000) for _ in range(count)]

    def text(self, length: int) -> list[int]:
        return [token for part in self._parts(length) for token in part][:length]

    def _parts(self, length: int) -> Iterator[list[int]]:
        for _ in range(length):
            yield self.draws.choice(self.phrases) if self.draws.random() < 0.6 else self.words(2)

    def recorded(self, length: int, depth: int = 3) -> RecordedText:
        tokens = self.text(length)
        coming = [[*tokens[at + 1 :], *self.words(depth)][:depth] for at in range(9, length - 1)]
        chains = [[one if self.draws.random() < 0.8 else one + 1 for one in chain] for chain in coming]
        probs = [0.8**level for level in range(1, depth + 1)]
        pool = CandidatePool.from_branches([Branches(chain, range(-1, depth - 1), probs) for chain in chains])
        return RecordedText(torch.tensor(tokens), 9, torch.zeros(len(chains), 1), {1: pool})


def test_no_memory_slows_the_head_down() -> None:
    """Neither one that knows many texts of the kind, nor random words, nor known contexts with wrong continuations."""
    book = Phrasebook()
    texts = [book.recorded(300) for _ in range(4)]
    known = [text.input_ids.tolist() for text in texts]
    hostile = [[*own[at - 1 : at + 1], *book.words(6)] for own in known for at in range(1, 300)]
    memories = {
        "none": [],
        "of the kind": [book.text(300) for _ in range(40)],
        "random": [book.words(300) for _ in range(40)],
        "hostile": hostile,
    }
    costs = CostTable({100: {1: 1.0, 41: 2.6}}, {1: 0.08}, {}, 0.0)
    seconds = dict[str, float]()
    for name, remembered in memories.items():
        memory, policy = SuffixMemory(), ThroughputPolicy(depth=3, top_k=1, most_nodes=16)
        memory.add(remembered)
        seconds[name] = sum(replay_policy(text, policy, costs, [memory]).seconds for text in texts)
    assert seconds["of the kind"] < 0.995 * seconds["none"]
    assert seconds["random"] < 1.005 * seconds["none"] and seconds["hostile"] < 1.03 * seconds["none"], seconds
