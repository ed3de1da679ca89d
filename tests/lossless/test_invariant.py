"""`invariant=True` in bfloat16: whatever drafts, one text, and to the bit the same logits.

The logits are the oracle: two texts that are equal prove less than two rows of numbers. `RESPS_INVARIANT=all` draws
ten times as many calls.
"""

import copy
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import chain, product
from random import Random
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LogitsProcessorList, PreTrainedModel, set_seed

from tests.lossless.answering import Raises, Restive, in_threads
from tests.lossless.hybrids import AnyShape
from tests.targets import VOCABULARY, Architecture
from transformers_resps import DraftHead, FixedPolicy, TreeShape, attach
from transformers_resps.assistants import MtpConfig, MtpHead
from transformers_resps.compat import CACHE_KEYWORD
from transformers_resps.generation.output import left_padded
from transformers_resps.verifying.invariant import attention as invariant
from transformers_resps.verifying.invariant import experts
from transformers_resps.verifying.invariant.row_classes import RowClasses, RowNeeds


CALLS = 240 if os.environ.get("RESPS_INVARIANT") == "all" else 12
LAYERS = {"full": {}, "window": {"sliding_window": 40}}
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12}
WIDE = FixedPolicy(TreeShape(40, 3, 8))
CHAIN = FixedPolicy(TreeShape(6, 5, 1))
LOOKUP = FixedPolicy(TreeShape(1, 0, 1, lookup=6))


def build(
    kind: str = "full", heads: int = 4, kv_heads: int = 2, head_dim: int = 16, layers: int = 3
) -> PreTrainedModel:
    sizes = {
        "num_hidden_layers": layers,
        "hidden_size": heads * head_dim,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": 1024,
        "initializer_range": 0.15,  # larger, and attention looks at one token, so that nothing is rounded
    }
    name = "mistral" if kind == "window" else "llama"
    return Architecture(name, sizes | LAYERS[kind]).build("sdpa").bfloat16()


@cache
def target_of(kind: str = "full") -> PreTrainedModel:
    return attach(build(kind))


@cache
def source_of(name: str, kind: str = "full") -> Any:
    """One that guesses, or a small model that is almost the target, whose drafts are mostly accepted."""
    return source_for(name, target_of(kind))


@torch.no_grad()
def source_for(name: str, target: PreTrainedModel) -> Any:
    torch.manual_seed(1)
    if name == "head":
        return DraftHead.from_target(target).to(target.dtype)
    if name == "mtp":
        return MtpHead(MtpConfig(1), target).to(target.dtype).eval()
    small = copy.deepcopy(target)
    for weight in small.parameters():
        weight.add_(0.05 * weight.std() * torch.randn_like(weight))
    return small


def arms(kind: str = "full") -> dict[str, dict[str, Any]]:
    """Plain decoding of the mode, and others."""
    head, small, mtp = (source_of(name, kind) for name in ("head", "small", "mtp"))
    return {
        "plain": {},
        "lookup": {"policy": LOOKUP},
        "auto": {"policy": "auto"},
        "head": {"assistant_model": head, "policy": WIDE},
        "auto with a head": {"assistant_model": head},
        "small": {"assistant_model": small, "policy": CHAIN},
        "small, wide": {"assistant_model": small, "policy": FixedPolicy(TreeShape(24, 4, 3, lookup=3))},
        "mtp": {"assistant_model": mtp, "policy": FixedPolicy(TreeShape(9, 2, 4))},
        "any": {"assistant_model": [head, small], "policy": AnyShape(3, VOCABULARY)},
    }


@dataclass
class Written:
    """What a call wrote: of each row its new tokens and their logits `[t, v]` up to its end, and all that it gave."""

    tokens: list[list[int]]
    logits: list[Tensor]
    output: Any

    def row(self, index: int) -> "Written":
        return Written([self.tokens[index]], [self.logits[index]], self.output)

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, Written)
        pairs = zip(self.logits, other.logits, strict=True)
        return self.tokens == other.tokens and all(torch.equal(*pair) for pair in pairs)


def prompt_of(length: int, seed: int = 0) -> Tensor:
    """It repeats itself, so that lookup finds something."""
    random = torch.Generator().manual_seed(seed)
    part = torch.randint(3, VOCABULARY, (1, max(length // 3, 1)), generator=random)
    return part.repeat(1, 4)[:, :length]


def padded(prompts: list[Tensor]) -> dict[str, Tensor]:
    """On the left."""
    ids, mask = left_padded([prompt[0] for prompt in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def write(target: Any, inputs: Any, seed: int = 0, **options: Any) -> Written:
    inputs = inputs if isinstance(inputs, dict) else {"input_ids": inputs, "attention_mask": torch.ones_like(inputs)}
    options = {"invariant": True, **GREEDY, **options}
    set_seed(seed)
    out = target.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True, output_scores=True)
    new = out.sequences[:, inputs["input_ids"].shape[1] :].tolist()
    end = options.get("eos_token_id")
    tokens = [row[: row.index(end) + 1] if end in row else row for row in new]
    logits = torch.stack(out.logits, dim=1)
    return Written(tokens, [logits[row, : len(kept)] for row, kept in enumerate(tokens)], out)


def check_accepted(*calls: Written) -> None:
    """A comparison proves something where drafts were accepted, and others were not."""
    steps = [step for call in calls for step in call.output.speculation.steps[1:]]
    accepted, drafted = sum(step.accepted_total for step in steps), sum(step.verified - 1 for step in steps)
    assert 0 < accepted < drafted, f"{accepted} of {drafted}"


# One text


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("length", [1, 60, 121])
def test_every_source_and_every_tree_write_one_text(kind: str, length: int) -> None:
    """The last of them crosses the border of a block; the prompt of one token begins with no text at all."""
    ways, prompt = arms(kind), prompt_of(length)
    plain, *others = [write(target_of(kind), prompt, **options) for options in ways.values()]
    for name, other in zip([*ways][1:], others, strict=True):
        assert other == plain, name
    check_accepted(*others)


class _LikeAmx(nn.Linear):
    """Sums in another order for almost every number of rows, even among multiples of 16."""

    def forward(self, input: Tensor) -> Tensor:
        first = 8 * (1 + input.shape[:-1].numel() % 5)
        inputs, weights = input.double(), self.weight.double()
        parts = (inputs[..., :first], weights[:, :first]), (inputs[..., first:], weights[:, first:])
        summed: Tensor = sum(torch.nn.functional.linear(*part).to(input.dtype) for part in parts)
        return summed


def test_where_kernels_go_by_the_number_of_rows_each_forward_has_one() -> None:
    """Planted, for the processors at hand round otherwise."""
    built = build()
    for part in built.modules():
        if type(part) is nn.Linear:
            part.__class__ = _LikeAmx
    target = attach(built)
    assert RowClasses().needs(target) == RowNeeds(16, is_exact=True)
    head, small = (source_for(name, target) for name in ("head", "small"))
    prompts = [prompt_of(length, length) for length in (70, 3, 121)]
    ways: list[dict[str, Any]] = [
        {"policy": "auto", "prefill_chunk_size": 32},
        {"assistant_model": head, "policy": WIDE},
        {"assistant_model": small, "policy": FixedPolicy(TreeShape(24, 4, 3, lookup=3))},
    ]
    plain = [write(target, prompt) for prompt in prompts]
    others = [[write(target, prompt, **options) for prompt in prompts] for options in ways]
    batch = write(target, padded(prompts), **ways[-1])
    for row, expected in enumerate(plain):
        assert all(found[row] == expected for found in others) and batch.row(row) == expected
    check_accepted(*chain(*others), batch)


def test_the_normal_mode_does_not() -> None:
    """The control: some of the same calls differ, at a length and with layers that the processor decides."""
    for kind, length in product(LAYERS, (121, 60, 1)):
        plain, *others = [
            write(target_of(kind), prompt_of(length), **options, invariant=False) for options in arms(kind).values()
        ]
        if any(other != plain for other in others):
            return
    pytest.fail("without the mode all calls wrote the same, so that equal ones show nothing")


@pytest.mark.parametrize("kind", LAYERS)
def test_in_float32_the_text_is_that_of_stock_generate(kind: str) -> None:
    """Rounding apart: the one oracle that does not run in the mode."""
    target = attach(build(kind).float())
    prompts = [prompt_of(length, length) for length in (1, 90, 130)]
    stock = write(target, padded(prompts), invariant=None)
    for options in ({}, {"policy": LOOKUP, "prefill_chunk_size": 50}):
        found = write(target, padded(prompts), **options)
        assert found.tokens == stock.tokens
        torch.testing.assert_close(torch.stack(found.logits), torch.stack(stock.logits), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunk", [1, 3, 7, 64, None])
def test_the_chunks_of_a_prompt_change_no_bit(chunk: int | None) -> None:
    """Also where the last one holds one token."""
    for length in (65, 141) if chunk != 1 else (65,):
        expected = write(target_of(), prompt_of(length), max_new_tokens=4)
        found = write(target_of(), prompt_of(length), **arms()["small"], prefill_chunk_size=chunk, max_new_tokens=4)
        assert found == expected


@pytest.mark.parametrize("length", [119, 500])
def test_a_text_crosses_the_borders_of_blocks(length: int) -> None:
    expected = write(target_of(), prompt_of(length), max_new_tokens=24)
    for name in ("head", "small, wide"):
        assert write(target_of(), prompt_of(length), **arms()[name], max_new_tokens=24) == expected, name


# Batches


@pytest.mark.parametrize("lockstep", [None, True], ids=["ragged", "lockstep"])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_row_of_a_padded_batch_is_the_prompt_alone(kind: str, lockstep: bool | None) -> None:
    """Rows begin at three places and end early, so that at last one row decodes alone."""
    prompts = [prompt_of(length, length) for length in (1, 37, 130)]
    target, end = target_of(kind), common_end(kind, prompts)
    alone = [write(target, prompt, eos_token_id=end) for prompt in prompts]
    assert len({len(one.tokens[0]) for one in alone}) > 1
    for name, chunk in (("plain", 50), ("head", None), ("small, wide", 50), ("any", None)):
        options = arms(kind)[name] | ({} if name == "plain" else {"lockstep": lockstep})
        found = write(target, padded(prompts), **options, eos_token_id=end, prefill_chunk_size=chunk)
        for row, expected in enumerate(alone):
            assert found.row(row) == expected, (name, row)


def common_end(kind: str, prompts: list[Tensor]) -> int:
    """A token that some rows write early, and others late or never."""
    texts = [write(target_of(kind), prompt).tokens[0] for prompt in prompts]
    places = {
        token: [text.index(token) if token in text else len(text) for text in texts]
        for text in texts
        for token in text
    }
    return max(places, key=lambda token: (len(set(places[token])), sum(places[token])))


# Settings


def grammar(row: int, text: Tensor) -> list[int]:
    """Five tokens, of which the newest one decides."""
    return [3 + (int(text[-1]) * 2 + step) % (VOCABULARY - 3) for step in (1, 2, 4, 7, 9)]


SETTINGS: dict[str, Callable[[], dict[str, Any]]] = {
    "sampled": lambda: {"do_sample": True, "temperature": 1.3},
    "sampled from few": lambda: {"do_sample": True, "top_k": 5, "top_p": 0.9},
    "processors": lambda: {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "a stateful processor": lambda: {"logits_processor": LogitsProcessorList([Restive()])},
    "a grammar": lambda: {"prefix_allowed_tokens_fn": grammar},
    "a sampled grammar": lambda: {"prefix_allowed_tokens_fn": grammar, "do_sample": True},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_scores_and_draws_are_equal_too(setting: str) -> None:
    plain = write(target_of(), prompt_of(70), **SETTINGS[setting]())
    drawn = torch.get_rng_state()
    for name in ("lookup", "head", "small, wide", "mtp"):
        found = write(target_of(), prompt_of(70), **arms()[name], **SETTINGS[setting]())
        assert found == plain, name
        assert torch.equal(torch.stack(found.output.scores), torch.stack(plain.output.scores)), name
        assert torch.equal(torch.get_rng_state(), drawn), name


# From call to call


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("name", ["plain", "head", "small, wide"])
def test_a_returned_cache_goes_on_as_the_text_read_anew(name: str, kind: str) -> None:
    target, options = target_of(kind), arms(kind)[name]
    first = write(target, prompt_of(119), **options)
    longer = torch.cat([first.output.sequences, prompt_of(5, 1)], dim=1)
    anew = write(target, longer)
    assert write(target, longer, **options, **{CACHE_KEYWORD: first.output[CACHE_KEYWORD]}) == anew


@pytest.mark.parametrize("lockstep", [None, True], ids=["ragged", "lockstep"])
def test_the_cache_of_a_batch_goes_on_too(lockstep: bool | None) -> None:
    prompts = [prompt_of(length, length) for length in (3, 90)]
    inputs, options = padded(prompts), arms()["small, wide"] | {"lockstep": lockstep}
    first = write(target_of(), inputs, **options)
    added = prompt_of(4, 1)
    longer = {
        "input_ids": torch.cat([first.output.sequences, added.expand(2, -1)], dim=1),
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, 16), value=1),
    }
    found = write(target_of(), longer, **options, **{CACHE_KEYWORD: first.output[CACHE_KEYWORD]})
    for row, prompt in enumerate(prompts):
        text = torch.cat([prompt, torch.tensor([first.tokens[row]]), added], dim=1)
        assert found.row(row) == write(target_of(), text), row


def interrupt(target: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a forward."""
    layer: Any = target.model.layers[-1]

    def stop(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(layer.mlp, "forward", stop)


def test_a_call_after_an_interrupted_one_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    target, options = target_of(), arms()["small, wide"]
    expected, normal = (write(target, prompt_of(70), invariant=mode) for mode in (True, False))
    for mode in (True, False):
        broken = LogitsProcessorList([Raises(4, ZeroDivisionError)])
        with pytest.raises(ZeroDivisionError):
            write(target, prompt_of(70), **options, invariant=mode, logits_processor=broken)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(target, patch)
        write(target, prompt_of(70), **options)
    assert target.config._attn_implementation == "sdpa"
    assert write(target, prompt_of(70), **options) == expected
    assert write(target, prompt_of(70), invariant=False) == normal


@pytest.mark.parametrize("modes", [(True, True), (True, False)], ids=["both", "one"])
def test_a_call_in_another_thread_changes_no_bit(modes: tuple[bool, bool]) -> None:
    target, options = target_of(), arms()["small, wide"]
    calls = [
        lambda mode=mode, length=length: write(target, prompt_of(length), **options, invariant=mode)  # type: ignore[misc]
        for mode, length in zip(modes, (70, 131), strict=True)
    ]
    expected = [write(target, prompt_of(length)) for length in (70, 131)]
    for _ in range(2):
        for found, right, mode in zip(in_threads(*calls), expected, modes, strict=True):
            assert found == right if mode else len(found.tokens[0]) == len(right.tokens[0])
    assert target.config._attn_implementation == "sdpa"


# Models


def test_an_adapter_and_a_copy_write_one_text_each() -> None:
    """An adapter multiplies few rows by few columns; a copy that is attached has its own state."""
    wrapped: Any = get_peft_model(build(), LoraConfig(target_modules=["q_proj", "down_proj"], r=2)).eval()
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    adapted = attach(wrapped)
    for target in (adapted, copy.deepcopy(target_of())):
        plain = write(target, prompt_of(70))
        for name in ("lookup", "head", "small, wide"):
            assert write(target, prompt_of(70), **arms()[name]) == plain, name
    assert plain == write(target_of(), prompt_of(70))


# Any call


@dataclass
class Call:
    """Drawn from a number."""

    target: PreTrainedModel
    prompts: list[Tensor]
    plain: dict[str, Any]
    ours: dict[str, Any]


@cache
def drawn_target(heads: int, kv_heads: int, head_dim: int, kind: str, dtype: torch.dtype) -> PreTrainedModel:
    return attach(build(kind, heads, kv_heads, head_dim, layers=2).to(dtype))


@cache
def drawn_source(name: str, *target: Any) -> Any:
    return source_for(name, drawn_target(*target))


def drawn(number: int) -> Call:
    random = Random(number)
    heads = random.choice([(4, 4, 16), (4, 2, 16), (6, 2, 16), (8, 1, 64), (3, 1, 32)])
    shape = (*heads, random.choice([*LAYERS]), random.choice([torch.bfloat16, torch.bfloat16, torch.float16]))
    target, rows = drawn_target(*shape), random.choice([1, 1, 2, 3])
    lengths = [random.choice([1, 2, 5, 31, 33, 60, 64, 90, 120, 127, 129, 200]) for _ in range(rows)]
    plain: dict[str, Any] = {"max_new_tokens": random.randint(5, 20), "do_sample": rows == 1 and random.random() < 0.4}
    if random.random() < 0.3:
        plain["repetition_penalty"] = 1.3
    if random.random() < 0.5:
        plain["eos_token_id"] = random.randrange(3, VOCABULARY)
    names = random.choice([[], ["head"], ["small"], ["mtp"], ["head", "small"]])
    sources = [drawn_source(name, *shape) for name in names]
    tree = random.randint(2, 40), random.randint(1, 7), random.randint(1, 8)
    shape_of_all = TreeShape(*(tree if sources else (1, 0, 1)), lookup=random.randint(1, 6))
    policy = random.choice([FixedPolicy(shape_of_all), AnyShape(number, VOCABULARY) if sources else LOOKUP, "auto"])
    ours = {"policy": policy, "prefill_chunk_size": random.choice([None, None, 1, 3, 17, 64, 100])}
    ours |= {"assistant_model": sources} if sources else {}
    ours |= {"lockstep": True} if rows > 1 and random.random() < 0.4 else {}
    return Call(target, [prompt_of(length, number) for length in lengths], plain, ours)


def test_any_call_writes_what_each_prompt_writes_alone() -> None:
    for number in range(CALLS):
        call = drawn(number)
        found = write(call.target, padded(call.prompts), number, **call.plain, **call.ours)
        for row, prompt in enumerate(call.prompts):
            assert found.row(row) == write(call.target, prompt, number, **call.plain), f"call {number}, row {row}"


# Without the mode


@pytest.fixture
def entered() -> Iterator[set[str]]:
    """Files of the functions that run."""
    files, before = set[str](), sys.getprofile()
    sys.setprofile(lambda frame, event, argument: files.add(frame.f_code.co_filename))
    yield files
    sys.setprofile(before)


@pytest.mark.parametrize("mode", [False, True])
def test_without_the_mode_no_line_of_it_runs(mode: bool, entered: set[str]) -> None:
    for inputs in (prompt_of(9), padded([prompt_of(9), prompt_of(3)])):
        write(target_of(), inputs, **arms()["head"], invariant=mode)
    assert {invariant.__file__ in entered, experts.__file__ in entered} == {mode}
