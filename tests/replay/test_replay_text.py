"""Replay against live decoding, and the oracle against trying everything."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from tests.targets import Architecture
from transformers_resps import DraftHead, DraftTree, TreeShape, attach
from transformers_resps.drafting.head_drafter import TreeCandidateGenerator
from transformers_resps.heads import BoundHead
from transformers_resps.policies import ActionGrid, CostModel, Observation, Policy
from transformers_resps.replay.outcomes import Oracle, OutcomeTable, TextOutcomes
from transformers_resps.replay.recorded_text import PositionPools, RecordedText, record_pools
from transformers_resps.replay.replay_text import ReplayText, path_ranks, record_text
from transformers_resps.verifying.forward import FeatureTap


PROMPT = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])
GRID = ActionGrid.from_bins((2, 3, 5, 9, 14, 30), (1, 2, 3, 4), (1, 2, 3))
LOOKING = ActionGrid((*GRID.shapes, TreeShape(1, 0, 1, 6), TreeShape(5, 3, 2, 4), TreeShape(9, 2, 3, 12)))


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return attach(Architecture("llama").build("sdpa"))


@pytest.fixture(scope="module", params=[None, 12])
def head(target: PreTrainedModel, request: pytest.FixtureRequest) -> DraftHead:
    torch.manual_seed(1)
    return DraftHead.from_target(target, draft_vocab_size=request.param).double().eval()


class SecondsPerNode(CostModel):
    """A second a node, and more the longer the text is."""

    overhead = 0.0

    def __init__(self, per_position: float = 0.0) -> None:
        self.per_position = per_position

    def verify_seconds(self, nodes: int, context: int) -> float:
        return nodes + context * self.per_position

    def draft_seconds(self, width: int, levels: int) -> float:
        return 0.0


class Drawn(Policy):
    """Another shape at every step; remembers where it asked for which."""

    def __init__(self, grid: ActionGrid, seed: int) -> None:
        self.asked: list[tuple[int, TreeShape]] = []
        self._grid, self._generator = grid, torch.Generator().manual_seed(seed)

    def choose(self, observation: Observation) -> TreeShape:
        shape = self._grid[int(torch.randint(len(self._grid), (1,), generator=self._generator))]
        self.asked.append((observation.context_length, shape))
        return shape


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("ends_early", [False, True])
def test_replayed_and_live_steps_agree_for_random_shapes(
    target: PreTrainedModel, head: DraftHead, do_sample: bool, ends_early: bool
) -> None:
    live_steps, accepted = 0, 0
    for seed in range(3):
        policy = Drawn(LOOKING, seed)
        torch.manual_seed(seed)
        out = target.generate(
            PROMPT[None],
            assistant_model=head,
            policy=policy,
            do_sample=do_sample,
            max_new_tokens=60,
            eos_token_id=7 if ends_early else None,
            return_dict_in_generate=True,
        )
        text = out.sequences[0]
        if len(text) < len(PROMPT) + 2:
            continue
        spare = len(PROMPT) + 60 - len(text)
        replay = record_text(target, head, text, len(PROMPT), grid=LOOKING, spare_room=spare)
        assert len(replay) == len(text) - len(PROMPT) - 1
        nodes = replay.outcomes(LOOKING, SecondsPerNode()).seconds
        for (context, shape), step in zip(policy.asked, out.speculation.steps[1:], strict=True):
            place = context - replay.context_length
            assert int(replay.emitted(shape)[place]) == int(step.emitted), (context, shape)
            if len(replay) + spare - place > max(shape.lookup, shape.depth):  # otherwise cut to the room
                assert nodes[place, LOOKING.index_of(shape)] == step.verified, (context, shape)
            live_steps, accepted = live_steps + 1, accepted + step.accepted_total
    assert live_steps > 20 and accepted > 10 or ends_early


def test_pools_drafted_together_are_those_of_live_drafting(target: PreTrainedModel, head: DraftHead) -> None:
    text = torch.randint(19, (1, 40), generator=torch.Generator().manual_seed(5))
    bound = BoundHead(head, target)
    with torch.no_grad(), FeatureTap(target, head.config.feature_layers or []) as tap, tap.record() as caught:
        target(text)
        features = caught.concatenated()
        pools = PositionPools(bound, features[:, :-1], text[:, 1:])
        together = list(pools.draft(torch.arange(8, 39), 3, 4))
        for prefixes, pool in together:
            for row, prefix in enumerate(prefixes.tolist()):
                generator = TreeCandidateGenerator(bound, 1, None)
                generator.observe(features[:, :prefix], text[:, 1 : prefix + 1])
                alone = generator.draft(TreeShape(9, 4, 3), Drawn(GRID, 0))
                assert torch.equal(pool.tokens[row], alone.tokens[0])
                assert torch.equal(pool.parents[row], alone.parents[0])
                torch.testing.assert_close(pool.scores[row], alone.scores[0])


def test_ranks_say_what_the_longest_path_of_the_selected_tree_says(target: PreTrainedModel, head: DraftHead) -> None:
    text = target.generate(PROMPT[None], max_new_tokens=40, do_sample=False)[0]
    bound = BoundHead(head, target)
    with torch.no_grad(), FeatureTap(target, head.config.feature_layers or []) as tap, tap.record() as caught:
        target(text[None])
        pools = PositionPools(bound, caught.concatenated()[:, :-1], text[None, 1:])
        (prefixes, pool), *_ = pools.draft(torch.arange(8, 44), 3, 3)
    upcoming = torch.stack([text[prefix + 1 : prefix + 4] for prefix in prefixes])
    ranks = path_ranks(pool, upcoming)
    for total in range(1, 22):
        tree = DraftTree.from_pool(text[prefixes], pool, total)
        assert (ranks[:, 2] < total - 1).int().cumprod(-1).sum(-1).tolist() == tree.drafted_match(upcoming.tolist())


@pytest.mark.parametrize("damage", ["cut", "no metadata", "other tensors", "older", "missing"])
@pytest.mark.parametrize("kind", [ReplayText, RecordedText])
def test_files_that_are_no_recordings_are_refused(
    kind: Any, damage: str, target: PreTrainedModel, head: DraftHead, tmp_path: Path
) -> None:
    pools = record_pools(target, head, torch.arange(3, 17), 8, depths={2: 2})
    file = tmp_path / "text.safetensors"
    (pools if kind is RecordedText else ReplayText.from_recording(pools)).save(file)
    assert len(kind.load(file)) == 5
    with safe_open(file, "pt") as opened:
        tensors, metadata = {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()  # noqa: SIM118
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:500])
    elif damage == "no metadata":
        save_file(tensors, file)
    elif damage == "other tensors":
        save_file({"weight": torch.ones(2)}, file, metadata)
    elif damage == "older":
        save_file(
            {name: held for name, held in tensors.items() if name not in ("chain_ranks", "scores.2")}, file, metadata
        )
    else:
        file.unlink()
    with pytest.raises(ValueError, match="is no recording that this release can read .*Delete it and record"):
        kind.load(file)


def test_a_saved_recording_comes_back(target: PreTrainedModel, head: DraftHead, tmp_path: Path) -> None:
    text = target.generate(PROMPT[None], max_new_tokens=20, do_sample=False)[0]
    replay = record_text(target, head, text, len(PROMPT), grid=LOOKING, spare_room=3)
    replay.save(tmp_path / "text.safetensors")
    loaded = ReplayText.load(tmp_path / "text.safetensors")
    for shape in LOOKING.shapes:
        assert torch.equal(loaded.emitted(shape), replay.emitted(shape))
    assert torch.equal(loaded.features, replay.features) and loaded.spare_room == 3
    costs = loaded.outcomes(GRID, SecondsPerNode(per_position=0.001))
    assert costs.seconds[0].tolist() == [shape.total_tokens for shape in GRID.shapes]
    assert costs.seconds[-1, 0] == pytest.approx(1 + 16 / 1000)
    with pytest.raises(ValueError, match=r"recorded for top_k \[1, 2, 3\] and up to 4 levels. Record it again"):
        replay.emitted(TreeShape(9, 5, 2))


def test_a_text_without_a_step_is_refused(target: PreTrainedModel, head: DraftHead) -> None:
    with pytest.raises(ValueError, match="two tokens of answer"):
        record_text(target, head, PROMPT, len(PROMPT) - 1, grid=GRID)
    with pytest.raises(ValueError, match="0 kinds of pools"):
        record_text(target, head, PROMPT, 3, grid=ActionGrid((TreeShape.plain(),)))


def random_table(seed: int, texts: int, actions: int, length: int) -> OutcomeTable:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(texts):
        left = length - torch.arange(length)[:, None]
        emitted = torch.randint(1, 4, (length, actions), generator=generator).minimum(left)
        made.append(
            TextOutcomes(torch.zeros(length, 1), emitted, 0.5 + torch.rand(length, actions, generator=generator))
        )
    return OutcomeTable(made)


def try_everything(table: OutcomeTable, text: int, choices: tuple[int, ...]) -> float:
    place, stop, seconds = int(table.starts[text]), int(table.stops[text]), 0.0
    for action in itertools.chain(choices, itertools.repeat(choices[-1])):
        if place >= stop:
            return seconds
        seconds, place = seconds + float(table.seconds[place, action]), place + int(table.emitted[place, action])
    raise AssertionError


def test_the_oracle_equals_trying_every_sequence_of_actions() -> None:
    table = random_table(0, texts=3, actions=3, length=7)
    oracle = Oracle(table)
    for text in range(3):
        every = [try_everything(table, text, choices) for choices in itertools.product(range(3), repeat=7)]
        assert float(oracle.best_seconds[text]) == pytest.approx(min(every))
        fixed = [try_everything(table, text, (action,)) for action in range(3)]
        assert oracle.fixed_seconds[text].tolist() == pytest.approx(fixed)
    headroom = oracle.headroom()
    assert headroom.tokens == 21 and headroom.fixed_seconds == pytest.approx(float(oracle.fixed_seconds.sum(0).min()))
    assert headroom.oracle_seconds <= headroom.per_text_seconds <= headroom.fixed_seconds
    assert oracle.headroom(fixed=0).fixed_seconds == pytest.approx(float(oracle.fixed_seconds[:, 0].sum()))


def test_held_outcomes_are_those_of_single_steps_in_a_row() -> None:
    table = random_table(1, texts=2, actions=2, length=9)
    held = table.held(3)
    for place, action in itertools.product(range(18), range(2)):
        here, stop, steps = place, 9 if place < 9 else 18, []
        while here < stop and len(steps) < 3:
            steps.append((int(table.emitted[here, action]), float(table.seconds[here, action])))
            here += steps[-1][0]
        assert float(held.emitted[place, action]) == sum(tokens for tokens, _ in steps)
        assert float(held.seconds[place, action]) == pytest.approx(sum(seconds for _, seconds in steps))
        rates = [tokens / seconds for tokens, seconds in steps]
        assert float(held.mean_rates[place, action]) == pytest.approx(sum(rates) / len(rates))
