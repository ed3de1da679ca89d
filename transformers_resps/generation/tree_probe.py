"""Checks that a model's architecture can verify a draft tree.

Architectures that the tests compare with plain decoding are not checked.
"""

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ..compat import CACHE_KEYWORD
from ..target.tree_verifier import TreeVerifier
from ..tree import DraftTree


# model_type of every architecture in tests/generation/test_architectures.py.
_COMPARED = frozenset(
    ("cohere2", "deepseek_v3", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "gpt_oss", "granite", "llama")
    + ("mistral", "mixtral", "olmo2", "phi3", "qwen2", "qwen3", "qwen3_moe", "smollm3")
)
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2}
_LOW_PRECISION_TOLERANCE = 0.25  # share of the largest logit; contamination between siblings is far above it


def check_tree_attention(target: PreTrainedModel) -> None:
    """Compare a two-branch tree with plain forwards over each branch, unless the architecture is a known one.

    Raises:
        ValueError: a node's logits depend on its siblings, or the forward fails on a tree's mask.
    """
    model_type = target.config.get_text_config().model_type
    if model_type in _COMPARED:
        return
    try:
        error, scale = _tree_error(target)
    except (TypeError, ValueError, RuntimeError, AttributeError) as failure:
        raise ValueError(
            f"{type(target).__name__} ({model_type}) fails on a draft tree's cache, positions and mask "
            f"({type(failure).__name__}: {failure}). Call `generate` without a head and a policy."
        ) from failure
    if not error <= _TOLERANCE.get(target.dtype, _LOW_PRECISION_TOLERANCE) * max(scale, 1.0):
        raise ValueError(
            f"{type(target).__name__} ({model_type}) gives logits that differ by {error:.3g} between a draft tree and "
            "the same tokens alone, so trees would change its output. Call `generate` without a head and a policy."
        )


@torch.no_grad()
def _tree_error(target: PreTrainedModel) -> tuple[float, float]:
    """The largest difference of logits between tree and text, and the largest logit.

    The tree: root 0, its children 1 and 2, then 3 below 1 and 4 below 2; the path 0, 2, 4 is kept and read on.
    """
    vocabulary = target.config.get_text_config().vocab_size
    tokens = torch.arange(1, 11, device=target.device).remainder(vocabulary)[None]
    prompt, nodes, after = tokens[:, :4], tokens[:, 4:9], tokens[:, 9:]
    tree = DraftTree.from_parents(nodes, torch.tensor([[0, 0, 0, 1, 2]], device=target.device))
    path = torch.tensor([[0, 2, 4]], device=target.device)
    with TreeVerifier.of(target, prompt.shape[1]) as verifier:
        verifier.prefill(prompt)
        verified, _ = verifier.verify(tree)
        verifier.keep(path, path.tolist())
        last, _ = verifier.verify(DraftTree.root_only(after[:, 0]))
    expected = _stepped(target, prompt, torch.cat([nodes.gather(1, path), after], dim=1))
    found = torch.cat([verified[:, path[0]], last], dim=1)
    return float((found - expected).abs().max()), float(expected.abs().max())


def _stepped(target: PreTrainedModel, prompt: Tensor, tokens: Tensor) -> Tensor:
    """The logits `[1, t, v]` of tokens `[1, t]` that are read one by one after a prompt, as plain decoding reads them.

    Mamba-2 reads several at once with other time steps.
    """
    cache = DynamicCache(config=target.config.get_text_config(decoder=True))
    logits, start = [], 0
    for part in (prompt, *tokens.split(1, dim=1)):
        positions = torch.arange(start, start + part.shape[1], device=part.device)[None]
        inputs = {"input_ids": part, "position_ids": positions, "use_cache": True, CACHE_KEYWORD: cache}
        logits.append(target(**inputs).logits[:, -1:])
        start += part.shape[1]
    return torch.cat(logits[1:], dim=1)
