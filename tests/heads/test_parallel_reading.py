"""P-EAGLE heads in both publishers' layouts: one pass over pairs and placeholders, slot by slot, and the text."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.conftest import build_target
from transformers_resps import AutoDraftHead, FixedPolicy, TreeShape, attach
from transformers_resps.drafting import Committed, DraftCall, DraftRequest
from transformers_resps.heads import DraftHead

from .cases import FLAT, LLAMA3, nested
from .published import LAYERS, H, Published, V, _fuse, _layers, _rms, random_tensors, rename, save, write_config


MASK, K = 61, 5
TOKENS = torch.tensor([[1, 17, 23, 5, 42, 17, 23, 60, 9, 11]])
SHAPE = TreeShape(60, K, 6)


def amazon(folder: Path, tensors: dict[str, Tensor], case: Published) -> None:
    write_config(folder, case.config)
    save(folder, rename(tensors, "t2d") | {"d2t": torch.zeros(V, dtype=torch.long)})


def speculators(folder: Path, tensors: dict[str, Tensor], case: Published) -> None:
    write_config(folder, case.config)
    save(folder, rename(tensors, midlayer="layers.0"))


DEEP = {"num_hidden_layers": 3, "rope_theta": 5e5, "rope_scaling": LLAMA3}
AMAZON = {**FLAT, **DEEP, "draft_vocab_size": V, "head_dim": 8, "parallel_drafting": True, "ptd_token_id": MASK}
PEAGLE: dict[str, Any] = {
    **nested({"num_hidden_layers": 2}, architectures=["PEagleDraftModel"], speculators_model_type="peagle"),
    "mask_token_id": MASK,
    "embed_requires_grad": True,
}
PEAGLE["speculators_config"] |= {"algorithm": "peagle", "proposal_methods": [{"speculative_tokens": K}]}
CASES = [
    Published(
        "amazon",
        amazon,
        {**AMAZON, "architectures": ["LlamaForCausalLMEagle3"]},
        format="specforge",
        extra_layers=2,
        full_vocabulary=True,
        theta=5e5,
        llama3=True,
    ),
    Published("speculators", speculators, PEAGLE, format="speculators", extra_layers=1),
    Published(
        "speculators, normed",
        speculators,
        {**PEAGLE, "fc_norm": True, "norm_before_residual": True},
        format="speculators",
        extra_layers=1,
        fc_norm=True,
        norm_before_residual=True,
    ),
]


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return attach(build_target(num_hidden_layers=LAYERS, initializer_range=0.3))


def written(case: Published, folder: Path) -> dict[str, Tensor]:
    """Its tensors, as `case` writes them."""
    generator = torch.Generator().manual_seed(1)
    feature = torch.randn(1, 1, len(case.layers) * H, generator=generator).to(case.dtype)
    tensors = random_tensors(case) | {"mask_hidden": feature}
    case.write(folder, tensors, case)
    return tensors


def reference_rows(case: Published, tensors: dict[str, Tensor], features: Tensor, count: int) -> list[Tensor]:
    """Log probabilities `[V or D]` of the next `count` tokens, by one pass over pairs and placeholders."""
    w = {name: tensor.float() for name, tensor in tensors.items()}
    states = torch.cat([features, w["mask_hidden"][0].expand(count - 1, -1)])
    embedded = w["embed_tokens.weight"][[*TOKENS[0, 1:].tolist(), *[MASK] * (count - 1)]]
    memory: list[Any] = [None] * (1 + case.extra_layers)
    outputs = _layers(case, w, _fuse(case, w, states), embedded, 0, memory)
    logits = _rms(outputs, w["norm.weight"]) @ w["lm_head.weight"].T
    return list(logits[-count:].log_softmax(-1))


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_each_slot_says_what_its_publisher_computes(case: Published, target: PreTrainedModel, tmp_path: Path) -> None:
    tensors = written(case, tmp_path)
    head: Any = AutoDraftHead.from_pretrained(
        tmp_path, target, **({} if "spec" in case.name else {"parallel_levels": K})
    )
    assert isinstance(head, DraftHead) and head.config.source is not None
    assert (head.config.source["format"], head.config.feature_layers) == (case.format, case.layers)
    features = torch.randn(1, 9, len(case.layers) * H, generator=torch.Generator().manual_seed(5))
    rows = reference_rows(case, tensors, features[0], K)
    ids = list(range(V)) if case.full_vocabulary else tensors["t2d"].nonzero().squeeze(-1).tolist()
    for cuts in ([9], [4, 1, 1, 3]):
        drafter, start = head.drafter(DraftCall(target)), 0
        for count in cuts:
            drafter.observe(Committed(TOKENS[:, start + 1 : start + 1 + count], features[:, start : start + count]))
            start += count
            drafter.read()
        for depth in (K, 1, 3):
            pool = drafter.draft(TOKENS[:, -1:], DraftRequest(TreeShape(60, depth, 6)))
            assert int(pool.levels[-1]) == depth
            nodes = (part[0].tolist() for part in (pool.tokens, pool.parents, pool.scores))
            for place, (token, parent, score) in enumerate(zip(*nodes, strict=True)):
                own = float(rows[int(pool.levels[place]) - 1][ids.index(token)])
                above = float(pool.scores[0, parent]) if parent >= 0 else 0.0
                assert score == pytest.approx(above + own, abs=2e-3)


def text_of(target: PreTrainedModel, **options: Any) -> list[list[int]]:
    torch.manual_seed(7)
    ids = torch.tensor([[1, 17, 23, 5, 42, 17, 23], [0, 0, 9, 8, 7, 6, 5]])
    call = {"attention_mask": (ids > 0).long(), "max_new_tokens": 20, "pad_token_id": 0}
    found: list[list[int]] = target.generate(ids, **call, **options).tolist()
    return found


@pytest.mark.parametrize("call", [{"do_sample": False}, {"do_sample": True, "top_p": 0.9, "repetition_penalty": 1.3}])
def test_the_text_is_that_of_plain_generate(call: dict[str, Any], target: PreTrainedModel, tmp_path: Path) -> None:
    written(CASES[1], tmp_path)
    head, plain = DraftHead.from_pretrained(tmp_path, target=target), text_of(target, **call)
    for policy in (None, "auto", FixedPolicy(TreeShape(24, 3, 8, lookup=4))):
        assert text_of(target, **call, assistant_model=head, policy=policy) == plain


@torch.no_grad()
def test_a_saved_head_drafts_the_same(target: PreTrainedModel, tmp_path: Path) -> None:
    written(CASES[1], tmp_path / "published")
    head = DraftHead.from_pretrained(tmp_path / "published", target=target)
    head.save_pretrained(tmp_path / "ours")
    again = DraftHead.from_pretrained(tmp_path / "ours", target=target)
    assert again.default_shape == TreeShape(33, K, 8)
    features, pools = torch.randn(1, 9, head.config.features_width), []
    for one in (head, again):
        drafter = one.drafter(DraftCall(target))
        drafter.observe(Committed(TOKENS[:, 1:], features))
        pools.append(drafter.draft(TOKENS[:, -1:], DraftRequest(SHAPE)))
    assert torch.equal(pools[0].tokens, pools[1].tokens) and torch.equal(pools[0].scores, pools[1].scores)
    with pytest.raises(ValueError, match="P-EAGLE head, which is read but not written"):
        head.save_pretrained(tmp_path / "theirs", format="speculators")
    with pytest.raises(ValueError, match="P-EAGLE head.*neither be trained nor diagnosed"):
        head.bind(target, head)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"mask_token_id": None}, "states no `mask_token_id`. Pass `mask_token_id=`"),
        ({"mask_token_id": V}, f"mask_token_id={V} .*a token from 0 to {V - 1}"),
    ],
)
def test_placeholders_that_cannot_be_are_refused(
    fields: dict[str, Any], reason: str, target: PreTrainedModel, tmp_path: Path
) -> None:
    case = Published("wrong", speculators, {**PEAGLE, **fields}, format="speculators", extra_layers=1)
    written(case, tmp_path)
    with pytest.raises(ValueError, match=reason):
        DraftHead.from_pretrained(tmp_path, target=target)
