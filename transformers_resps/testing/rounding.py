"""How far rounding moves logits: one-token decoding against tree forwards over the text that it wrote.

    resps verify TARGET --rounding --dtype bfloat16 --dataset FILE

The source of `MAX_SPACINGS`, for any target, dtype and machine. It also counts the logits of a tree forward that
equal those of one-token decoding bit for bit.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.utils.logging import tqdm

from ..compat import CACHE_KEYWORD
from ..target.tree_verifier import TreeVerifier
from ..tree import DraftTree
from .divergence import spacing_at


@dataclass(frozen=True, slots=True)
class Moves:
    """What a forward over several tokens changes, at every position of some texts.

    Attributes:
        nodes: of each forward; 0 for one forward over everything.
        moves: `[t]` by how much the gap between the two best tokens moved, in spacings of the dtype.
        flipped: `[f]` the gaps, in spacings, where another token became the best.
        equal_rows: positions whose logits are equal bit for bit, all of them.
        equal_logits: share of all logits that are equal bit for bit.
    """

    nodes: int
    moves: Tensor
    flipped: Tensor
    equal_rows: int
    equal_logits: float

    def __str__(self) -> str:
        middle, high = (float(self.moves.quantile(share)) for share in (0.5, 0.99))
        flips = f"{len(self.flipped)} flips"
        if len(self.flipped):
            flips += f" at gaps up to {float(self.flipped.max()):.2f}"
        return (
            f"{len(self.moves)} gaps moved by {middle:.2f} spacings in the median, 99% below {high:.2f}, at most "
            f"{float(self.moves.max()):.2f}; {flips}; {self.equal_rows} rows and {self.equal_logits:.1%} of the "
            "logits equal bit for bit"
        )


@torch.inference_mode()
def move_of_gaps(
    target: PreTrainedModel, prompts: list[Tensor], max_new_tokens: int, node_counts: list[int]
) -> list[Moves]:
    """Let `target` answer prompts `[s]` greedily, a token at a time, and read the answers again in trees.

    Args:
        target: in the dtype and on the device in question.
        prompts: token ids.
        max_new_tokens: of each answer; end tokens do not stop it.
        node_counts: nodes of the trees, chains as they are; 0 for one forward over prompt and answer, without cache.
    """
    rows: dict[int, list[tuple[Tensor, Tensor]]] = {count: [] for count in node_counts}
    for prompt in tqdm(prompts, desc="Comparing forwards", unit="prompt"):
        answer, plain = _decode(target, prompt.to(target.device), max_new_tokens)
        for count in node_counts:
            logits = _read(target, prompt.to(target.device), answer, count)
            rows[count] += zip(plain, logits, strict=True)
    return [_moves(count, pairs, target.dtype) for count, pairs in rows.items()]


def _decode(target: PreTrainedModel, prompt: Tensor, max_new_tokens: int) -> tuple[Tensor, list[Tensor]]:
    """The greedy answer `[t]`, and the logits `[v]` before each of its tokens but the first.

    The first is left out: both sides read the prompt in one forward.
    """
    options: Any = {CACHE_KEYWORD: DynamicCache(config=target.config.get_text_config(decoder=True))}
    options |= {"use_cache": True, "logits_to_keep": 1}
    token = target(input_ids=prompt[None], **options).logits[0, -1].argmax()
    answer, rows = [], []
    for _ in range(max_new_tokens):
        answer.append(token)
        logits = target(input_ids=token[None, None], **options).logits[0, -1]
        rows.append(logits.cpu())
        token = logits.argmax()
    return torch.stack(answer), rows


def _read(target: PreTrainedModel, prompt: Tensor, answer: Tensor, node_count: int) -> list[Tensor]:
    """The logits `[v]` after each token of `answer`, from trees of `node_count` nodes that are chains.

    Each tree is verified as decoding verifies it; the cache keeps all its nodes.
    """
    if node_count == 0:
        text = torch.cat([prompt, answer])[None]
        return list(target(input_ids=text, use_cache=False, logits_to_keep=len(answer)).logits[0].cpu())
    rows: list[Tensor] = []
    with TreeVerifier.of(target, len(prompt)) as verifier:
        verifier.prefill(prompt[None], logits_to_keep=1)
        for tree in _chains(answer, node_count):
            logits, _ = verifier.verify(tree)
            verifier.keep(torch.arange(tree.node_count, device=target.device)[None], [list(range(tree.node_count))])
            rows += logits[0].cpu()
    return rows


def _chains(answer: Tensor, node_count: int) -> Iterator[DraftTree]:
    """The answer in trees, one after the other."""
    for tokens in answer[None].split(node_count, dim=1):
        order = torch.arange(tokens.shape[1], device=tokens.device)[None]
        yield DraftTree.from_parents(tokens, (order - 1).clamp(min=0))


def _moves(node_count: int, pairs: list[tuple[Tensor, Tensor]], dtype: torch.dtype) -> Moves:
    """Compare logits `[v]` of both ways, position by position."""
    moves, flipped, equal_rows, equal = [], [], 0, 0.0
    for plain, tree in pairs:
        best = plain.float().topk(2)
        gap, spacing = float(best.values[0] - best.values[1]), spacing_at(float(best.values[0]), dtype)
        other = tree.float()[best.indices]
        moves.append(abs(float(other[0] - other[1]) - gap) / spacing)
        if int(tree.argmax()) != int(plain.argmax()):
            flipped.append(gap / spacing)
        same = plain == tree
        equal_rows += bool(same.all())
        equal += float(same.float().mean())
    return Moves(node_count, torch.tensor(moves), torch.tensor(flipped), equal_rows, equal / len(pairs))
