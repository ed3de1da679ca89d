"""Prompts of embeddings, with their tokens or without: the answers and caches of plain decoding.

With several answers for each prompt, too, of whatever kind it is.
"""

import copy
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, set_seed

from tests.caches import check_equal_caches
from tests.lossless.answering import SAMPLING, WIDE, Heard
from tests.targets import ARCHITECTURES, VOCABULARY, Architecture
from transformers_resps import DraftHead, FixedPolicy, attach
from transformers_resps.compat import CACHE_KEYWORD


# Scaled embeddings and windows, and learned positions, beside the plainest.
CASES = [each for each in ARCHITECTURES if str(each) in ("llama", "gemma3_text", "gpt2")]
CALLS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "greedy, ends": {"eos_token_id": [5, 9]},
    "sampled": SAMPLING,
    "sampled, ends": SAMPLING | {"eos_token_id": [5, 9]},
    "two answers": SAMPLING | {"num_return_sequences": 2, "eos_token_id": [5, 9]},
    "static": {"cache_implementation": "static"},
    "max_length": {"max_new_tokens": None, "max_length": 24},
    "the usual length": {"max_new_tokens": None},
    "processors": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 3},
    "scores": SAMPLING | {"output_scores": True, "output_logits": True},
}
# How a call ends and what it returns depends on no architecture.
OF_ALL = ("greedy", "sampled, ends", "static")


Prompts = dict[str, dict[str, torch.Tensor]]


@pytest.fixture(scope="module", params=CASES, ids=str)
def target(request: pytest.FixtureRequest) -> PreTrainedModel:
    architecture: Architecture = request.param
    return attach(architecture.build("sdpa"))


@pytest.fixture(scope="module")
def prompts(target: PreTrainedModel) -> Prompts:
    """One row and three of which one is padded; embeddings of no token stand before the tokens of the last two."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    embeds = target.get_input_embeddings()(ids).detach()
    soft = torch.randn(3, 4, embeds.shape[-1], generator=generator).to(embeds) * embeds.std()
    longer, seen = torch.cat([soft, embeds], dim=1), torch.cat([torch.ones_like(ids[:, :4]), mask], dim=1)
    seen[1, :8] = 0
    return {
        "one": {"inputs_embeds": embeds[:1]},
        "padded": {"inputs_embeds": embeds, "attention_mask": mask},
        "one with its tokens": {"input_ids": ids[:1], "inputs_embeds": embeds[:1]},
        "padded with their tokens": {"input_ids": ids, "inputs_embeds": embeds, "attention_mask": mask},
        "of no tokens": {"inputs_embeds": longer[:1]},
        "of no tokens, padded": {"inputs_embeds": longer, "attention_mask": seen},
        "tokens": {"input_ids": ids, "attention_mask": mask},
    }


def call(target: Any, options: dict[str, Any], **extra: Any) -> tuple[Any, torch.Tensor]:
    """The output, and what the random generator is left with."""
    set_seed(1)
    usual = {"max_new_tokens": 10, "eos_token_id": None, "pad_token_id": 0, "return_dict_in_generate": True}
    return target.generate(**usual | options | extra), torch.get_rng_state()


@pytest.mark.parametrize("name", OF_ALL)
def test_a_prompt_of_embeddings_is_answered_as_plain_decoding_does(
    name: str, target: PreTrainedModel, head: DraftHead, prompts: Prompts
) -> None:
    check(CALLS[name], target, head, prompts)


@pytest.mark.parametrize("target", CASES[:1], indirect=True, ids=str)
@pytest.mark.parametrize("name", [name for name in CALLS if name not in OF_ALL])
def test_any_other_call_is_answered_likewise(
    name: str, target: PreTrainedModel, head: DraftHead, prompts: Prompts
) -> None:
    check(CALLS[name], target, head, prompts)


def check(settings: dict[str, Any], target: Any, head: DraftHead, prompts: Prompts) -> None:
    """Compare the answers to all prompts with plain ones."""
    accepted = 0
    for number, (kind, prompt) in enumerate(prompts.items()):
        options = prompt | settings
        drafting = {"policy": "auto"} if number % 2 else {"assistant_model": head, "policy": FixedPolicy(WIDE)}
        plain, drawn = call(target, options)
        found, left = call(target, options, **drafting)
        assert found.sequences.tolist() == plain.sequences.tolist(), kind
        assert torch.equal(left, drawn), f"{kind}: drafting drew from the global generator"
        for ours, theirs in zip(found.scores or (), plain.scores or (), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
        if "cache_implementation" not in options:
            check_equal_caches(found[CACHE_KEYWORD], plain[CACHE_KEYWORD])
        accepted += sum(step.accepted_total for step in found.speculation.steps)
    assert accepted > 0, "no drafted token was ever accepted: the comparison proved nothing"


@pytest.mark.parametrize("kind", ["one", "one with its tokens", "of no tokens"])
def test_the_answer_to_embeddings_streams(
    kind: str, target: PreTrainedModel, head: DraftHead, prompts: Prompts
) -> None:
    plain, tree = Heard(), Heard()
    call(target, prompts[kind], streamer=plain)
    call(target, prompts[kind], streamer=tree, assistant_model=head, policy=FixedPolicy(WIDE))
    assert tree.values == plain.values and tree.ended == plain.ended == 1


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("as_tokens", [False, True], ids=["embeddings again", "tokens"])
def test_a_conversation_that_began_with_embeddings_goes_on(
    target: PreTrainedModel, head: DraftHead, prompts: Prompts, rows: int, as_tokens: bool
) -> None:
    whole = prompts["padded with their tokens"]
    ids, embeds = whole["input_ids"][:rows], whole["inputs_embeds"][:rows]
    drafting = {"assistant_model": head, "policy": FixedPolicy(WIDE)}
    first, _ = call(target, {"inputs_embeds": embeds, "attention_mask": torch.ones_like(ids)}, **drafting)
    longer = torch.cat([ids, first.sequences], dim=1)
    options: dict[str, Any] = {"attention_mask": torch.ones_like(longer)}
    if as_tokens:
        options["input_ids"] = longer
    else:
        options["inputs_embeds"] = torch.cat([embeds, target.get_input_embeddings()(first.sequences).detach()], dim=1)
    plain, found = (
        call(target, options, **{CACHE_KEYWORD: copy.deepcopy(first[CACHE_KEYWORD])}, **extra)[0]
        for extra in ({}, drafting)
    )
    assert found.sequences.tolist() == plain.sequences.tolist()
    check_equal_caches(found[CACHE_KEYWORD], plain[CACHE_KEYWORD])


def test_several_greedy_answers_are_refused_as_in_plain_decoding(target: PreTrainedModel, head: DraftHead) -> None:
    for extra in ({}, {"policy": "auto"}, {"assistant_model": head}):
        with pytest.raises(ValueError, match="Greedy|num_return_sequences"):
            call(target, {"input_ids": torch.tensor([[3, 4]]), "num_return_sequences": 2}, **extra)
