"""Gemma 4's assistants: what they see, what they draft, and which targets they refuse."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.generation.candidate_generator import SinglePositionMultiTokenCandidateGenerator

from tests.assistants.gemma import VOCABULARY, chain_after, gemma_assistant, gemma_target
from tests.conftest import build_target
from transformers_resps.assistants import GemmaAssistant
from transformers_resps.compat import CACHE_KEYWORD
from transformers_resps.tree import DraftTree
from transformers_resps.verifying.forward import TargetForward
from transformers_resps.verifying.growing import GrowingMode


PROMPT = [3, 4, 5, 6, 7, 9]


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return gemma_target()


def our_chain(assistant: PreTrainedModel, target: PreTrainedModel, root: int, levels: int) -> list[tuple[int, Any]]:
    """After the prompt, a tree of a root and two rejected nodes below it, and then `root`."""
    source = GemmaAssistant(assistant, target)
    model, layers = source.bind(target), source.feature_layers
    forward = TargetForward(target, layers, DynamicCache(config=target.config))
    with GrowingMode().verifier(forward, torch.arange(len(PROMPT))[None]) as verifier:
        verifier.prefill(torch.tensor([PROMPT]))
        nodes = torch.tensor([[11, 12, 13]])
        _, features = verifier.verify(DraftTree.from_parents(nodes, torch.tensor([[0, 0, 1]])))
        verifier.keep(torch.tensor([[0]]), [[0]])
        entries = model.cache(verifier).attend(0, 0)
        token, hidden, found = torch.tensor([[root]]), model.fuse(features.concatenated()[:, :1]), []
        for _ in range(levels):
            output = model.run(0, token, hidden, model.places(torch.zeros(1, 1)), entries)
            (tokens, scores), hidden = model.children(output, VOCABULARY), model.feedback(output, None)
            token = tokens[..., 0]
            found.append((int(token), torch.full((VOCABULARY,), -torch.inf).scatter(0, tokens[0, 0], scores[0, 0])))
    return found


@torch.no_grad()
def test_it_drafts_as_after_a_text_that_never_had_the_rejected_tokens(target: PreTrainedModel) -> None:
    assistant = gemma_assistant()
    expected = chain_after(assistant, target, [*PROMPT, 11, 8], levels=4)
    for (token, scores), (wanted, others) in zip(our_chain(assistant, target, 8, 4), expected, strict=True):
        assert token == wanted
        torch.testing.assert_close(scores, others, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_transformers_own_loop_shows_the_key_of_the_first_rejected_token(target: PreTrainedModel) -> None:
    assistant: Any = gemma_assistant()
    cache: Any = DynamicCache(config=target.config)
    told = {"output_hidden_states": True, "return_shared_kv_states": True, "use_cache": True, CACHE_KEYWORD: cache}
    generator = SinglePositionMultiTokenCandidateGenerator(
        assistant, target.get_input_embeddings(), GenerationConfig(max_length=99)
    )
    generator.num_assistant_tokens, generator.is_main_model_prefill = 4, False
    outputs = target(input_ids=torch.tensor([[*PROMPT, 11, 12, 13]]), **told)
    outputs.hidden_states = [states[:, len(PROMPT) :] for states in outputs.hidden_states]  # as of a step
    text = [*PROMPT, 11, 8]
    _, drafted = generator.get_candidates(
        torch.tensor([text]), model_kwargs={}, model_outputs=outputs, is_first_iteration=False, n_last_matches=0
    )
    with_rejected = torch.stack([scores for _, scores in chain_after(assistant, target, text, 4, rejected=(12,))])
    ours = torch.stack([scores for _, scores in our_chain(assistant, target, 8, 4)])
    torch.testing.assert_close(drafted[0].log_softmax(-1), with_rejected, atol=1e-4, rtol=1e-4)
    assert (with_rejected - ours).abs().amax(dim=-1).gt(0.1).all()


@torch.no_grad()
def test_only_tokens_of_the_nearest_centroids_have_a_chance(target: PreTrainedModel) -> None:
    assistant = gemma_assistant(centroids=True)
    expected = chain_after(assistant, target, [*PROMPT, 11, 8], levels=3)
    for (token, scores), (wanted, others) in zip(our_chain(assistant, target, 8, 3), expected, strict=True):
        possible = others > others.min()
        assert token == wanted and possible.sum() == 6
        torch.testing.assert_close(scores[possible], others[possible].log_softmax(-1), atol=1e-4, rtol=1e-4)
        assert scores[~possible].eq(-torch.inf).all()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"backbone_hidden_size": 48}, r"another size of Gemma: it needs hidden_size 48 \(this target: 32\)"),
        ({"vocab_size": 32}, r"it needs vocab_size 32 \(this target: 24\)"),
        ({"num_key_value_heads": 1}, r"sliding_attention keys 1x8 in a window of 64 \(this target: 2x8"),
        ({"sliding_window": 16}, r"in a window of 16 \(this target: 2x8 in a window of 64\)"),
    ],
    ids=["hidden", "vocabulary", "heads", "window"],
)
def test_an_assistant_of_another_size_is_refused_by_name(
    target: PreTrainedModel, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        GemmaAssistant(gemma_assistant(**changes), target)


def test_a_target_that_is_no_gemma_4_is_refused() -> None:
    with pytest.raises(ValueError, match=r"drafts for Gemma 4 alone, not for a LlamaForCausalLM \(llama\)"):
        GemmaAssistant(gemma_assistant(), build_target())
