"""The prices of the offline studies, against decoding again with the same prices."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from training.studies import step_costs
from transformers_resps import DraftHead, FixedPolicy, TreeShape, attach
from transformers_resps.policies.action_grid import ActionGrid
from transformers_resps.policies.costs import CostTable
from transformers_resps.replay import Oracle, record_pools, replay_policy


PROMPT = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])
VERIFY, LEVEL, START = {64: {1: 1.0, 4: 1.3, 16: 2.0, 40: 5.0}}, {1: 0.04, 4: 0.07}, {1: 0.2, 4: 0.3}
TABLE = CostTable(VERIFY, LEVEL, {}, 0.01, draft_start=START)
SHAPES = (TreeShape.plain(), TreeShape(1, 0, 1, 5), TreeShape(6, 3, 4), TreeShape(6, 3, 4, 4), TreeShape(3, 2, 1, 6))


def test_a_fixed_shape_takes_as_long_on_the_table_as_when_it_decodes_the_text_again(
    tiny_target: PreTrainedModel, tiny_head: DraftHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    attach(tiny_target)
    tokens = tiny_target.generate(PROMPT[None], do_sample=True, max_new_tokens=60, eos_token_id=None)[0]
    looping = torch.cat([tokens, tokens[20:60], tokens[20:40]])  # so that looked-up nodes are found, and followed
    text = record_pools(tiny_target, tiny_head, looping, len(PROMPT), depths={1: 6, 4: 6}, spare_room=50)
    table = step_costs.outcome_table([text], ActionGrid(SHAPES), TABLE)
    for shape, seconds in zip(SHAPES, Oracle(table).fixed_seconds[0].tolist(), strict=True):
        report = replay_policy(text, FixedPolicy(shape), TABLE)
        assert seconds == pytest.approx(report.seconds), str(shape)
    merged = [step.verified for step in replay_policy(text, FixedPolicy(SHAPES[3]), TABLE).steps]
    assert len(set(merged)) > 2, "nodes that both propose are shared at some steps and not at others"
    sys.modules.pop("positions", None)


def test_the_start_of_drafts_is_read_where_a_file_tells_it(tmp_path: Path) -> None:
    told = {"verify": VERIFY, "draft": LEVEL, "overhead": 0.01}
    for name, more in (("older", {}), ("newer", {"draft_start": START})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps({"costs": told | more}))
    tables = step_costs.read_tables([tmp_path / name / "results.json" for name in ("older", "newer")])
    assert tables["newer"] == TABLE and tables["older"].draft_start == {}
