"""The contract on every class that sees or hears: the tokens of plain `generate`, and they depend on the pixels."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import DynamicCache, GenerationConfig

from tests.drafting.test_block_drafter import KINDS, block_head
from tests.lossless.hybrids import SAMPLED, answer, check_counts, compare
from tests.lossless.multimodal import ALL, DRAFTED, any_shape, check, head_of, shown, target_of
from tests.multimodal_targets import IMAGE, MARKS, START, TARGETS, VOCABULARY, Medium, MultimodalTarget, target_named
from transformers_resps import FixedPolicy, TreeShape, attach
from transformers_resps.compat import CACHE_KEYWORD
from transformers_resps.verifying.forward import decoder_layers


SEEDS = range(2 if ALL else 1)
SEEN = [(kind, letter) for kind in TARGETS for letter in kind.media if ALL or letter == kind.letter]


@pytest.mark.parametrize(("kind", "letter"), SEEN, ids=str)
def test_plain_generate_writes_what_it_sees(kind: MultimodalTarget, letter: str) -> None:
    """Else the other tests prove nothing about pixels and sounds."""
    texts = [answer(target_of(kind), shown(kind, letter, 2, seed)).sequences.tolist() for seed in (0, 1)]
    assert all(row != other for row, other in zip(*texts, strict=True))


HOW: dict[str, dict[str, Any]] = {"greedy": {}, "sampled": SAMPLED, "twice": SAMPLED | {"num_return_sequences": 2}}


def calls() -> Iterator[Any]:
    """Text alone and with each medium, one row and two, greedy and sampled."""
    for kind in TARGETS:
        for letter in ("", *(kind.media if kind in DRAFTED else ())):
            few = (1, "greedy") if not letter else (2, "twice") if letter == kind.letter else None
            for count in (1, 2):
                for how in HOW:
                    if ALL or (count, how) == few:
                        yield pytest.param(kind, letter, count, how, id=f"{kind}-{letter or 'text'}-{count}-{how}")


@pytest.mark.parametrize(("kind", "letter", "count", "how"), [*calls()])
def test_any_tree_gives_the_tokens_of_plain_generate(
    kind: MultimodalTarget, letter: str, count: int, how: str
) -> None:
    reports = [check(kind, shown(kind, letter, count, seed), seed, **HOW[how]) for seed in SEEDS]
    check_counts(*reports)


# Recurrent layers have no static cache, and stock's own makes Gemma 4 Unified write another text.
STATIC = [kind for kind in DRAFTED if not kind.is_recurrent and str(kind) != "gemma4_unified"]


@pytest.mark.parametrize("kind", STATIC if ALL else STATIC[::4], ids=str)
def test_a_static_cache_gives_the_tokens_of_plain_generate(kind: MultimodalTarget) -> None:
    check_counts(check(kind, shown(kind, kind.letter), cache_implementation="static"))


TURNS = [pytest.param(2, ".x..", True, id="media-after another call")]
MORE_TURNS = [
    pytest.param(1, ".x..", False, id="medium-at once"),
    pytest.param(2, ".x..", False, id="media-at once"),
    pytest.param(1, "....", True, id="text-after another call"),
    pytest.param(2, "....", False, id="texts-at once"),
]


@pytest.mark.parametrize(("count", "message", "between"), TURNS + MORE_TURNS * ALL)
@pytest.mark.parametrize("kind", DRAFTED, ids=str)
def test_a_second_turn_goes_on_from_the_returned_cache(
    kind: MultimodalTarget, count: int, message: str, between: bool
) -> None:
    target, turns = target_of(kind), []
    prompt, few = shown(kind, kind.letter, count), {"max_new_tokens": 8}
    messages = [message.replace("x", kind.letter)] * count
    for drafting in ({}, {"assistant_model": head_of(kind), "policy": any_shape(0)}):
        own = {CACHE_KEYWORD: DynamicCache(config=target.config)}
        first = answer(target, prompt, **own, **few, **drafting)
        if between:
            answer(target, kind.prompt(f".{kind.letter}{kind.letter}.", seed=3), **few, **drafting)
        inputs = kind.follow(first.sequences, prompt["attention_mask"], *messages, seed=7)
        turns.append([first, answer(target, inputs, **{CACHE_KEYWORD: first[CACHE_KEYWORD]}, **drafting)])
    for plain, found in zip(*turns, strict=True):
        assert found.sequences.tolist() == plain.sequences.tolist()
    check_counts(*(found.speculation for found in turns[1]))


# Prompts that mix text, images, videos and sounds in every way, and calls that read them in unusual ways.
LOOKUPS = FixedPolicy(TreeShape(1, 0, 1, lookup=6))
# Each of these reads a prompt in its own way.
OFTEN = ("qwen3_vl", "gemma3", "paligemma", "idefics3", "exaone4_5", "qwen2_audio")
MIXED = {
    "two media and one": ("..xx..", ".x."),
    "one and none": (".x..", "......."),
    "none and one": ("...", "..x..."),
    "at the end": ("...x", "....x"),
    "at the start": ("x..", "x......"),
    "three apart": (".x.x.x.",),
    "nothing else": ("x", "xx"),
}


@pytest.mark.parametrize("rows", MIXED.values(), ids=MIXED)
@pytest.mark.parametrize("kind", DRAFTED if ALL else [*map(target_named, OFTEN)], ids=str)
def test_rows_hold_as_many_media_as_they_like_anywhere(kind: MultimodalTarget, rows: tuple[str, ...]) -> None:
    inputs = kind.prompt(*(row.replace("x", kind.letter) for row in rows))
    check_counts(check(kind, inputs), *(check(kind, inputs, 1, **SAMPLED) for _ in range(ALL)))


@pytest.mark.parametrize(("name", "how"), [("qwen3_vl", "in place"), ("gemma3", "windows"), ("llava", "rnn")])
def test_a_block_head_reads_what_the_target_sees(name: str, how: str) -> None:
    kind = target_named(name)
    target, inputs = target_of(kind), kind.prompt(f"..{kind.letter * 2}..", f".{kind.letter}.")
    check_counts(compare(target, block_head(target, **KINDS[how]), inputs, policy=any_shape(0)))


@pytest.mark.parametrize("kind", [kind for kind in DRAFTED if len(kind.media) > 1], ids=str)
def test_a_prompt_holds_media_of_several_kinds(kind: MultimodalTarget) -> None:
    letters = "".join(kind.media)
    check_counts(check(kind, kind.prompt("." + ".".join(letters) + ".", f"..{letters[1]}..")))


@pytest.mark.parametrize("name", ["gemma3", "gemma4", "gemma4_unified"])
def test_an_image_may_be_longer_than_the_window(name: str) -> None:
    kind = target_named(name)
    narrow = replace(kind, text=kind.text | {"sliding_window": 3})
    check_counts(check(narrow, narrow.prompt("..I..", "I.I..")))


@pytest.mark.parametrize("name", ["qwen3_vl", "gemma3", "llava", "qwen3_5"])
@pytest.mark.parametrize("size", [1, 4])
def test_a_prompt_is_read_in_chunks(name: str, size: int) -> None:
    kind = target_named(name)
    check_counts(check(kind, kind.prompt("...I...", ".I."), prefill_chunk_size=size))


@pytest.mark.parametrize("name", ["llava", "gemma3", "lfm2_vl"])
def test_an_attached_model_is_the_assistant_of_another(name: str) -> None:
    """Transformers' own assisted decoding calls it once a round, with the same image, and crops its cache."""
    kind = target_named(name)
    target, inputs = kind.build(), shown(kind, kind.letter)
    assistant = attach(kind.build(), policy=LOOKUPS)
    plain = target.generate(**inputs, max_new_tokens=12, do_sample=False)
    found = target.generate(**inputs, max_new_tokens=12, do_sample=False, assistant_model=assistant)
    assert found.tolist() == plain.tolist()


def test_an_assistant_that_asks_for_trees_itself_reads_an_image_once() -> None:
    kind = target_named("llava")
    target, inputs = target_of(kind), shown(kind, kind.letter)
    settings = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    first = target.generate(**inputs, **settings)
    config = GenerationConfig(
        is_assistant=True, assistant_confidence_threshold=0, suppress_tokens=[*MARKS], **settings
    )
    again = {"pixel_values": inputs["pixel_values"], "input_ids": first.sequences, "generation_config": config}
    plain, found = (
        target.generate(**again, **{CACHE_KEYWORD: deepcopy(getattr(first, CACHE_KEYWORD))}, **trees)
        for trees in ({}, {"policy": LOOKUPS})
    )
    assert found.sequences.tolist() == plain.sequences.tolist() and found.speculation.target_forwards


def test_threads_answer_about_different_images() -> None:
    kind = target_named("llava")
    target, prompts = target_of(kind), [shown(kind, "I", 2, seed) for seed in range(6)]

    def ours(seed: int) -> Any:
        drafting = {"assistant_model": head_of(kind), "policy": any_shape(seed)}
        return target.generate(**prompts[seed], max_new_tokens=14, **drafting).tolist()

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(ours, range(6)))
    assert found == [target.generate(**prompt, max_new_tokens=14).tolist() for prompt in prompts]
    assert len({str(text) for text in found}) == 6


@pytest.mark.parametrize("kind", TARGETS, ids=str)
def test_features_are_those_of_the_decoder(kind: MultimodalTarget) -> None:
    """Its tower has as many layers."""
    target = target_of(kind)
    layers = decoder_layers(target)
    assert len(layers) == target.config.get_text_config(decoder=True).num_hidden_layers
    assert set(layers) <= set(target.get_decoder().modules())


FAR = 3 * VOCABULARY  # no embedding has it


def far_from_the_vocabulary() -> MultimodalTarget:
    kind = target_named("gemma3")
    media = {"I": Medium([FAR] * 4, kind.media["I"].arguments)}
    return replace(
        kind, media=media, config=kind.config | {"image_token_id": FAR, "image_token_index": FAR}, kinds={FAR: 1}
    )


@pytest.mark.parametrize(
    ("kind", "placeholder"),
    [(target_named("qwen3_vl"), IMAGE), (target_named("llava"), IMAGE), (far_from_the_vocabulary(), FAR)],
    ids=["qwen3_vl", "llava", "beyond the vocabulary"],
)
def test_lookup_proposes_no_placeholder(kind: MultimodalTarget, placeholder: int) -> None:
    """The text soon ends as what stands before the image."""
    target, read = target_of(kind), []
    inputs = kind.prompt("..I.")
    ids = inputs["input_ids"]
    ids[ids < START] = 3  # one token of text, twice before the image
    options = {"suppress_tokens": [token for token in range(VOCABULARY) if token != 3], "policy": LOOKUPS}
    handle = target.register_forward_pre_hook(lambda *call: read.append(call[2]["input_ids"]), with_kwargs=True)
    try:
        found = target.generate(**inputs, max_new_tokens=14, return_dict_in_generate=True, **options)
    finally:
        handle.remove()
    assert found.sequences[0, ids.shape[1] :].tolist() == [3] * 14
    start = max(index for index, tokens in enumerate(read) if torch.equal(tokens, ids))  # a probe may come before
    assert any(tokens.shape[1] > 1 for tokens in read[start + 1 :]), "nothing was looked up"
    assert not any((tokens == placeholder).any() for tokens in read[start + 1 :])


def test_a_mask_that_grows_with_every_token_is_refused() -> None:
    kind = target_named("mllama")
    inputs = shown(kind, "I")
    inputs["cross_attention_mask"] = torch.ones(1, inputs["input_ids"].shape[1], 1, 1, dtype=torch.long)
    with pytest.raises(ValueError, match="cross_attention_mask"):
        answer(target_of(kind), inputs, assistant_model=head_of(kind))


def test_a_target_that_its_caller_compiled_decodes_texts_and_refuses_images() -> None:
    kind = target_named("gemma3")
    target = attach(kind.build())
    text, image = {"input_ids": kind.prompt("......")["input_ids"]}, kind.prompt("..I..")
    plain = target.generate(**text, max_new_tokens=12, do_sample=False)
    target.compile(backend="eager")
    assert target.generate(**text, max_new_tokens=12, do_sample=False, policy="auto").tolist() == plain.tolist()
    with pytest.raises(ValueError, match="A compiled .* reads prompts of tokens only"):
        target.generate(**image, max_new_tokens=12, do_sample=False, policy="auto")
