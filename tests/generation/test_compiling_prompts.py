"""Prompts that compiled code reads: the text and the cache of plain decoding, and few rows of logits."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, set_seed

from tests.caches import check_equal_caches
from tests.compilation.as_it_is import compiled_as_it_is
from tests.targets import ARCHITECTURES, VOCABULARY, Architecture
from transformers_resps import DraftHead, FixedPolicy, TreeShape, attach
from transformers_resps.compat import CACHE_KEYWORD
from transformers_resps.verifying.slots import prompts


WIDE = FixedPolicy(TreeShape(40, 3, VOCABULARY))
_NAMES = ("llama", "mistral-window", "qwen2-mixed-windows", "gemma3_text", "gpt2", "deepseek_v3", "gpt_oss")
_CASES = [architecture for architecture in ARCHITECTURES if str(architecture) in _NAMES]
_PADDED = torch.tensor([[1] * 13, [0] * 10 + [1] * 3, [0] * 2 + [1] * 11])


@pytest.fixture(autouse=True)
def forwards(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[torch.Size, torch.Size]]]:
    """Shapes of tokens and logits of each compiled forward; one reads five tokens of a prompt at most, and sees fewer
    slots than there are of padding.
    """
    monkeypatch.setattr(prompts, "_PART", 5)
    monkeypatch.setattr(prompts, "_PART_WINDOW", 8)
    with compiled_as_it_is() as noted:
        yield noted


@pytest.fixture
def target() -> PreTrainedModel:
    return attach(Architecture("llama").build("sdpa"))


@pytest.fixture
def head(target: PreTrainedModel) -> DraftHead:
    torch.manual_seed(1)
    return DraftHead.from_target(target, feature_layers=[0, 2])


def tokens(count: int, rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, count), generator=torch.Generator().manual_seed(seed))


def answer(target: Any, text: torch.Tensor, head: DraftHead | None = None, cache: Any = None, **options: Any) -> Any:
    """With a head compiled, else plain; a cache that is passed is left as it was."""
    options = {"attention_mask": torch.ones_like(text), "max_new_tokens": 9, "return_dict_in_generate": True} | options
    if head is not None:
        options |= {"assistant_model": head, "policy": WIDE, "compile": True}
    if cache is not None:
        options[CACHE_KEYWORD] = copy.deepcopy(cache)
    set_seed(5)
    return target.generate(text, **options)


@pytest.mark.parametrize("architecture", _CASES, ids=str)
def test_text_and_cache_are_those_of_plain_decoding(architecture: Architecture, forwards: Any) -> None:
    """One row and several, padded, in chunks of the caller's or not; a window ends inside the prompt."""
    target = attach(architecture.build(architecture.attention[-1] if architecture.has_experts else "sdpa"))
    torch.manual_seed(1)
    head = DraftHead.from_target(target, feature_layers=[0, 2])
    for rows, chunk, do_sample in ((1, None, False), (1, 3, True), (2, 8, False), (3, None, True)):
        mask = _PADDED[:rows]
        text = tokens(13, rows) * mask
        options = {"attention_mask": mask, "do_sample": do_sample}
        plain = answer(target, text, **options)
        forwards.clear()
        found = answer(target, text, head, prefill_chunk_size=chunk, **options)
        assert found.sequences.tolist() == plain.sequences.tolist()
        assert sum(logits[1] <= 4 for read, logits in forwards if read[1] > logits[1]) >= 13 // (chunk or 13)
        if rows == 1:
            check_equal_caches(found[CACHE_KEYWORD], plain[CACHE_KEYWORD])


def test_logits_are_computed_for_the_last_token_alone(target: PreTrainedModel, head: DraftHead, forwards: Any) -> None:
    """Of twelve tokens, in three parts; a dimension of size one would be compiled apart."""
    answer(target, tokens(12), head, max_new_tokens=1)
    assert forwards == [((1, 4), (1, 2, VOCABULARY))] * 3


def test_no_logits_of_padding_are_computed_by_which_compiled_code_would_be_checked(
    target: PreTrainedModel, head: DraftHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lone token of padding has states so large that rounding alone moves its logits by a quarter."""
    inputs, made = prompts.PartReader.inputs, list[tuple[int, list[torch.Tensor]]]()

    def noted(reader: Any, part: torch.Tensor, start: int) -> list[torch.Tensor]:
        made.append((start, inputs(reader, part, start)))
        return made[-1][1]

    monkeypatch.setattr(prompts.PartReader, "inputs", noted)
    text = tokens(13, rows=3) * _PADDED
    answer(target, text, head, attention_mask=_PADDED)
    assert len(made) == 3 and made[0][0] == 0
    for start, (_, depths, _, _, _, kept, packed) in made:
        rows, places = packed[kept[:3]] // depths.shape[1], packed[kept[:3]] % depths.shape[1]
        assert _PADDED[rows, start + places].all()
    assert rows.tolist() == [0, 1, 2]  # at the end each row has its own


def test_a_step_of_as_many_nodes_as_rows_is_not_filled_up(
    target: PreTrainedModel, head: DraftHead, forwards: Any
) -> None:
    """The prompt was read by the same code, whose sizes differed when it was compiled."""
    chain = FixedPolicy(TreeShape(4, 3, 1))
    text = tokens(7, rows=4)
    options = {"attention_mask": torch.ones_like(text), "max_new_tokens": 12, "assistant_model": head, "policy": chain}
    target.generate(text, compile=True, lockstep=False, **options)
    steps = [given for given, _ in forwards if given[1] < 7]
    assert (4, 4) in steps and (4, 5) not in steps[2:]


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_a_conversation_goes_on_by_reading_its_new_tokens(name: str, forwards: Any) -> None:
    target = attach(next(found for found in ARCHITECTURES if str(found) == name).build("sdpa"))
    head = DraftHead.from_target(target, feature_layers=[0, 2])
    text, cache = tokens(11), None
    for turn in range(3):
        plain = answer(target, text)
        forwards.clear()
        found = answer(target, text, head, cache)
        assert found.sequences.tolist() == plain.sequences.tolist()
        check_equal_caches(found[CACHE_KEYWORD], plain[CACHE_KEYWORD])
        assert len([read for read, logits in forwards if read[1] > logits[1]]) == (3 if turn == 0 else 1)
        cache, text = found[CACHE_KEYWORD], torch.cat([found.sequences, tokens(4, seed=turn)], dim=1)


@pytest.mark.parametrize(("chunk", "kept"), [(None, 0), (4, 4)], ids=["whole", "chunks"])
@pytest.mark.parametrize("is_given", [False, True], ids=["empty", "continued"])
def test_a_forward_cut_in_the_middle_leaves_the_chunks_that_were_read(
    target: PreTrainedModel, head: DraftHead, chunk: int | None, kept: int, is_given: bool
) -> None:
    """Those of the caller: parts that a chunk is read in leave nothing."""
    first, text = answer(target, tokens(6)), tokens(25, seed=1)
    text[:, :14] = first.sequences[:, :14]
    cache = copy.deepcopy(first[CACHE_KEYWORD]) if is_given else type(first[CACHE_KEYWORD])(config=target.config)
    known, calls = (14 if is_given else 0), 0

    def interrupt(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt

    target.speculation_state.slot_engine.pattern(target)
    handle = target.model.layers[2].register_forward_hook(interrupt)
    options = {"assistant_model": head, "policy": WIDE, "compile": True, "prefill_chunk_size": chunk}
    with pytest.raises(KeyboardInterrupt):
        target.generate(text, **{CACHE_KEYWORD: cache}, **options)
    handle.remove()
    assert cache.get_seq_length() == known + kept
    again = answer(target, text, None, cache)
    assert again.sequences.tolist() == answer(target, text).sequences.tolist()


def test_what_compiled_code_cannot_read_is_read_as_it_is(
    head: DraftHead, target: PreTrainedModel, forwards: Any
) -> None:
    """A gap in the middle of a prompt, whose tokens stand elsewhere than those that follow."""
    text, mask = tokens(9, 2), torch.ones(2, 9, dtype=torch.long)
    mask[1, 3:5] = 0
    plain = answer(target, text, attention_mask=mask)
    assert answer(target, text, head, attention_mask=mask).sequences.tolist() == plain.sequences.tolist()
    assert forwards and all(read[1] <= logits[1] for read, logits in forwards)
