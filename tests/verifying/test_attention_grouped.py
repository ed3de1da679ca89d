"""Heads that share keys attend without copies of them, and nothing else changes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache, PreTrainedModel
from transformers.integrations import sdpa_attention

from transformers_resps import DraftHead, FixedPolicy, TreeShape, attach
from transformers_resps.compat import CACHE_KEYWORD
from transformers_resps.compilation.compiled import CompiledFunction
from transformers_resps.compilation.packages import FOLDER_VARIABLE, ModulePackages, stored_packages
from transformers_resps.tree import DraftTree
from transformers_resps.verifying import attention
from transformers_resps.verifying.attention import (
    GROUPED,
    attend,
    grouped_attention,
    multiplied,
    stacked,
    tree_attention_mask,
    tree_positions,
    use_gqa_attention,
)


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


@pytest.mark.parametrize("rows", [1, 3])
def test_two_products_attend_as_pytorchs_kernel_does(rows: int) -> None:
    generator = torch.Generator().manual_seed(6)
    query, key = (torch.randn(rows, 2, n, 8, generator=generator) for n in (7, 9))
    value = torch.randn(rows, 2, 9, 5, generator=generator)
    hidden = torch.rand(rows, 1, 7, 9, generator=generator) < 0.5
    hidden[..., 0] = False
    mask = torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)
    expected = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3)
    torch.testing.assert_close(multiplied(query, key, value, mask, 0.3), expected, rtol=1e-5, atol=1e-5)


def states(heads: int, shared: int, count: int) -> list[Tensor]:
    """Query, key, value and mask of so many tokens that look at ninety."""
    generator = torch.Generator().manual_seed(count)
    query = torch.randn(1, heads, count, 8, generator=generator)
    key, value = torch.randn(2, 1, shared, 90, 8, generator=generator)
    mask = torch.zeros(1, 1, count, 90).masked_fill(torch.rand(count, 90, generator=generator) < 0.5, -1e9)
    return [part.bfloat16() for part in (query, key, value, mask)]


class Attention(torch.nn.Module):
    def forward(self, *states: Tensor) -> Tensor:
        return grouped_attention(self, *states)[0]


SEVEN = 7.0


@pytest.mark.parametrize(("heads", "shared"), [(6, 2), (2, 2)])
@pytest.mark.parametrize(("has_units", "most", "chosen"), [(True, 2**26, True), (True, 900, False), (False, 0, False)])
def test_code_for_all_sizes_attends_to_long_prompts_by_products(
    monkeypatch: pytest.MonkeyPatch, heads: int, shared: int, has_units: bool, most: int, chosen: bool
) -> None:
    """On a CPU that multiplies bfloat16 and has no AMX, while the scores are few; the choice is in the code."""
    monkeypatch.setattr(attention, "_has_bf16_alone", lambda: has_units)
    monkeypatch.setattr(attention, "_MOST_SCORES", most)
    monkeypatch.setattr(attention, "multiplied", lambda query, *_: torch.full_like(query, SEVEN))
    changes = {2: torch.export.Dim.DYNAMIC}
    sizes = ((changes, None, None, changes),)
    program = torch.export.export(Attention(), (*states(heads, shared, 40),), dynamic_shapes=sizes, strict=False)
    for count in (3, 70):
        query, key, value, mask = states(heads, shared, count)
        expected = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
        expected = torch.full_like(expected, SEVEN) if chosen and count == 70 else expected
        found = program.module()(query, key, value, mask)
        torch.testing.assert_close(found.transpose(1, 2), expected, rtol=0.03, atol=0.03)


def test_the_choice_is_kept_for_later_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Inductor packages code with both ways in it, which is right at all sizes."""
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setattr(attention, "_has_bf16_alone", lambda: True)
    layer = torch.nn.Linear(1, 1).requires_grad_(False)
    packages = ModulePackages(lambda: layer, "the attention")

    def attending(*given: Tensor) -> Tensor:
        return grouped_attention(layer, *given)[0]

    fast = CompiledFunction(attending, [(2,), (), (), (2,)], packages=packages, name="attention")
    with torch.inference_mode():
        for count in (40, 3, 70):
            query, key, value, mask = given = states(6, 2, count)
            found = fast(given)
            assert torch.equal(fast.run_packaged(given, []), found)
            expected = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
            torch.testing.assert_close(found.transpose(1, 2), expected, rtol=0.03, atol=0.03)
    assert len(stored_packages(tmp_path)) == 1
