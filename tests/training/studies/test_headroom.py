"""The headroom study on recorded texts of a tiny target: bounds that hold whatever was recorded."""

import pytest
import torch

from tests.conftest import build_target
from training.studies import headroom
from training.studies.headroom import Corpus
from transformers_resps import DraftHead, attach
from transformers_resps.policies.costs import CostTable
from transformers_resps.replay.recorded_text import RecordedText, record_pools


TABLE = CostTable({64: {1: 1.0, 4: 1.1, 16: 1.4, 40: 2.0}}, {1: 0.04, 4: 0.07}, {}, 0.01)


@pytest.fixture(scope="module")
def texts() -> list[RecordedText]:
    torch.manual_seed(1)
    target = attach(build_target(num_hidden_layers=4))
    head = DraftHead.from_target(target, 48, feature_layers=[1, 2, 3]).eval()
    found = []
    for first in range(2):
        prompt = torch.arange(3, 11) + first
        tokens = target.generate(prompt[None], do_sample=True, max_new_tokens=40, eos_token_id=None)[0]
        looping = torch.cat([tokens, tokens[20:40]])  # so that looked-up tokens are found, and followed
        found.append(record_pools(target, head, looping, 8, depths={1: 6, 2: 6, 4: 6}, spare_room=50))
    return found


@pytest.mark.parametrize("sources", headroom.SOURCES)
def test_no_policy_beats_hindsight_over_its_own_trees(sources: str, texts: list[RecordedText]) -> None:
    positions = headroom.read_positions(texts)
    corpus = Corpus(texts, texts, ["a", "b"], positions, positions)
    rows = headroom.study(corpus, sources, TABLE)
    assert [row["benchmark"] for row in rows] == ["a", "b", "all"]
    for row in rows:
        assert row["best_fixed"] <= row["best_fixed_here"] + 1e-9 <= row["per_prompt"] + 2e-9 <= row["oracle"] + 3e-9
        assert all(row[name] > 0 for name in ("auto", "auto_fitted", "predictable"))
