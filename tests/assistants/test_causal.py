"""Small causal models as drafters: what they read and propose, and which of them are refused."""

from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.assistants.growing import Growing
from tests.conftest import build_target
from tests.recurrent_targets import RECURRENT
from tests.targets import ARCHITECTURES, VOCABULARY, Architecture
from tests.tokenizers import letter_tokenizer
from transformers_resps import TreeShape
from transformers_resps.assistants import CausalDrafter
from transformers_resps.drafting import Committed, DraftRequest
from transformers_resps.drafting.model_drafter import ModelDrafter


NEWEST = torch.empty(0)  # levels are drafted from what was observed


PADS = torch.tensor([[3], [0]])
TOKENS = torch.arange(2, 34).remainder(VOCABULARY).view(2, 16)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("small", ARCHITECTURES, ids=str)
def test_it_reads_padded_rows_and_a_tree_as_each_path_alone(small: Architecture, attention: str) -> None:
    """A prompt of 10 positions, two more tokens, two siblings, and a child of each. Windows are of 8."""
    if attention not in small.attention:
        pytest.skip("an architecture of eager attention alone")
    model, target = small.build(attention), small.build(attention, seed=1)
    steps, entries = CausalDrafter(model, target).bind(target), Growing()
    siblings, order = torch.eye(2, dtype=torch.bool), torch.arange(12)
    for start, end, depths in ((0, 10, range(10)), (10, 12, (10, 11)), (12, 14, (12, 12)), (14, 16, (13, 13))):
        slots = torch.tensor([*depths])
        mask = (order[: min(end, 12)] <= slots[:, None]) & (order[: min(end, 12)] >= PADS[..., None])
        tree = [siblings.expand(2, 2, 2)] * ((end - 12) // 2)
        entries.mask = torch.cat([mask, *tree], dim=-1)[:, None]
        output = steps.run(0, TOKENS[:, start:end], None, steps.places(slots - PADS), entries)
    found = steps.logits(output)
    for row in range(2):
        for node in range(2):
            text = TOKENS[row, [*range(PADS[row], 12), 12 + node, 14 + node]]
            expected = model(input_ids=text[None], use_cache=False).logits[0, -1].float()
            torch.testing.assert_close(found[row, node], expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llama", "mistral-window", "gemma3_text", "gpt2", "qwen3"])
def test_a_prompt_and_a_newest_token_need_no_mask(model_type: str) -> None:
    small = next(found for found in ARCHITECTURES if str(found) == model_type)
    for attention in small.attention:
        model, target = small.build(attention), small.build(attention, seed=1)
        steps, entries = CausalDrafter(model, target).bind(target), Growing()
        steps.run(0, TOKENS[:, :12], None, steps.places(torch.arange(12)[None]), entries)
        output = steps.run(0, TOKENS[:, 12:13], None, steps.places(torch.tensor([[12]])), entries)
        expected = model(input_ids=TOKENS[:, :13], use_cache=False).logits[:, -1:].float()
        torch.testing.assert_close(steps.logits(output), expected, atol=1e-4, rtol=1e-4)


SHAPE = TreeShape(30, 4, 3)


def pool_of(drafter: ModelDrafter, row: int) -> tuple[list[int], list[int], Tensor]:
    pool = drafter.draft(NEWEST, DraftRequest(SHAPE))
    return pool.tokens[row].tolist(), pool.parents[row].tolist(), pool.scores[row]


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llama", "mistral-window", "gemma3_text", "gpt2", "deepseek_v3"])
def test_a_pool_in_the_middle_of_ragged_texts_is_that_of_each_text_read_at_once(model_type: str) -> None:
    """Three rows with padding; trees between commits of different lengths; a row ends, and two go on."""
    small = next(found for found in ARCHITECTURES if str(found) == model_type)
    model, target = small.build("sdpa"), small.build("sdpa", seed=1)
    steps, generator = CausalDrafter(model, target).bind(target), torch.Generator().manual_seed(0)
    prompts = torch.randint(VOCABULARY, (3, 9), generator=generator)
    pads = [4, 0, 2]
    mask = (torch.arange(9) >= torch.tensor(pads)[:, None]).long()
    drafter, kept = ModelDrafter(steps, 3, mask), [0, 1, 2]
    drafter.observe(Committed(prompts))
    texts = [row[pad:].tolist() for row, pad in zip(prompts, pads, strict=True)]
    for counts in ([1, 4, 2], [3, 3, 3], [2, 1, 5], [4, 1], [2, 2]):
        pool_of(drafter, 0)
        if len(counts) < len(kept):
            drafter.keep_rows([0, 2])
            kept = [0, 2]
        rows = [torch.randint(VOCABULARY, (count,), generator=generator).tolist() for count in counts]
        drafter.observe(
            Committed(torch.tensor([row + row[-1:] * (max(counts) - len(row)) for row in rows]), rows=rows)
        )
        for place, (index, row) in enumerate(zip(kept, rows, strict=True)):
            texts[index] += row
            fresh = ModelDrafter(steps, 1, None)
            fresh.observe(Committed(torch.tensor([texts[index]])))
            (tokens, parents, scores), expected = pool_of(drafter, place), pool_of(fresh, 0)
            assert (tokens, parents) == expected[:2]
            torch.testing.assert_close(scores, expected[2], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_outputs_are_those_of_the_wanted_tokens_of_each_row() -> None:
    target, small = build_target(), build_target(seed=1)
    steps, places = CausalDrafter(small, target).bind(target), torch.arange(16)[None]
    outputs = [
        steps.run(0, TOKENS, None, steps.places(places), Growing(), wanted)
        for wanted in (slice(None), slice(-1, None), torch.tensor([[3], [15]]))
    ]
    torch.testing.assert_close(outputs[1], outputs[0][:, -1:])
    torch.testing.assert_close(outputs[2][:, 0], outputs[0][[0, 1], [3, 15]])


@torch.no_grad()
@pytest.mark.parametrize(("rows", "target_rows"), [(202, 200), (200, 202)], ids=["larger", "smaller"])
def test_a_padded_vocabulary_of_either_side_does_no_harm(rows: int, target_rows: int) -> None:
    target, small = build_target(vocab_size=target_rows), build_target(vocab_size=rows)
    steps = CausalDrafter(small, target).bind(target)
    tokens = torch.tensor([[5, target_rows - 1]])
    output = steps.run(0, tokens, None, steps.places(torch.arange(2)[None]), Growing())
    assert steps.logits(output).shape[-1] == steps.proposable_tokens == 200


def test_a_text_longer_than_a_table_of_positions_is_drafted_for_all_the_same() -> None:
    target = build_target()
    small = build_target("gpt2", n_embd=32, n_head=4, n_layer=2, n_positions=8)
    steps = CausalDrafter(small, target).bind(target)
    output = steps.run(0, TOKENS, None, steps.places(torch.arange(16)[None]), Growing())
    assert steps.logits(output).isfinite().all()


def refusal(model: PreTrainedModel, target: PreTrainedModel) -> str:
    with pytest.raises(ValueError) as refused:
        CausalDrafter(model, target).bind(target)
    return str(refused.value)


def test_what_cannot_draft_a_tree_is_refused_by_name() -> None:
    target = build_target()
    assert "is the target itself" in refusal(target, target)
    assert "a vocabulary of 80 tokens, and the target one of 64" in refusal(build_target(vocab_size=80), target)
    bloom = build_target("bloom", n_head=4, n_layer=1, attn_implementation="eager")
    hybrid = next(found for found in RECURRENT if found.model_type == "qwen3_next").build("sdpa")
    assert "Qwen3NextForCausalLM has recurrent layers" in refusal(hybrid, target)
    assert "takes no `position_ids`" in refusal(bloom, target)
    assert "is on meta, and the target on cpu" in refusal(build_target().to("meta"), target)


def test_another_tokenizer_of_the_same_size_is_refused_where_both_are_known(tmp_path: Path) -> None:
    """In folders, as `from_pretrained` names them; a model without files may draft."""
    models = []
    for name, first in (("target", "a"), ("same", "a"), ("other", "c")):
        model = ARCHITECTURES[0].build("sdpa")
        model.save_pretrained(tmp_path / name)
        letter_tokenizer(first).save_pretrained(tmp_path / name)
        models.append(AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float64))
    target, same, other = models
    CausalDrafter(same, target).bind(target)
    CausalDrafter(unnamed := ARCHITECTURES[0].build("sdpa"), target).bind(target)
    assert unnamed.config.name_or_path == ""
    assert "other (llama) has another tokenizer than the target" in refusal(other, target)


def test_a_model_that_scales_its_logits_in_an_unknown_way_is_refused() -> None:
    target, small = build_target(), build_target(seed=1)
    forward = small.forward

    @wraps(forward)
    def scaled(*args: Any, **kwargs: Any) -> Any:
        outputs = forward(*args, **kwargs)
        outputs.logits = outputs.logits * 3
        return outputs

    small.forward = scaled
    assert "gives logits that differ by" in refusal(small, target)
