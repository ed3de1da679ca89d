"""Tiny Gemma 4 targets and their assistants, and what an assistant drafts after a text that is read at once."""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.gemma4 import Gemma4TextConfig
from transformers.models.gemma4_assistant import Gemma4AssistantConfig, Gemma4AssistantForCausalLM

from tests.targets import SIZES


VOCABULARY, WINDOW = 24, 64
_SIZES = SIZES | {"vocab_size": VOCABULARY, "global_head_dim": 16, "sliding_window": WINDOW}
KINDS = ["sliding_attention", "full_attention"]


def gemma_target(**overrides: Any) -> PreTrainedModel:
    """Six layers, of which the last two use the keys of the two before them."""
    sizes = _SIZES | {"hidden_size": 32, "num_hidden_layers": 6, "layer_types": KINDS * 3, "initializer_range": 0.4}
    shared = {"num_kv_shared_layers": 2, "hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": VOCABULARY}
    config = AutoConfig.for_model("gemma4_text", **(sizes | shared | overrides))
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32).eval()


def gemma_assistant(backbone_hidden_size: int = 32, *, centroids: bool = False, **overrides: Any) -> PreTrainedModel:
    """Two layers over the target's keys. With `centroids` it proposes the tokens of 2 of 8."""
    sizes = _SIZES | {"hidden_size": 16, "num_hidden_layers": 2, "layer_types": KINDS, "initializer_range": 0.4}
    none = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    config = Gemma4AssistantConfig(
        text_config=Gemma4TextConfig(**(sizes | none | overrides)),
        backbone_hidden_size=backbone_hidden_size,
        use_ordered_embeddings=centroids,
        num_centroids=8,
        centroid_intermediate_top_k=2,
    )
    torch.manual_seed(1)
    model = Gemma4AssistantForCausalLM(config).eval()
    model.generation_config.num_assistant_tokens = 4
    if centroids:
        model.masked_embedding.token_ordering.copy_(torch.randperm(VOCABULARY))
    return model


@torch.no_grad()
def chain_after(
    assistant: Any, target: Any, text: list[int], levels: int, *, rejected: tuple[int, ...] = ()
) -> list[tuple[int, Tensor]]:
    """The likeliest token of each level and the log probabilities `[v]`, by Transformers' modules alone.

    `rejected` are tokens in the root's place and after it whose keys are left in.
    """
    read = target(
        input_ids=torch.tensor([[*text[:-1], *rejected]]),
        output_hidden_states=True,
        return_shared_kv_states=True,
        use_cache=False,
    )
    token, state = torch.tensor([text[-1:]]), read.hidden_states[-1][:, len(text) - 2 : len(text) - 1]
    found = []
    for _ in range(levels):
        drafted = assistant(
            inputs_embeds=torch.cat([target.get_input_embeddings()(token), state], dim=-1),
            position_ids=torch.tensor([[len(text) - 1]]),
            shared_kv_states=dict(read.shared_kv_states),
        )
        token, state = drafted.logits.argmax(dim=-1), drafted.last_hidden_state
        found.append((int(token), drafted.logits[0, 0].log_softmax(-1)))
    return found
