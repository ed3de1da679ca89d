"""A block head writes what plain `generate` writes, and along its best path what Transformers' own chain drafts."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from tests.conftest import build_target
from tests.drafting.test_block_drafter import KINDS, block_head
from tests.lossless.hybrids import SAMPLED, AnyShape, check_counts, compare, padded
from tests.recurrent_targets import NEEDS_STATES, recurrent
from transformers_resps import FixedPolicy, TreeShape, attach


MUSE = "transformers.models.muse_glimmer_assistant.modeling_muse_glimmer_assistant"


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return attach(build_target(initializer_range=0.3))


def written(target: PreTrainedModel, options: dict[str, Any], **ours: Any) -> list[list[int]]:
    torch.manual_seed(7)
    ids = torch.tensor([[1, 17, 23, 5, 42, 17, 23], [0, 0, 9, 8, 7, 6, 5]])
    found: list[list[int]] = target.generate(
        ids, attention_mask=(ids > 0).long(), max_new_tokens=24, pad_token_id=0, **options, **ours
    ).tolist()
    return found


CALLS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 0.8},
    "processed": {"do_sample": True, "top_p": 0.9, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", CALLS)
def test_any_policy_writes_what_plain_generate_writes(target: PreTrainedModel, kind: str, call: str) -> None:
    head, plain = block_head(target, **KINDS[kind]), written(target, CALLS[call])
    for policy in (None, "auto", FixedPolicy(TreeShape(24, 3, 8, lookup=4)), AnyShape(1, 64)):
        for lockstep in (None, True):
            assert written(target, CALLS[call], assistant_model=head, policy=policy, lockstep=lockstep) == plain


@NEEDS_STATES
@pytest.mark.parametrize("hybrid", recurrent("qwen3_next", "falcon_h1-clamped", "lfm3"), ids=str)
@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_a_hybrid_writes_what_it_writes_plainly(hybrid: Any, options: dict[str, Any]) -> None:
    target = attach(hybrid.build())
    head = block_head(target, feature_layers=[1, 2])
    reports = [compare(target, head, padded(3, seed), seed, **options) for seed in range(2)]
    check_counts(*reports, in_a_row=1)


@pytest.mark.parametrize("call", CALLS)
def test_the_invariant_text_is_the_same_with_and_without_it(target: PreTrainedModel, call: str) -> None:
    head, half = block_head(target), build_target(initializer_range=0.3).to(torch.bfloat16)
    attach(half)
    plain = written(half, CALLS[call], invariant=True)
    policy = FixedPolicy(TreeShape(24, 3, 8))
    assert written(half, CALLS[call], invariant=True, assistant_model=head.to(torch.bfloat16), policy=policy) == plain


def test_a_block_longer_than_the_room_left_is_cut(target: PreTrainedModel) -> None:
    """A step writes a token more than it accepts, so that the last of them are not drafted."""
    ids, left = torch.tensor([[1, 17, 23, 5, 42, 17, 23]]), 6
    options: dict[str, Any] = {"assistant_model": block_head(target), "policy": FixedPolicy(TreeShape(5, 4, 1))}
    call = {"attention_mask": torch.ones_like(ids), "do_sample": False, "return_dict_in_generate": True}
    out = target.generate(ids, **call, **options, max_new_tokens=left, min_new_tokens=left)
    drafted = []
    for step in out.speculation.steps:
        if step is not out.speculation.steps[0]:
            assert step.drafted == step.verified - 1 == min(4, left - 1)
            drafted.append(step.drafted)
        left -= step.emitted_total
    assert left == 0 and min(drafted) < 4


@pytest.mark.parametrize("window", [5, 256])
@torch.no_grad()
def test_its_best_path_is_the_chain_of_transformers(target: PreTrainedModel, window: int) -> None:
    """Token by token, as the text grows by what the target keeps of the chain and its own pick."""
    modeling = pytest.importorskip(MUSE)
    from transformers.generation.candidate_generator import DFlashTokenCandidateGenerator

    from transformers_resps.assistants import source_of
    from transformers_resps.drafting import Committed, DraftCall, DraftRequest

    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3, "sliding_window": window}
    sizes |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    tokens = {"mask_token_id": 63, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = modeling.MuseGlimmerAssistantConfig(**sizes, **tokens, block_size=5, target_layer_ids=[0, 2])
    torch.manual_seed(0)
    model = modeling.MuseGlimmerAssistantModel(config).eval()
    chain = DFlashTokenCandidateGenerator(
        model, target.get_input_embeddings(), target.get_output_embeddings(), GenerationConfig(max_length=200)
    )
    ours = source_of(model, target).drafter(DraftCall(target))
    text, kept, cache = torch.tensor([[1, 17, 23, 5, 42, 17, 23]]), 0, DynamicCache(config=target.config)
    outputs = target(text, output_hidden_states=True, past_key_values=cache)
    known = text.shape[1]
    gained = torch.cat([text[:, 1:], outputs.logits[:, -1:].argmax(-1)], dim=1)
    features = torch.cat([outputs.hidden_states[layer] for layer in (1, 3)], dim=-1)
    text = torch.cat([text, gained[:, -1:]], dim=1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(12):
        ours.observe(Committed(gained, features[:, : gained.shape[1]]))
        places = {"position_ids": torch.arange(text.shape[1])[None], "attention_mask": torch.ones_like(text)}
        drafted, _ = chain.get_candidates(text, places, outputs, False, kept)
        pool = ours.draft(text, DraftRequest(TreeShape(5, 4, 1)))
        assert pool.tokens.tolist() == drafted[:, text.shape[1] :].tolist()
        kept = int(torch.randint(0, 5, (), generator=generator))  # as if the target kept so many
        outputs = target(drafted[:, known:], output_hidden_states=True, past_key_values=cache)
        features = torch.cat([outputs.hidden_states[layer] for layer in (1, 3)], dim=-1)
        pick = outputs.logits[:, kept : kept + 1].argmax(-1)
        gained = torch.cat([drafted[:, text.shape[1] : text.shape[1] + kept], pick], dim=1)
        known += kept + 1
        if kept < 4:
            cache.crop(kept - 4)
        text = torch.cat([text, gained], dim=1)
