"""What block heads learn from a batch, against a loop over anchors, slots and tokens."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.conftest import build_target
from tests.heads.blocks import CASES, LAYERS, Block, random_tensors, reference_outputs, reference_scores
from tests.trainers.heads import config
from transformers_resps import BlockHead
from transformers_resps.trainers.features import FrozenTarget, TargetFeatures
from transformers_resps.trainers.objectives import BlockObjective, draw_anchors


LEVELS, DECAY = 3, 0.7
TOKENS = torch.tensor([[1, 17, 23, 5, 42, 17, 23, 60, 9, 11, 8, 30, 31], [1, 9, 30, 31, 5, 6, 7, 42, 0, 0, 0, 0, 0]])
PREDICTED = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0]]).bool()
NAMES = ("DeepSpec DFlash", "DeepSpec DSpark gated", "speculators DSpark rnn, in place")
NAMES += ("speculators DSpark, reduced", "DFlash 2, z-lab")


def textbook(
    case: Block, w: dict[str, Tensor], read: TargetFeatures, logits: Tensor, rows: Tensor, table: Tensor
) -> Tensor:
    """Loss of all blocks, with what the target makes of the texts; `rows` are the output head's."""
    ids = w["t2d"].nonzero().squeeze(-1) if case.reduced else torch.arange(len(rows))
    total = torch.zeros(())
    for text, predicted, features, picks, wants in zip(
        TOKENS, PREDICTED, read.features, read.picks, logits, strict=True
    ):
        for anchor in range(len(text) - 1):
            if not (predicted[anchor] and predicted[anchor + 1]):
                continue
            root = int(text[anchor])
            outputs = reference_outputs(case, w, features[:anchor], root, table)
            for level in range(LEVELS):
                place = anchor + 1 + level
                if place >= len(text) or not predicted[place]:
                    break
                if int(picks[place - 1]) not in ids.tolist():
                    continue
                wanted, path = wants[place - 1][ids].softmax(-1), text[anchor + 1 : place].tolist()
                total = total + DECAY**level * of_slot(case, w, outputs, rows, root, path, wanted)
    return total


def of_slot(
    case: Block, w: dict[str, Tensor], outputs: Tensor, rows: Tensor, root: int, path: list[int], wanted: Tensor
) -> Tensor:
    sure = reference_scores(case, w, outputs, rows, root, path)
    scores = reference_scores(replace(case, confidence=""), w, outputs, rows, root, path)
    if case.correction == "selector":
        base = replace(case, correction="none", top=len(rows))
        kept = scores > -math.inf
        selected = -(wanted[kept] * scores[kept].log_softmax(-1)).sum()
        return selected - (wanted * reference_scores(base, w, outputs, rows, root, path)).sum()
    loss = -(wanted * scores).sum()
    if case.confidence:
        shared, log_sure = torch.minimum(scores.exp(), wanted).sum(), (sure - scores)[0]
        loss = loss - shared * log_sure - (1 - shared) * torch.log1p(-log_sure.exp())
    return loss


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_of_blocks_is_that_of_each_slot_alone(name: str, tmp_path: Path) -> None:
    """The reference is given the features before the anchor alone, and one block at a time."""
    case = next(case for case in CASES if case.name == name)
    target, tensors = build_target(num_hidden_layers=LAYERS, initializer_range=0.3, seed=2), random_tensors(case)
    case.write(tmp_path, tensors, case)
    head = BlockHead.from_pretrained(tmp_path, target=target).eval()
    frozen = FrozenTarget(target, head.feature_layers)
    read = frozen.run(TOKENS)
    read.picks[:, ::2] = head.draft_token_ids[0]  # others may lie outside a draft vocabulary
    args = config(tmp_path, ttt_steps=LEVELS, ttt_step_decay=DECAY, loss_chunk_size=3)
    found = BlockObjective(frozen, args)(head, head, TOKENS, PREDICTED, read)
    own = target.get_output_embeddings().weight
    with torch.no_grad():
        rows, table = tensors.get("lm_head.weight", own), target.get_input_embeddings().weight
        expected = textbook(case, tensors, read, read.hidden @ own.T, rows, table)
    torch.testing.assert_close(found.total, expected, atol=1e-3, rtol=1e-4)
    assert expected > 1
    assert found.predicted.tolist() == [9, 6, 3]  # blocks end with their answer
    found.total.backward()
    parts = {"candidate_selector", "markov_head", "confidence_head", "fc", "layers"}
    assert all(
        parameter.grad is not None and parameter.grad.any()
        for part, parameter in head.named_parameters()
        if part.split(".")[0] in parts
    )


def test_anchors_are_drawn_where_two_tokens_in_a_row_are_learned_from() -> None:
    everywhere, kept = draw_anchors(PREDICTED, 1.0)
    assert [sorted(row[own].tolist()) for row, own in zip(everywhere, kept, strict=True)] == [
        [3, 4, 5, 6, 9, 10, 11],
        [2, 3],
    ]
    drawn = set()
    for _ in range(60):
        anchors, kept = draw_anchors(PREDICTED, 0.5)
        assert anchors.shape == (2, 4) and kept.sum(-1).tolist() == [4, 1]
        drawn |= {int(anchor) for anchor in anchors[0]}
        assert len(set(anchors[0].tolist())) == 4 and int(anchors[1, 0]) in (2, 3)
    assert drawn == {3, 4, 5, 6, 9, 10, 11}
    anchors, kept = draw_anchors(torch.zeros(2, 5, dtype=torch.bool), 0.5)
    assert anchors.shape == (2, 1) and not kept.any()
