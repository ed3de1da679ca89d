"""Pools of all positions drafted together, against those of live drafting; recordings as files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from transformers_resps import DraftHead, TreeShape
from transformers_resps.drafting import Committed, DraftRequest
from transformers_resps.drafting.level_drafter import LevelDrafter
from transformers_resps.heads import BoundHead
from transformers_resps.replay import RankedText, RecordedText, record_pools
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
                generator = LevelDrafter(bound, 1, None)
                generator.observe(Committed(text[:, 1 : prefix + 1], features[:, :prefix]))
                alone = generator.draft(NEWEST, DraftRequest(TreeShape(9, 4, 3)))
                assert torch.equal(pool.tokens[row], alone.tokens[0])
                assert torch.equal(pool.parents[row], alone.parents[0])
                torch.testing.assert_close(pool.scores[row], alone.scores[0])


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
