"""Every published layout of a block head computes what its publisher computes, slot by slot."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from transformers_resps.drafting import Committed, DraftCall, DraftRequest
from transformers_resps.heads import BlockHead
from transformers_resps.tree import CandidatePool, TreeShape

from .blocks import CASES, Block, random_tensors, reference_outputs, reference_scores


TOKENS = torch.tensor([[1, 17, 23, 5, 42, 17, 23, 60, 9, 11]])


def drafted(head: BlockHead, target: PreTrainedModel, features: Tensor, shape: TreeShape) -> CandidatePool:
    """What it drafts after `TOKENS`, by features `[n, F]` of those before the last."""
    drafter = head.drafter(DraftCall(target))
    drafter.observe(Committed(TOKENS, features[None]))
    return drafter.draft(TOKENS[:, -1:], DraftRequest(shape))


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_a_published_head_computes_what_its_publisher_computes(
    case: Block, target: PreTrainedModel, tmp_path: Path
) -> None:
    tensors = random_tensors(case)
    case.write(tmp_path, tensors, case)
    head = BlockHead.from_pretrained(tmp_path, target=target)

    assert head.config.source is not None and head.config.source["format"] == case.format
    assert head.config.feature_layers == case.layers
    features = torch.randn(9, len(case.layers) * 32, generator=torch.Generator().manual_seed(5))
    pool = drafted(head, target, features, TreeShape(300, 9, 64))

    root, table = int(TOKENS[0, -1]), target.get_input_embeddings().weight
    outputs = reference_outputs(case, tensors, features, root, table)
    rows = tensors.get("lm_head.weight", target.get_output_embeddings().weight)
    ids = tensors["t2d"].nonzero().squeeze(-1).tolist() if case.reduced else list(range(64))
    levels = case.block_size if case.shifted else case.block_size - 1
    assert int(pool.levels[-1]) == levels
    paths: list[list[int]] = []
    wanted: dict[tuple[int, ...], float] = {(): 0.0}
    for token, parent, score in zip(
        *(part[0].tolist() for part in (pool.tokens, pool.parents, pool.scores)), strict=True
    ):
        above = paths[parent] if parent >= 0 else []
        paths.append([*above, token])
        if (*above, token) not in wanted:
            scores = reference_scores(case, tensors, outputs, rows, root, above).tolist()
            wanted |= {(*above, own): wanted[tuple(above)] + one for own, one in zip(ids, scores, strict=True)}
        assert score == pytest.approx(wanted[(*above, token)], abs=2e-3), f"after {above}"
    kept = {level: sum(len(path) == level for path in paths) for level in range(1, levels + 1)}
    assert kept[1] == min(case.top, len(ids)) and set(list(kept.values())[1:]) <= {len(ids) ** 2, 299, case.top**2}


def test_the_head_keeps_no_copy_of_what_its_target_has(target: PreTrainedModel, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == "DeepSpec DFlash")
    tensors = random_tensors(case)
    tensors["embed_tokens.weight"] = target.get_input_embeddings().weight.detach().clone()
    tensors["lm_head.weight"] = target.get_output_embeddings().weight.detach().clone()
    case.write(tmp_path, tensors, case)
    head = BlockHead.from_pretrained(tmp_path, target=target)
    assert not head.config.owns_output_head and not {"embed_tokens.weight", "lm_head.weight"} & set(head.state_dict())


def test_a_saved_head_reads_back_and_drafts_the_same(target: PreTrainedModel, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == "speculators DSpark, reduced")
    case.write(tmp_path / "published", random_tensors(case), case)
    head = BlockHead.from_pretrained(tmp_path / "published", target=target)
    head.save_pretrained(tmp_path / "ours")
    again = BlockHead.from_pretrained(tmp_path / "ours", target=target)
    features = torch.randn(9, 96)
    pools = [drafted(one, target, features, TreeShape(30, 4, 8)) for one in (head, again)]
    assert torch.equal(pools[0].tokens, pools[1].tokens) and torch.equal(pools[0].scores, pools[1].scores)
    assert again.fingerprint() == head.fingerprint()


INEXPRESSIBLE = {
    "z-lab": ("DeepSpec", "DSpark", "reduced"),
    "speculators": ("z-lab, causal", "z-lab, scales", "JetSpec", "DeepSpec", "tensors"),
}


@pytest.mark.parametrize("layout", INEXPRESSIBLE)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_head_in_another_publishers_layout_reads_back_the_same(
    case: Block, layout: str, target: PreTrainedModel, tmp_path: Path
) -> None:
    case.write(tmp_path / "published", random_tensors(case), case)
    head = BlockHead.from_pretrained(tmp_path / "published", target=target)
    if any(name in case.name for name in INEXPRESSIBLE[layout]):
        with pytest.raises(ValueError, match="This block head .*Save it in our own format"):
            head.save_pretrained(tmp_path / "theirs", format=layout)
        assert not (tmp_path / "theirs").exists()
        return
    head.save_pretrained(tmp_path / "theirs", format=layout)
    again = BlockHead.from_pretrained(tmp_path / "theirs", target=target)
    before, after = (
        {key: value for key, value in one.config.to_dict().items() if key not in ("source", "dtype", "_name_or_path")}
        for one in (head, again)
    )
    assert after == before and again.config.source == {"format": layout, "layer_ids": again.config.source["layer_ids"]}
    assert all(torch.equal(part, again.state_dict()[name]) for name, part in head.state_dict().items())


def test_an_unknown_layout_is_refused(target: PreTrainedModel, tmp_path: Path) -> None:
    CASES[0].write(tmp_path, random_tensors(CASES[0]), CASES[0])
    with pytest.raises(ValueError, match="format='specforge'.*known are z-lab, speculators"):
        BlockHead.from_pretrained(tmp_path, target=target).save_pretrained(tmp_path / "out", format="specforge")
