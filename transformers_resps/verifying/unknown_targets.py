"""Check, for an architecture without tests, that a tree's nodes get the same logits as in plain decoding."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..tree import DraftTree
from .attention import is_flash
from .forward import TargetForward
from .growing import GrowingMode
from .masks import last_position
from .verifier import Verifier


# model_type of every architecture that tests/lossless/test_architectures.py tests.
COMPARED = frozenset(
    ("cohere2", "deepseek_v3", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "gpt_oss", "granite", "llama")
    + ("mistral", "mixtral", "olmo2", "phi3", "qwen2", "qwen3", "qwen3_moe", "smollm3")
)
FAILURES = (TypeError, ValueError, RuntimeError, AttributeError, AssertionError, IndexError)
_LOGIT_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2}
_LOW_PRECISION_LOGIT_TOLERANCE = 0.25  # share of the largest logit; wrong masks cause far larger differences


def check_tree_attention(make_forward: Callable[[], TargetForward]) -> None:
    """Raise a `ValueError` if a small tree makes the target fail, or gets other logits than in plain decoding.

    Architectures in `COMPARED` are checked only with FlashAttention, because tests cover them without. For an
    encoder-decoder the tree is a chain. `make_forward` makes a forward of one row, without a head, with a new cache.
    """
    target = make_forward().target
    config = target.config.get_text_config()
    model_type = config.model_type
    if model_type in COMPARED and not is_flash(config._attn_implementation):
        return
    try:
        found, expected = _tree_logits(target, make_forward)
    except FAILURES as failure:
        raise ValueError(
            f"{type(target).__name__} ({model_type}) fails on a draft tree's cache, positions and mask "
            f"({type(failure).__name__}: {failure}). Call `generate` without a head and a policy."
        ) from failure
    error = beyond_tolerance(found, expected, target.dtype)
    if error is not None:
        raise ValueError(
            f"{type(target).__name__} ({model_type}) gives logits that differ by {error:.3g} between a draft tree and "
            "the same tokens alone, so trees would change its output. Call `generate` without a head and a policy."
        )


def beyond_tolerance(found: Tensor, expected: Tensor, dtype: torch.dtype) -> float | None:
    """Return the largest difference between `found` and `expected` logits if too large for `dtype`; else `None`."""
    error, scale = float((found - expected).abs().max()), max(float(expected.abs().max()), 1.0)
    tolerance = _LOGIT_TOLERANCE.get(dtype, _LOW_PRECISION_LOGIT_TOLERANCE)
    return None if error <= tolerance * scale else error


@torch.no_grad()
def _tree_logits(target: PreTrainedModel, make_forward: Callable[[], TargetForward]) -> tuple[Tensor, Tensor]:
    """Return the logits of a tree's path, and of the same tokens in plain decoding, `[1, t, v]` each.

    Node 0 is the root, 1 and 2 are its children, 3 is below 1 and 4 below 2; the path 0, 2, 4 is kept, then one
    more token is verified. An encoder-decoder gets a chain, and keeps 0, 1, 2. The prompt has up to four tokens.
    """
    vocabulary, most = target.config.get_text_config().vocab_size, last_position(target.config, 0)
    length = 4 if most is None else max(1, min(4, most - 4))  # the chain's five nodes follow
    tokens = torch.arange(1, length + 7, device=target.device).remainder(vocabulary)[None]
    prompt, nodes, after = tokens[:, :length], tokens[:, length : length + 5], tokens[:, length + 5 :]
    is_chain = target.config.is_encoder_decoder
    parents, kept = ([0, 0, 1, 2, 3], [0, 1, 2]) if is_chain else ([0, 0, 0, 1, 2], [0, 2, 4])
    tree = DraftTree.from_parents(nodes, torch.tensor([parents], device=target.device))
    path = torch.tensor([kept], device=target.device)
    positions = torch.arange(prompt.shape[1], device=target.device)[None]
    with GrowingMode().verifier(make_forward(), positions) as verifier:
        verifier.prefill(prompt)
        verified, _ = verifier.verify(tree)
        verifier.keep(path, path.tolist())
        last, _ = verifier.verify(DraftTree.root_only(after[:, 0]))
    expected = _stepped(make_forward(), prompt, torch.cat([nodes.gather(1, path), after], dim=1))
    return torch.cat([verified[:, path[0]], last], dim=1), expected


def _stepped(forward: TargetForward, prompt: Tensor, tokens: Tensor) -> Tensor:
    """Compute logits `[1, t, v]` of `tokens` `[1, t]` after a prompt, one token per forward, like plain decoding."""
    logits, start = list[Tensor](), 0
    for part in (prompt, *tokens.split(1, dim=1)):
        positions = torch.arange(start, start + part.shape[1], device=part.device)[None]
        outputs: Any = forward.target(**forward.inputs(part, None, positions), use_cache=True)
        logits.append(outputs.logits[:, -1:])
        start += part.shape[1]
    return torch.cat(logits[1:], dim=1)


def check_same_bits(target: PreTrainedModel, make_verifier: Callable[[Tensor], Verifier]) -> None:
    """Raise a `ValueError` if logits in the `invariant=True` mode depend on the other tokens of a forward.

    Architectures in `COMPARED` are skipped: tests check them. `make_verifier` takes `position_ids` `[1, s]`.
    """
    model_type = target.config.get_text_config(decoder=True).model_type
    if model_type in COMPARED:
        return
    name, way_out = f"{type(target).__name__} ({model_type})", "Pass `invariant=False`."
    try:
        is_same = _has_same_bits(target, make_verifier)
    except FAILURES as failure:
        raise ValueError(
            f"{name} fails on the attention of `invariant=True` ({type(failure).__name__}: {failure}). {way_out}"
        ) from failure
    if not is_same:
        raise ValueError(
            f"{name} gives other logits to a token when other tokens are in its forward, with `invariant=True`, too. "
            f"{way_out}"
        )


@torch.no_grad()
def _has_same_bits(target: PreTrainedModel, make_verifier: Callable[[Tensor], Verifier]) -> bool:
    """Whether logits have the same bits for a prompt at once and in chunks, and for nodes in a tree and one by one."""
    most = last_position(target.config, 0)
    length = 80 if most is None else min(80, most - 4)  # 80: 16 tokens more than a block of keys
    tokens = torch.arange(1, length + 6, device=target.device).remainder(target.config.get_text_config().vocab_size)
    prompt, nodes, path = tokens[None, :length], tokens[None, length:], [0, 2, 4]
    positions = torch.arange(length, device=target.device)[None]
    with make_verifier(positions) as verifier:
        whole, _ = verifier.prefill(prompt)
        tree, _ = verifier.verify(DraftTree.from_parents(nodes, torch.tensor([[0, 0, 0, 1, 2]], device=target.device)))
    alone = list[Tensor]()
    with make_verifier(positions) as verifier:
        parts, _ = verifier.prefill(prompt, chunk_size=32)
        for place in path:
            alone.append(verifier.verify(DraftTree.root_only(nodes[:, place]))[0][:, :1])
            verifier.keep(torch.zeros_like(nodes[:, :1]), [[0]])
    return torch.equal(whole[:, -1], parts[:, -1]) and torch.equal(tree[:, path], torch.cat(alone, dim=1))
