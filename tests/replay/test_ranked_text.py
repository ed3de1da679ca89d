"""What every shape would have emitted, against live decoding with shapes drawn at random."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from transformers_resps import DraftHead, DraftTree, TreeShape
from transformers_resps.heads import BoundHead
from transformers_resps.policies.action_grid import ActionGrid
from transformers_resps.policies.base import Observation, Policy
from transformers_resps.policies.costs import CostModel
from transformers_resps.replay import RankedText, depths_of, record_pools
from transformers_resps.replay.ranked_text import node_ranks
from transformers_resps.replay.recorded_text import PositionPools
from transformers_resps.verifying.forward import FeatureTap


PROMPT = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])
GRID = ActionGrid.from_bins((2, 3, 5, 9, 14, 30), (1, 2, 3, 4), (1, 2, 3))
LOOKING = ActionGrid((*GRID.shapes, TreeShape(1, 0, 1, 6), TreeShape(5, 3, 2, 4), TreeShape(9, 2, 3, 12)))


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


def ranked(target: PreTrainedModel, head: DraftHead, text: torch.Tensor, spare_room: int) -> RankedText:
    depths = depths_of(LOOKING)
    return RankedText.from_recording(
        record_pools(target, head, text, len(PROMPT), depths=depths, spare_room=spare_room)
    )


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
        replay = ranked(target, head, text, spare)
        assert len(replay) == len(text) - len(PROMPT) - 1
        nodes = replay.outcomes(LOOKING, SecondsPerNode()).seconds
        for (context, shape), step in zip(policy.asked, out.speculation.steps[1:], strict=True):
            place = context - replay.context_length
            assert int(replay.emitted(shape)[place]) == int(step.emitted), (context, shape)
            if len(replay) + spare - place > max(shape.lookup, shape.depth):  # otherwise cut to the room
                assert nodes[place, LOOKING.shapes.index(shape)] == step.verified, (context, shape)
            live_steps, accepted = live_steps + 1, accepted + step.accepted_total
    assert live_steps > 20 and accepted > 10 or ends_early


def test_ranks_say_what_the_longest_path_of_the_selected_tree_says(target: PreTrainedModel, head: DraftHead) -> None:
    text = target.generate(PROMPT[None], max_new_tokens=40, do_sample=False)[0]
    bound = BoundHead(head, target)
    with torch.no_grad(), FeatureTap(target, head.config.feature_layers or []) as tap, tap.record() as caught:
        target(text[None])
        pools = PositionPools(bound, caught.concatenated()[:, :-1], text[None, 1:])
        (prefixes, pool), *_ = pools.draft(torch.arange(8, 44), 3, 3)
    upcoming = torch.stack([text[prefix + 1 : prefix + 4] for prefix in prefixes])
    ranks = node_ranks(pool, upcoming, torch.arange(-1, 2).expand(upcoming.shape))
    for total in range(1, 22):
        tree = DraftTree.from_pool(text[prefixes], pool, total)
        assert (ranks[:, 2] < total - 1).int().cumprod(-1).sum(-1).tolist() == tree.drafted_match(upcoming.tolist())


def test_a_saved_recording_comes_back(target: PreTrainedModel, head: DraftHead, tmp_path: Path) -> None:
    text = target.generate(PROMPT[None], max_new_tokens=20, do_sample=False)[0]
    replay = ranked(target, head, text, 3)
    replay.save(tmp_path / "text.safetensors")
    loaded = RankedText.load(tmp_path / "text.safetensors")
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
        record_pools(target, head, PROMPT, len(PROMPT) - 1, depths=depths_of(GRID))
    with pytest.raises(ValueError, match="0 kinds of pools"):
        record_pools(target, head, PROMPT, 3, depths=depths_of(ActionGrid((TreeShape.plain(),))))
