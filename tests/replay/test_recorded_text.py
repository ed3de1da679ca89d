"""Pools of all positions drafted together, against those of live drafting; recordings as files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from tests.conftest import build_target
from tests.drafting.test_block_drafter import KINDS, block_head
from transformers_resps import DraftHead, FixedPolicy, TreeShape, attach
from transformers_resps.drafting import Committed, DraftRequest
from transformers_resps.drafting.model_drafter import ModelDrafter
from transformers_resps.heads import BoundHead
from transformers_resps.policies.action_grid import ActionGrid
from transformers_resps.policies.costs import CostTable
from transformers_resps.replay import RankedText, RecordedText, record_pools, replay_policy
from transformers_resps.replay.recorded_text import PositionPools
from transformers_resps.verifying.forward import FeatureTap


NEWEST = torch.empty(0)  # levels are drafted from what was observed


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
                generator = ModelDrafter(bound, 1, None)
                generator.observe(Committed(text[:, 1 : prefix + 1], features[:, :prefix]))
                alone = generator.draft(NEWEST, DraftRequest(TreeShape(9, 4, 3)))
                assert torch.equal(pool.tokens[row], alone.tokens[0])
                assert torch.equal(pool.parents[row], alone.parents[0])
                torch.testing.assert_close(pool.scores[row], alone.scores[0])


BLOCK_SHAPES = (TreeShape(5, 4, 1), TreeShape(12, 3, 5), TreeShape(7, 4, 5, 3), TreeShape(65, 4, 5))


@pytest.mark.parametrize("kind", ["in place", "rnn"])
def test_a_block_head_decodes_a_recording_as_it_decoded_live(kind: str, tmp_path: Path) -> None:
    target: Any = attach(build_target(initializer_range=0.3))
    head, prompt = block_head(target, **KINDS[kind]), torch.tensor([[1, 17, 23, 5, 42, 17, 23]])
    call = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False}
    text = target.generate(prompt, **call)[0]
    recorded = record_pools(target, head, text, 7, depths={1: 4, 5: 4})
    recorded.save(tmp_path / "text.safetensors")
    recorded = RecordedText.load(tmp_path / "text.safetensors")
    table = CostTable({1: {1: 1.0}}, {1: 1.0}, {})
    emitted = RankedText.from_recording(recorded).outcomes(ActionGrid(BLOCK_SHAPES), table).emitted
    for action, shape in enumerate(BLOCK_SHAPES):
        options = {"assistant_model": head, "policy": FixedPolicy(shape), "return_dict_in_generate": True}
        live = target.generate(prompt, **call, **options).speculation
        again = replay_policy(recorded, FixedPolicy(shape), table)
        told = [(step.emitted_total, step.drafted, step.verified) for step in live.steps[1:]]
        assert [(step.emitted_total, step.verified) for step in again.steps] == [
            (one, nodes) for one, _, nodes in told
        ]
        place = 0
        for count, _, _ in told:
            assert emitted[place, action] == count
            place += count
    for shape in (TreeShape(66, 4, 5), TreeShape(5, 4, 2)):
        with pytest.raises(ValueError, match=r"top_k \[1, 5\] and up to 4 levels and 64 nodes. Record it again"):
            replay_policy(recorded, FixedPolicy(shape), table)
        with pytest.raises(ValueError, match=r"up to 4 levels and 64 nodes"):
            RankedText.from_recording(recorded).emitted(shape)


@pytest.mark.parametrize("damage", ["cut", "no metadata", "other tensors", "older", "missing"])
@pytest.mark.parametrize("kind", [RankedText, RecordedText])
def test_files_that_are_no_recordings_are_refused(
    kind: Any, damage: str, target: PreTrainedModel, head: DraftHead, tmp_path: Path
) -> None:
    pools = record_pools(target, head, torch.arange(3, 17), 8, depths={2: 2})
    file = tmp_path / "text.safetensors"
    (pools if kind is RecordedText else RankedText.from_recording(pools)).save(file)
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
            {name: held for name, held in tensors.items() if name not in ("looked_up_ranks", "scores.2")},
            file,
            metadata,
        )
    else:
        file.unlink()
    with pytest.raises(ValueError, match="is no recording that this release can read .*Delete it and record"):
        kind.load(file)
