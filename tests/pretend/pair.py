"""A target whose text can be foretold, and a head that foretells it with planted errors.

The target writes along one cycle through its vocabulary: embeddings are unit vectors, its layers add nothing, and its
output rows point from each token to the next one. The head knows the cycle, but for some tokens a wrong one.
"""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from transformers_resps import DraftHead, attach
from transformers_resps.assistants.mtp import MtpHead
from transformers_resps.assistants.mtp_layouts import MtpConfig
from transformers_resps.heads import BlockHead, BlockHeadConfig


VOCABULARY = 128
_PROPOSABLE = 112
_ERRORS = 0.3  # share of tokens after which the head is wrong
_LAYERS = 4


def cycle() -> torch.Tensor:
    """`[v]` the token after each."""
    order = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(0))
    following = torch.empty_like(order)
    following[order] = order.roll(-1)
    return following


def pair() -> tuple[LlamaForCausalLM, DraftHead]:
    """The target, attached, and its head."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=VOCABULARY,
        intermediate_size=VOCABULARY,
        num_hidden_layers=_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    target: LlamaForCausalLM = LlamaForCausalLM(config)
    target.requires_grad_(False).train(False)
    attach(target)
    head = DraftHead.from_target(target, draft_vocab_size=_PROPOSABLE).eval().requires_grad_(False)
    _plant_target(target)
    _plant_head(head)
    return target, head


def mtp(target: LlamaForCausalLM) -> MtpHead:
    """An MTP layer that knows the text: it shows the target's output head the embedding of the newest token."""
    module = MtpHead(MtpConfig(), target).eval().requires_grad_(False)
    layer: Any = module.layers[0]
    layer.eh_proj.weight.copy_(torch.eye(VOCABULARY, 2 * VOCABULARY))
    layer.block.self_attn.o_proj.weight.zero_()
    layer.block.mlp.down_proj.weight.zero_()
    return module


def block(target: LlamaForCausalLM, **fields: Any) -> BlockHead:
    """A block head of seven levels that knows nothing."""
    sizes = {"hidden_size": VOCABULARY, "intermediate_size": VOCABULARY, "num_attention_heads": 4, "head_dim": 32}
    rest = {"num_key_value_heads": 2, "vocab_size": VOCABULARY, "feature_layers": [1, 2, 3], "block_size": 8}
    torch.manual_seed(0)
    return BlockHead(BlockHeadConfig(**{**sizes, **rest, **fields})).eval().requires_grad_(False)


def _plant_target(target: LlamaForCausalLM) -> None:
    target.model.embed_tokens.weight.copy_(torch.eye(VOCABULARY))
    for layer in target.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    target.lm_head.weight.copy_(_pointing(cycle()) / 2 + torch.randn(VOCABULARY, VOCABULARY) / 20)


def _plant_head(head: DraftHead) -> None:
    known = cycle()
    is_wrong = torch.rand(VOCABULARY) < _ERRORS
    known[is_wrong] = known[is_wrong].roll(1)
    head.fc.weight.zero_()
    head.fc.weight[:, :VOCABULARY] = _pointing(cycle())
    layer: Any = head.layers[0]
    layer.self_attn.o_proj.weight.zero_()
    layer.mlp.gate_proj.weight.copy_(torch.eye(VOCABULARY))
    layer.mlp.up_proj.weight.copy_(torch.eye(VOCABULARY) / VOCABULARY)  # a normed unit vector is sqrt(v) long
    layer.mlp.down_proj.weight.copy_(_pointing(known) - torch.eye(VOCABULARY))
    noise = torch.randn(_PROPOSABLE, VOCABULARY) / 20
    head.lm_head.weight.copy_(torch.eye(VOCABULARY)[:_PROPOSABLE] / 2 + noise)


def _pointing(following: torch.Tensor) -> torch.Tensor:
    """`[v, v]` that maps the unit vector of each token to that of the token after it."""
    return torch.eye(VOCABULARY)[following].T.contiguous()
