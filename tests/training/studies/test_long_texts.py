"""The study of long texts: what its arms see, and the command on a tiny target."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.tools.conversations import save_models, save_rows
from training.studies import long_texts
from training.studies.long_texts import Arm, Drafts, Text, main, walked
from transformers_resps import DraftHead, FixedPolicy, TreeShape
from transformers_resps.drafting.level_drafter import LevelDrafter
from transformers_resps.heads import BoundHead
from transformers_resps.tree import DraftTree


TREE = TreeShape(9, 3, 3)


@pytest.mark.parametrize("arm", [Arm(), Arm(6), Arm(6, 2, near=True), Arm(6, 2)], ids=str)
@torch.no_grad()
def test_an_arm_drafts_what_a_head_drafts_that_reads_what_it_sees(
    tiny_target: PreTrainedModel, tiny_head: DraftHead, arm: Arm
) -> None:
    """First tokens at near positions are a text of their own with the newest ones; at true ones another text."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(64, (31,), generator=generator)
    features = torch.randn(1, 30, tiny_head.config.features_width, generator=generator)
    bound = BoundHead(tiny_head, tiny_target)
    roots = torch.tensor([3, 7, 8, 20, 30])
    trees = Drafts(bound, Text(tokens, features, [])).pools(roots, arm, TREE)
    agreed = []
    for row, root in enumerate(roots.tolist()):
        oldest = max(0, root - (arm.window or root))
        seen = [*range(min(arm.sinks, oldest)), *range(oldest, root)]
        drafter = LevelDrafter(bound, 1, None)
        drafter.observe(tokens[None, 1:][:, seen], features[:, seen])
        expected = DraftTree.from_pool(tokens[None, root], drafter.draft(TREE, FixedPolicy(TREE)), TREE.total_tokens)
        agreed.append(torch.allclose(trees.scores[row], expected.scores[0], atol=1e-5))
    assert agreed == ([True] * 3 + [False] * 2 if arm.sinks and not arm.near else [True] * 5)


def test_an_answer_is_walked_in_steps_that_end_with_it() -> None:
    assert walked([2, 0, 0, 1, 5, 3]) == (6, 3)


def test_the_command_goes_on_where_it_ended_and_counts_every_answer(
    tmp_path: Path,
    tiny_target: PreTrainedModel,
    tiny_head: DraftHead,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(long_texts, "LONG", 5)
    monkeypatch.setattr(long_texts, "DOCUMENTS", (4,))
    target, head = save_models(tmp_path, tiny_target, tiny_head)
    file = save_rows(tmp_path / "mine.jsonl", [["defgdefg", "kl"], ["klkl"], ["qrstqrst"]])
    options = ["--dataset", file, "--tokens", "4", "--shape", "9,3,3", "--output", str(tmp_path / "texts.json")]
    command = [target, head, *options, "--chats", "1", "--documents"]
    assert main([*command, "0"]) == main([*command, "1"]) == 0
    found: dict[str, Any] = json.loads((tmp_path / "texts.json").read_text())
    assert {name: len(turns) for name, turns in found["texts"].items()} == {"chat 0": 4, "documents 0": 1}
    for turns in found["texts"].values():
        contexts = [turn["context"] for turn in turns]
        assert contexts == sorted(set(contexts)) and all(1 <= len(turn["all"]) <= 3 for turn in turns)
    assert "| chat | newest 256 |" in capsys.readouterr().out
