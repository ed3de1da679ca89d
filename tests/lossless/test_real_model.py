"""The contract on a real model: SmolLM2-135M-Instruct and the head that is published for it."""

import json
import os
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.demo.run import PROMPTS
from examples.demo.target import load_smollm2
from transformers_resps import DraftHead, FixedPolicy, TreeShape, attach
from transformers_resps.compat import CACHE_KEYWORD
from transformers_resps.testing import explain_divergence


HEAD = Path(__file__).parents[2] / "model_cards" / "smollm2-135m-instruct-head"
MTP = HEAD.with_name("smollm2-135m-instruct-mtp")
pytestmark = pytest.mark.real
PROMPTS = [json.loads(line)["messages"] for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
SAMPLING = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "repetition_penalty": 1.1}


@cache
def loaded(dtype: torch.dtype) -> tuple[Any, Any, DraftHead]:
    target, tokenizer = load_smollm2(dtype)
    return attach(target), tokenizer, DraftHead.from_pretrained(HEAD, target=target)


@cache
def greedy_answers(prompt: int) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """In float32, to one of the first prompts: two tests look at them."""
    return answers(torch.float32, PROMPTS[prompt])


def answers(
    dtype: torch.dtype, messages: Any, assistant_model: Any = None, **keywords: Any
) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """The prompt, the plain answer, and the output of the same call with the head, or another assistant."""
    target, tokenizer, head = loaded(dtype)
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    keywords = {"max_new_tokens": 24, "do_sample": False} | keywords
    torch.manual_seed(3)
    plain = target.generate(**inputs, **keywords)
    torch.manual_seed(3)
    out = target.generate(
        **inputs,
        assistant_model=assistant_model or head,
        policy=FixedPolicy(TreeShape(8, 4, 2)),
        return_dict_in_generate=True,
        **keywords,
    )
    return inputs["input_ids"][0], plain[0, inputs["input_ids"].shape[1] :], out


@pytest.mark.parametrize("is_sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("number", [0, 1], ids=["arithmetic", "code"])
def test_in_float32_the_text_is_that_of_plain_generate(number: int, is_sampled: bool) -> None:
    sampled = partial(answers, torch.float32, PROMPTS[number], **SAMPLING)
    prompt, plain, out = sampled() if is_sampled else greedy_answers(number)
    assert out.sequences[0, len(prompt) :].tolist() == plain.tolist()


def test_a_trained_mtp_layer_is_believed_and_changes_no_text() -> None:
    """Its folder is the assistant. A layer that is read wrongly drafts fluently, and is not believed."""
    steps = tokens = 0
    for messages in PROMPTS[:2]:
        prompt, plain, out = answers(torch.float32, messages, str(MTP), max_new_tokens=32)
        assert out.sequences[0, len(prompt) :].tolist() == plain.tolist()
        steps, tokens = steps + len(out.speculation.steps), tokens + len(plain)
    assert tokens > 1.3 * steps, (tokens, steps)


# The model reads 8,192 positions: RESPS_PROMPT_LENGTHS="8000" adds minutes.
LENGTHS = [1, *map(int, os.environ.get("RESPS_PROMPT_LENGTHS", "").split())]


@pytest.mark.parametrize("length", LENGTHS)
def test_a_prompt_may_have_any_length(length: int) -> None:
    target, tokenizer, head = loaded(torch.float32)
    prose = Path(__file__).parents[2].joinpath("docs", "lossless.md").read_text(encoding="utf-8")
    prompt = tokenizer(prose * (1 + length // 500), return_tensors="pt").input_ids[:, :length]
    assert prompt.shape[1] == length
    policy = FixedPolicy(TreeShape(8, 4, 2, lookup=4))
    plain = target.generate(prompt, max_new_tokens=12, do_sample=False)
    found = target.generate(prompt, max_new_tokens=12, do_sample=False, assistant_model=head, policy=policy)
    assert found.tolist() == plain.tolist()


def test_a_second_turn_goes_on_from_the_cache_of_the_first() -> None:
    target, tokenizer, head = loaded(torch.float32)
    call = {"assistant_model": head, "max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True}
    first = target.generate(tokenizer("The three largest", return_tensors="pt").input_ids, **call)
    text = torch.cat([first.sequences, tokenizer(" And then", return_tensors="pt").input_ids], dim=1)
    plain = target.generate(text, max_new_tokens=12, do_sample=False)
    found = target.generate(text, **call, **{CACHE_KEYWORD: getattr(first, CACHE_KEYWORD)})
    assert found.sequences.tolist() == plain.tolist()


def test_in_bfloat16_every_difference_is_a_near_tie() -> None:
    for messages in PROMPTS[:3]:
        prompt, plain, out = answers(torch.bfloat16, messages)
        found = explain_divergence(loaded(torch.bfloat16)[0], prompt, plain, out.sequences[0, len(prompt) :])
        assert found is None or found.explained, str(found)


@pytest.mark.parametrize("keywords", [{}, SAMPLING], ids=["greedy", "sampled"])
def test_in_bfloat16_the_invariant_mode_writes_one_text_from_the_same_logits(keywords: dict[str, Any]) -> None:
    """`answers` decodes plainly first, and so by the mode."""
    target, *_ = loaded(torch.bfloat16)
    options = {"invariant": True, "max_new_tokens": 24, **keywords}
    prompt, plain, out = answers(torch.bfloat16, PROMPTS[0], **options, output_logits=True)
    assert out.sequences[0, len(prompt) :].tolist() == plain.tolist()
    torch.manual_seed(3)
    again = target.generate(
        prompt[None],
        policy=FixedPolicy(TreeShape(1, 0, 1, lookup=6)),
        prefill_chunk_size=7,
        return_dict_in_generate=True,
        output_logits=True,
        **({"do_sample": False} | options),
    )
    assert again.sequences.tolist() == out.sequences.tolist()
    assert all(torch.equal(one, other) for one, other in zip(again.logits, out.logits, strict=True))
    assert len(out.speculation.steps) < len(plain), "drafts were accepted"


def test_the_published_head_is_accepted_often() -> None:
    reports = [greedy_answers(number)[2].speculation for number in (0, 1)]
    emitted, forwards = (sum(getattr(r, name) for r in reports) for name in ("emitted_total", "target_forwards"))
    assert emitted / forwards > 1.5


def test_the_published_head_is_small_and_carries_no_pickle() -> None:
    assert sum(file.stat().st_size for file in HEAD.rglob("*")) < 24 * 2**20
    suffixes = {file.suffix for file in HEAD.rglob("*") if file.is_file()}
    assert suffixes <= {".safetensors", ".json", ".md", ".png", ".yaml", ".py", ".txt"}
