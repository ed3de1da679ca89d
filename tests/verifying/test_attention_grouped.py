"""Heads that share keys attend without copies of them, and nothing else changes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache, PreTrainedModel
from transformers.integrations import sdpa_attention

from transformers_resps import DraftHead, FixedPolicy, TreeShape, attach
from transformers_resps.compat import CACHE_KEYWORD
from transformers_resps.compilation import native as native_module
from transformers_resps.tree import DraftTree
from transformers_resps.verifying import attention
from transformers_resps.verifying.attention import GROUPED, attend, grouped_attention, stacked, use_gqa_attention
from transformers_resps.verifying.masks import tree_attention_mask, tree_positions


def tree_logits(target: PreTrainedModel, batch_size: int) -> Tensor:
    """Of a tree of five nodes after seventy positions: more than one block of PyTorch's kernel."""
    generator = torch.Generator().manual_seed(3)
    prompt = torch.randint(3, 64, (batch_size, 70), generator=generator)
    parents = torch.tensor([[0, 0, 0, 1, 2]]).expand(batch_size, -1)
    tree = DraftTree.from_parents(torch.randint(3, 64, (batch_size, 5), generator=generator), parents)
    cache: Any = DynamicCache(config=target.config)
    target(input_ids=prompt, use_cache=True, **{CACHE_KEYWORD: cache})
    mask = tree_attention_mask(target.config, cache, None, tree, target.dtype)
    positions = tree_positions(tree, 70)
    return target(  # type: ignore[no-any-return]
        input_ids=tree.tokens, attention_mask=mask, position_ids=positions, use_cache=True, **{CACHE_KEYWORD: cache}
    ).logits


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma3_text"])
def test_the_logits_of_a_tree_are_the_same_but_for_rounding(
    make_target: Callable[..., PreTrainedModel], model_type: str, dtype: torch.dtype, close: float, batch_size: int
) -> None:
    target = make_target(model_type).to(dtype)
    stock = tree_logits(target, batch_size)
    with use_gqa_attention(target):
        torch.testing.assert_close(tree_logits(target, batch_size), stock, rtol=close, atol=close)


@pytest.mark.parametrize("count", [5, 1])
@pytest.mark.parametrize("mask_of", ["nothing", "numbers", "bools", "bools for each head that shares"])
@pytest.mark.parametrize(("heads", "shared"), [(6, 2), (4, 1), (3, 3)])
def test_heads_that_share_keys_see_what_pytorch_shows_them(heads: int, shared: int, mask_of: str, count: int) -> None:
    generator = torch.Generator().manual_seed(4)
    query = torch.randn(2, heads, count, 8, generator=generator, dtype=torch.float64)
    key, value = torch.randn(2, 2, shared, 9, 8, generator=generator, dtype=torch.float64)
    shown = torch.rand(2, 1, count, 9, generator=generator) < 0.6
    shown[..., 0] = True
    numbers = torch.zeros(shown.shape, dtype=torch.float64).masked_fill(~shown, float("-inf"))
    stock = {"nothing": None, "numbers": numbers}.get(mask_of, shown)
    mask = shown.expand(-1, heads // shared, -1, -1) if mask_of.endswith("shares") else stock
    for scaling in (None, 0.3):
        options = {"enable_gqa": True, "scale": scaling}
        expected = functional.scaled_dot_product_attention(query, key, value, attn_mask=stock, **options)
        found = attend(query, key, value, mask, scaling=scaling)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("padding", [0, 2])
def test_a_lone_token_attends_so_too(
    make_target: Callable[..., PreTrainedModel], padding: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = make_target("llama").double()
    tokens = torch.arange(3, 43).reshape(2, 20)
    mask = torch.ones_like(tokens)
    mask[0, :padding] = 0
    stock, found = DynamicCache(config=target.config), DynamicCache(config=target.config)
    for cache in (stock, found):
        target(input_ids=tokens[:, :-1], attention_mask=mask[:, :-1], **{CACHE_KEYWORD: cache})
    expected = target(input_ids=tokens[:, -1:], attention_mask=mask, **{CACHE_KEYWORD: stock}).logits
    monkeypatch.delattr("transformers_resps.verifying.attention.sdpa_attention_forward")
    with use_gqa_attention(target):
        logits = target(input_ids=tokens[:, -1:], attention_mask=mask, **{CACHE_KEYWORD: found}).logits
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_a_whole_prompt_stays_causal(make_target: Callable[..., PreTrainedModel]) -> None:
    """Without a mask, as Transformers gives it to a prompt."""
    target, tokens = make_target("llama").double(), torch.arange(3, 23)[None]
    with use_gqa_attention(target):
        found = target(input_ids=tokens).logits
    torch.testing.assert_close(found, target(input_ids=tokens).logits, rtol=1e-12, atol=1e-12)


def test_a_tree_is_verified_without_a_copy_of_the_keys(
    tiny_target: PreTrainedModel, tiny_head: DraftHead, prompt: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def copy(*_: object) -> None:
        raise AssertionError("keys were copied")

    target: Any = attach(tiny_target)
    policy = FixedPolicy(TreeShape(6, 2, 3))
    expected = target.generate(**prompt, max_new_tokens=12, do_sample=False)
    one_row = {name: value[:1] for name, value in prompt.items()}
    monkeypatch.setattr(sdpa_attention, "repeat_kv", copy)
    found = target.generate(**one_row, assistant_model=tiny_head, policy=policy, max_new_tokens=12, do_sample=False)
    assert torch.equal(found, expected[:1])


def test_the_target_keeps_its_own_attention(tiny_target: PreTrainedModel) -> None:
    with pytest.raises(ZeroDivisionError), use_gqa_attention(tiny_target):
        assert tiny_target.config._attn_implementation == GROUPED
        raise ZeroDivisionError
    assert tiny_target.config._attn_implementation == "sdpa"
    tiny_target.set_attn_implementation("eager")
    with use_gqa_attention(tiny_target):
        assert tiny_target.config._attn_implementation == "eager"


def test_a_call_may_begin_while_another_one_attends_so(
    tiny_target: PreTrainedModel, tiny_head: DraftHead, prompt: dict[str, Tensor]
) -> None:
    target: Any = attach(tiny_target)
    plain = target.generate(**prompt, max_new_tokens=8, do_sample=False)
    with use_gqa_attention(target):
        assert torch.equal(target.generate(**prompt, max_new_tokens=8, do_sample=False), plain)
        found = target.generate(**prompt, assistant_model=tiny_head, max_new_tokens=8, do_sample=False)
    assert torch.equal(found, plain)
    assert target.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("option", ["softcap", "position_bias"])
def test_what_only_stock_attention_understands_is_left_to_it(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(
        "transformers_resps.verifying.attention.sdpa_attention_forward", lambda *_, **options: asked.append(options)
    )
    states = torch.zeros(1, 4, 3, 8)
    grouped_attention(
        torch.nn.Identity(), states, states[:, :2], states[:, :2], torch.zeros(1, 1, 3, 3), **{option: 1}
    )
    assert asked[0][option] == 1


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_mask_with_aligned_rows_shows_the_same(dtype: torch.dtype) -> None:
    """As on accelerators, whose kernels copy any other."""
    generator = torch.Generator().manual_seed(5)
    query = torch.randn(2, 2, 15, 8, generator=generator)
    key, value = torch.randn(2, 2, 2, 21, 8, generator=generator)
    shown = torch.rand(2, 1, 5, 21, generator=generator) < 0.6
    shown[..., 0] = True
    mask = shown if dtype is torch.bool else torch.zeros(2, 1, 5, 21).masked_fill(~shown, float("-inf"))
    packed, aligned = (stacked(mask, 3, alignment) for alignment in (1, 16))
    assert all(stride % 16 == 0 for stride in aligned.stride()[:-1])
    for one in (aligned, stacked(mask.repeat(1, 3, 1, 1), 3, 16)):
        assert torch.equal(one, packed) and one.shape == (2, 1, 15, 21)
        sdpa = functional.scaled_dot_product_attention
        assert torch.equal(sdpa(query, key, value, attn_mask=one), sdpa(query, key, value, attn_mask=packed))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_device_decides_how_rows_are_laid_out(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    laid_out: list[tuple[int, ...]] = []

    def noting(query: Tensor, *states: Tensor, attn_mask: Tensor, **options: Any) -> Tensor:
        laid_out.append(attn_mask.stride())
        return query

    monkeypatch.setattr(functional, "scaled_dot_product_attention", noting)
    mask = torch.ones(1, 1, 5, 21, dtype=torch.bool, device=device)
    query, key = torch.ones(1, 6, 5, 8, device=device), torch.ones(1, 2, 21, 8, device=device)
    assert attend(query, key, key, mask).shape == query.shape
    assert laid_out[0][2] == {"cpu": 21, "meta": 32}[device]


class Attention(torch.nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout_p = dropout

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return grouped_attention(self, query, key, value, mask, self.dropout_p)[0]


def states(heads: int, shared: int, width: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Query, key, value and mask of seven tokens that look at ninety."""
    generator = torch.Generator().manual_seed(heads)
    query = torch.randn(1, heads, 7, width, generator=generator)
    key, value = torch.randn(2, 1, shared, 90, width, generator=generator)
    mask = torch.zeros(1, 1, 7, 90).masked_fill(torch.rand(7, 90, generator=generator) < 0.5, -1e9)
    return [part.to(dtype) for part in (query, key, value, mask)]


def calls_native(program: torch.export.ExportedProgram) -> bool:
    return bool(program.graph.find_nodes(op="call_function", target=torch.ops.resps.bf16_attention.default))


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize(("heads", "shared"), [(6, 2), (2, 2)])
@pytest.mark.parametrize(
    ("has_units", "width", "dtype", "dropout", "native"),
    [
        (True, 32, torch.bfloat16, 0.0, True),
        (False, 32, torch.bfloat16, 0.0, False),
        (True, 24, torch.bfloat16, 0.0, False),
        (True, 32, torch.float32, 0.0, False),
        (True, 32, torch.bfloat16, 0.5, False),
    ],
)
def test_packaged_code_attends_by_an_operator_of_its_own_where_that_serves(
    monkeypatch: pytest.MonkeyPatch,
    heads: int,
    shared: int,
    adds: bool,
    has_units: bool,
    width: int,
    dtype: torch.dtype,
    dropout: float,
    native: bool,
) -> None:
    monkeypatch.setattr(native_module, "our_kernels", lambda: ("avx512_bf16",) if has_units else ())
    changes = {2: torch.export.Dim.DYNAMIC}
    given = states(heads, shared, width, dtype)
    given[3] = given[3] if adds else given[3] == 0  # else it tells what is seen
    module = Attention(dropout).eval()
    program = torch.export.export(module, (*given,), dynamic_shapes=(changes, None, None, changes), strict=False)
    assert calls_native(program) == native
    if not dropout:
        expected = functional.scaled_dot_product_attention(*given, enable_gqa=True)
        torch.testing.assert_close(program.module()(*given).transpose(1, 2), expected, rtol=0.03, atol=0.03)


def test_a_lone_token_that_sees_everything_and_eager_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_module, "our_kernels", lambda: ("avx512_bf16",))
    query, key, value, mask = states(6, 2, 32)
    lone = query[:, :, :1]
    program = torch.export.export(Attention(), (lone, key, value, None), strict=False)
    assert calls_native(program)
    expected = functional.scaled_dot_product_attention(lone, key, value, enable_gqa=True)
    torch.testing.assert_close(program.module()(lone, key, value, None).transpose(1, 2), expected)

    monkeypatch.setattr(attention, "bf16_attention", None)  # eager code never calls it
    assert grouped_attention(torch.nn.Identity(), query, key, value, mask)[0].shape == (1, 7, 6, 32)
