"""Going on from the cache of an earlier call: the text and the cache of plain decoding, whoever wrote the cache."""

import copy
import pickle
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LogitsProcessorList, PreTrainedModel, StaticCache, set_seed

from tests.caches import check_equal_caches
from tests.lossless.answering import Raises
from tests.recurrent_targets import RecurrentArchitecture, recurrent
from tests.targets import ARCHITECTURES, VOCABULARY, Architecture
from transformers_resps import DraftHead, FixedPolicy, TreeShape, attach
from transformers_resps.compat import CACHE_KEYWORD, HAS_RECURRENT_STATES


WIDE = FixedPolicy(TreeShape(40, 3, VOCABULARY))  # so wide that most picks are drafted
BOTH = FixedPolicy(TreeShape(24, 3, VOCABULARY, lookup=6))
SAMPLED = {"do_sample": True, "temperature": 0.9}
WINDOWS = [each for each in ARCHITECTURES if str(each) in ("llama", "gemma3_text")]  # one has none, one has several


def tokens(count: int, seed: int = 0, rows: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, count), generator=torch.Generator().manual_seed(seed))


def answer(target: Any, head: DraftHead | None, text: torch.Tensor, cache: Any = None, **options: Any) -> Any:
    """One turn; `head` is `None` for plain decoding. A cache that is passed is left as it was, and a token that serves
    as padding is a token as any other.
    """
    options.setdefault("attention_mask", torch.ones_like(text))
    if head is not None:
        options = {"assistant_model": head, "policy": WIDE, **options}
    else:
        options.pop("policy", None)
    if cache is not None:
        options[CACHE_KEYWORD] = copy.deepcopy(cache)
    set_seed(5)
    return target.generate(text, return_dict_in_generate=True, **{"max_new_tokens": 9, **options})


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return attach(Architecture("llama").build("sdpa"))


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_three_turns_each_from_the_cache_of_the_last(architecture: Architecture) -> None:
    """Turns cross the windows; every second one is plain, so that each goes on from the other's cache."""
    target = attach(architecture.build(architecture.attention[0]))
    head = DraftHead.from_target(target)
    turns: list[tuple[Any, Any]] = [(None, None)] * 2
    accepted = 0
    for turn in range(3):
        outs = []
        for way, (sequences, cache) in enumerate(turns):
            text = tokens(5) if sequences is None else torch.cat([sequences, tokens(4, turn)], dim=1)
            outs.append(answer(target, head if way and turn != 1 else None, text, cache, policy=BOTH))
        assert outs[1].sequences.tolist() == outs[0].sequences.tolist()
        assert outs[0][CACHE_KEYWORD].get_seq_length() == outs[0].sequences.shape[1] - 1
        check_equal_caches(outs[1][CACHE_KEYWORD], outs[0][CACHE_KEYWORD])
        turns = [(out.sequences, out[CACHE_KEYWORD]) for out in outs]
        if turn != 1:
            accepted += outs[1].speculation.emitted_total - outs[1].speculation.target_forwards
    assert accepted > 0, "no drafted token was ever accepted: the comparison proved nothing"


@pytest.mark.parametrize("options", [{}, SAMPLED, {"prefill_chunk_size": 2}], ids=["greedy", "sampled", "chunked"])
@pytest.mark.parametrize("policy", [WIDE, BOTH, "auto"], ids=["wide", "with lookup", "auto"])
def test_a_second_turn_is_that_of_plain_decoding(
    target: PreTrainedModel, head: DraftHead, options: dict[str, Any], policy: Any
) -> None:
    first = answer(target, None, tokens(6))
    text = torch.cat([first.sequences, tokens(7, 1)], dim=1)
    at_once = options | {"prefill_chunk_size": None}  # 5.20 reads cached tokens again in chunks, without a head
    plain = answer(target, None, text, first[CACHE_KEYWORD], **at_once)
    found = answer(target, head, text, first[CACHE_KEYWORD], policy=policy, **options)
    assert found.sequences.tolist() == plain.sequences.tolist()
    check_equal_caches(found[CACHE_KEYWORD], plain[CACHE_KEYWORD])


def test_lookup_alone_goes_on_and_finds_what_the_cached_turns_said(target: PreTrainedModel) -> None:
    period = tokens(5)
    first = target.generate(period.repeat(1, 3), policy="auto", max_new_tokens=4, return_dict_in_generate=True)
    text = torch.cat([first.sequences, period], dim=1)
    plain = answer(target, None, text, first[CACHE_KEYWORD])
    options = {CACHE_KEYWORD: first[CACHE_KEYWORD], "max_new_tokens": 9, "return_dict_in_generate": True}
    found = target.generate(text, policy=FixedPolicy(TreeShape(1, 0, 1, lookup=4)), **options)
    assert found.sequences.tolist() == plain.sequences.tolist()
    assert found.speculation.steps[1].verified > 1
    check_equal_caches(found[CACHE_KEYWORD], plain[CACHE_KEYWORD])


def test_new_tokens_alone_go_on_with_the_mask_of_the_whole(target: PreTrainedModel, head: DraftHead) -> None:
    first = answer(target, head, tokens(6))
    whole = torch.cat([first.sequences, tokens(7, 1)], dim=1)
    new = whole[:, first[CACHE_KEYWORD].get_seq_length() :]
    options = {"attention_mask": torch.ones_like(whole)}
    plain = answer(target, None, new, first[CACHE_KEYWORD], **options)
    found = answer(target, head, new, first[CACHE_KEYWORD], policy=BOTH, **options)
    assert found.sequences.tolist() == plain.sequences.tolist()
    assert found.sequences.tolist() == answer(target, None, whole).sequences[:, -plain.sequences.shape[1] :].tolist()
    check_equal_caches(found[CACHE_KEYWORD], plain[CACHE_KEYWORD])


def test_a_prompt_read_once_begins_many_answers(target: PreTrainedModel, head: DraftHead) -> None:
    """Each answer gets a copy of the cache; so does a text that leaves the cached one behind a cropped cache."""
    prefix = tokens(12)
    cache = DynamicCache(config=target.config)
    with torch.no_grad():
        target(prefix, use_cache=True, **{CACHE_KEYWORD: cache})
    for seed in range(3):
        text = torch.cat([prefix, tokens(3 + seed, seed)], dim=1)
        assert answer(target, head, text, cache).sequences.tolist() == answer(target, None, text).sequences.tolist()
    cache.crop(-4)
    text = torch.cat([prefix[:, :8], tokens(5, 9)], dim=1)
    assert answer(target, head, text, cache).sequences.tolist() == answer(target, None, text).sequences.tolist()


@pytest.mark.parametrize("architecture", WINDOWS, ids=str)
def test_a_batch_goes_on_from_its_own_cache(architecture: Architecture) -> None:
    """Rows padded on the left, one of them ended early: its padding stands in the cache as in plain decoding."""
    target = attach(architecture.build("sdpa"))
    head = DraftHead.from_target(target)
    text = tokens(8, rows=3)
    mask = torch.ones_like(text)
    mask[1, :3] = 0
    ends = answer(target, None, text, attention_mask=mask).sequences[0, 10].item()
    options = {"eos_token_id": ends, "pad_token_id": 0, "max_new_tokens": 12}
    outs = []
    for drafter in (None, head):
        own = DynamicCache(config=target.config)
        first = answer(target, drafter, text, own, attention_mask=mask, **options)
        assert (first.sequences == 0).any(), "no row ended early: the test shows nothing"
        whole = torch.cat([first.sequences, tokens(4, 1, rows=3)], dim=1)
        # All ones behind the prompt: the padding of the row that ended is read, too.
        longer = torch.cat([mask, mask.new_ones(3, whole.shape[1] - mask.shape[1])], dim=1)
        later = {"attention_mask": longer, "max_new_tokens": 6, "policy": BOTH}
        second = answer(target, drafter, whole, first[CACHE_KEYWORD], **later)
        new = whole[:, first[CACHE_KEYWORD].get_seq_length() :]
        outs.append((first, second, answer(target, drafter, new, first[CACHE_KEYWORD], **later)))
    for ours, theirs in zip(outs[1], outs[0], strict=True):
        assert ours.sequences.tolist() == theirs.sequences.tolist()
        check_equal_caches(ours[CACHE_KEYWORD], theirs[CACHE_KEYWORD])
        assert ours.speculation.target_forwards < ours.sequences.shape[1]


HANDED_BACK: dict[str, dict[str, Any]] = {
    "greedy, each row on its own": {},
    "sampled in lockstep": SAMPLED,
    "rows that stay where something looks at all of them": SAMPLED | {"output_scores": True},
    "auto": {"policy": "auto"},
    "static": {"cache_implementation": "static"},
    "static, sampled": SAMPLED | {"cache_implementation": "static"},
}


@pytest.mark.parametrize("name", HANDED_BACK)
@pytest.mark.parametrize("architecture", WINDOWS, ids=str)
def test_a_batch_hands_back_the_cache_of_plain_decoding(architecture: Architecture, name: str) -> None:
    """The padding of the rows that ended earlier included: a mask of ones shows it, as in plain decoding."""
    target = attach(architecture.build("sdpa"))
    head = DraftHead.from_target(target)
    text = tokens(8, rows=4)
    mask = torch.ones_like(text)
    mask[1, :3] = 0
    asked = HANDED_BACK[name]
    unended = answer(target, None, text, attention_mask=mask, **asked).sequences
    ends = [unended[0, 10].item(), unended[2, 13].item()]
    options = {"attention_mask": mask, "eos_token_id": ends, "pad_token_id": 0, "max_new_tokens": 14} | asked
    plain, found = (answer(target, drafter, text, **options) for drafter in (None, head))
    assert found.sequences.tolist() == plain.sequences.tolist()
    assert len({int((row == 0).sum()) for row in plain.sequences}) > 1, "the rows ended at once: nothing was shown"
    ours, theirs = found[CACHE_KEYWORD], plain[CACHE_KEYWORD]
    assert isinstance(ours, type(theirs))
    if isinstance(theirs, StaticCache):
        check_equal_static_caches(ours, theirs)
        return
    whole = torch.cat([plain.sequences, tokens(4, 1, rows=4)], dim=1)
    later = {"attention_mask": torch.cat([mask, mask.new_ones(4, whole.shape[1] - 8)], dim=1)}
    for cache in (copy.deepcopy(ours), ours):
        second = answer(target, head, whole, cache, policy=BOTH, **later)
        assert second.sequences.tolist() == answer(target, None, whole, theirs, **later).sequences.tolist()
    check_equal_caches(ours, theirs)


@pytest.mark.skipif(not HAS_RECURRENT_STATES, reason="hybrids are refused")
@pytest.mark.parametrize("asked", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("architecture", recurrent("qwen3_5_text", "falcon_h1-clamped"), ids=str)
def test_a_batch_of_a_hybrid_hands_back_states_that_have_read_the_padding(
    architecture: RecurrentArchitecture, asked: dict[str, Any]
) -> None:
    """Mamba-2 cuts the time steps of several tokens at once, and plain decoding reads one at a time."""
    target = attach(architecture.build())
    text = tokens(8, rows=3) % target.config.vocab_size
    ends = answer(target, None, text, **asked).sequences[0, 10].item()
    options = {"eos_token_id": ends, "pad_token_id": 0, **asked}
    plain, found = (answer(target, drafter, text, **options) for drafter in (None, DraftHead.from_target(target)))
    assert (plain.sequences == 0).any(), "no row ended early: the test shows nothing"
    check_equal_caches(found[CACHE_KEYWORD], plain[CACHE_KEYWORD], 1e-4)


def check_equal_static_caches(found: StaticCache, wanted: StaticCache) -> None:
    """Without the oldest entry of a full window, which the next token overwrites unseen."""
    for ours, theirs in zip(found.layers, wanted.layers, strict=True):
        assert type(ours) is type(theirs) and int(ours.get_seq_length()) == int(theirs.get_seq_length())
        first = int(theirs.is_sliding and theirs.get_seq_length() >= theirs.keys.shape[2])
        torch.testing.assert_close(ours.keys[:, :, first:], theirs.keys[:, :, first:], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(ours.values[:, :, first:], theirs.values[:, :, first:], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_static_cache_comes_back_as_one_and_serves_the_next_forward(
    target: PreTrainedModel, head: DraftHead, rows: int
) -> None:
    text = tokens(6, rows=rows)
    found = answer(target, head, text, cache_implementation="static", eos_token_id=None, max_length=20)
    plain = answer(target, None, text, cache_implementation="static", eos_token_id=None, max_length=20)
    check_equal_static_caches(found[CACHE_KEYWORD], plain[CACHE_KEYWORD])
    assert found[CACHE_KEYWORD].get_max_length() == plain[CACHE_KEYWORD].get_max_length()


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("architecture", WINDOWS, ids=str)
def test_a_conversation_goes_on_in_a_static_cache_of_the_callers_own(architecture: Architecture, rows: int) -> None:
    """The second turn goes past the windows, and the cache was filled by the other way of decoding."""
    target = attach(architecture.build("sdpa"))
    head = DraftHead.from_target(target)
    caches = [StaticCache(config=target.config, max_cache_len=32) for _ in range(2)]
    text = tokens(5, rows=rows)
    for turn, new in enumerate((4, 9)):
        outs = []
        for drafter, cache in zip((head, None), caches if turn == 0 else caches[::-1], strict=True):
            set_seed(turn)
            extra = {} if drafter is None else {"assistant_model": drafter, "policy": WIDE}
            options = {"attention_mask": torch.ones_like(text), "max_new_tokens": new, "eos_token_id": None}
            outs.append(
                target.generate(
                    text, return_dict_in_generate=True, **{CACHE_KEYWORD: cache}, **options, **SAMPLED, **extra
                )
            )
            assert outs[-1][CACHE_KEYWORD] is cache
        assert outs[0].sequences.tolist() == outs[1].sequences.tolist()
        check_equal_static_caches(*caches)
        text = torch.cat([outs[0].sequences, tokens(3, turn, rows=rows)], dim=1)


def test_the_padding_of_a_batch_is_read_when_its_cache_is_first_looked_at(
    target: PreTrainedModel, head: DraftHead
) -> None:
    text = tokens(8, rows=3)
    ends = answer(target, None, text).sequences[0, 10].item()
    plain = answer(target, None, text, eos_token_id=ends, pad_token_id=0)
    found = answer(target, head, text, eos_token_id=ends, pad_token_id=0)
    forwards: list[int] = []
    handle = target.register_forward_pre_hook(lambda *_: forwards.append(1))
    copied = pickle.loads(pickle.dumps(found[CACHE_KEYWORD]))
    assert forwards, "the padding was read before: that cost every call a forward"
    del forwards[:]
    for cache in (found[CACHE_KEYWORD], copied):
        assert isinstance(cache, DynamicCache)
        check_equal_caches(cache, plain[CACHE_KEYWORD])
    handle.remove()
    assert not forwards, "it was read twice"


@pytest.mark.parametrize("architecture", WINDOWS, ids=str)
@pytest.mark.parametrize("uses", [1, 4, 7, 8])
def test_a_call_that_was_interrupted_leaves_a_cache_to_go_on_from(architecture: Architecture, uses: int) -> None:
    """As long a one as plain decoding leaves, in the middle of a walk, too, where it has every node of the tree."""
    target = attach(architecture.build("sdpa"))
    head = DraftHead.from_target(target)
    first = answer(target, None, tokens(6))
    text = torch.cat([first.sequences, tokens(7, 1)], dim=1)
    whole = answer(target, None, text, max_new_tokens=16).sequences
    left = []
    for extra in ({}, {"assistant_model": head, "policy": WIDE}):
        own = copy.deepcopy(first[CACHE_KEYWORD])
        options = {CACHE_KEYWORD: own, "logits_processor": LogitsProcessorList([Raises(uses)]), **extra}
        with pytest.raises(KeyboardInterrupt):
            target.generate(text, max_new_tokens=16, **options)
        left.append(own)
    plain, cache = left
    check_equal_caches(cache, plain)
    kept = cache.get_seq_length()
    found = answer(target, None, whole[:, : kept + 1], cache, max_new_tokens=6)
    assert found.sequences.tolist() == whole[:, : kept + 7].tolist()
    check_equal_caches(
        found[CACHE_KEYWORD], answer(target, None, whole[:, : kept + 1], max_new_tokens=6)[CACHE_KEYWORD]
    )


def test_a_forward_cut_in_the_middle_of_the_layers_leaves_none_of_it(target: PreTrainedModel, head: DraftHead) -> None:
    cache = answer(target, None, tokens(6))[CACHE_KEYWORD]
    before = copy.deepcopy(cache)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = target.model.layers[2].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        target.generate(tokens(20), assistant_model=head, **{CACHE_KEYWORD: cache})
    handle.remove()
    check_equal_caches(cache, before)


def test_the_limits_count_from_the_conversations_beginning(target: PreTrainedModel, head: DraftHead) -> None:
    first = answer(target, head, tokens(6))
    text = torch.cat([first.sequences, tokens(3, 1)], dim=1)
    for most in range(1, 7):
        limit = {"max_new_tokens": None, "max_length": text.shape[1] + most}
        found = answer(target, head, text, first[CACHE_KEYWORD], **limit)
        assert found.sequences.tolist() == answer(target, None, text, **limit).sequences.tolist()
        assert found.speculation.emitted_total == most


def test_learned_positions_end_where_they_end() -> None:
    """A tree in a second turn goes no deeper than GPT-2's table of positions."""
    target = attach(Architecture("gpt2", {"n_embd": 32, "n_head": 4, "n_layer": 4, "n_positions": 24}).build("sdpa"))
    head = DraftHead.from_target(target)
    first = answer(target, head, tokens(6))
    text = torch.cat([first.sequences, tokens(3, 1)], dim=1)
    options = {"max_new_tokens": 24 - text.shape[1], "policy": FixedPolicy(TreeShape(30, 12, 4))}
    plain = answer(target, None, text, first[CACHE_KEYWORD], **options)
    found = answer(target, head, text, first[CACHE_KEYWORD], **options)
    assert found.sequences.tolist() == plain.sequences.tolist()


@pytest.mark.parametrize(
    ("length", "mask_length"), [(14, 14), (10, 10), (3, 3), (3, 16), (20, 34 + 1)], ids=lambda value: str(value)
)
def test_a_cache_that_does_not_fit_the_text_is_refused(
    target: PreTrainedModel, head: DraftHead, length: int, mask_length: int
) -> None:
    first = answer(target, head, tokens(6))
    assert first[CACHE_KEYWORD].get_seq_length() == 14
    options = {"attention_mask": torch.ones(1, mask_length, dtype=torch.long)}
    with pytest.raises(ValueError, match="Got a cache of 14 positions, a text.*Pass the whole conversation"):
        answer(target, head, tokens(length), first[CACHE_KEYWORD], **options)


def test_a_cache_in_front_of_a_boundary_is_refused_where_phi3_reads_anew() -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    config = {"rope_parameters": rope, "original_max_position_embeddings": 20}
    target = attach(Architecture("phi3", config).build("sdpa"))
    head = DraftHead.from_target(target)
    first = answer(target, head, tokens(6))
    text = torch.cat([first.sequences, tokens(9, 1)], dim=1)
    with pytest.raises(ValueError, match="may grow from 14 to 33 positions, past 20"):
        answer(target, head, text, first[CACHE_KEYWORD])
    within = {"max_new_tokens": 2}
    text = text[:, :18]
    plain = answer(target, None, text, first[CACHE_KEYWORD], **within)
    assert answer(target, head, text, first[CACHE_KEYWORD], **within).sequences.tolist() == plain.sequences.tolist()
