"""Part of the study `engine_speed`: a head that is right at a chosen rate, for targets without one.

It lets an engine be measured at a known mean acceptance length.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedModel

from transformers_resps import DraftHead
from transformers_resps.heads import Attend, Rope
from transformers_resps.heads.model import DraftLayer, Wanted


SUREST = 0.999  # the highest probability of a first choice
ECHO = 1e-4  # of the real output, so that no compiler leaves the layer out


def tau_of(hit_rate: float, depth: int) -> float:
    """Mean tokens per step of a chain of `depth` drafted tokens, each right with `hit_rate`: (1 - p^(d+1)) / (1 - p).

    Source: Leviathan et al. (arXiv 2211.17192), equation 1.
    """
    return sum(hit_rate**level for level in range(depth + 1))


def hit_rate_for(tau: float, depth: int) -> float:
    """The rate at which a chain of `depth` drafted tokens yields `tau` tokens per step: `tau_of` solved by halving.

    Raises:
        ValueError: no rate does.
    """
    if not 1 <= tau <= depth + 1:
        raise ValueError(
            f"A chain of {depth} drafted tokens yields 1 to {depth + 1} tokens per step, never {tau:g}. Pass a deeper "
            "shape, or another tau."
        )
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if tau_of(middle, depth) < tau else (low, middle)
    return (low + high) / 2


class RiggedLayer(DraftLayer):
    """Runs as every layer does, and then says what the embedding of the newest token says."""

    def forward(self, hidden: Tensor, embeddings: Tensor, rope: Rope, attend: Attend, wanted: Wanted) -> Tensor:
        """As `DraftLayer.forward`; the embeddings are the planted outputs."""
        output = super().forward(hidden, embeddings, rope, attend, wanted)
        if isinstance(wanted, slice):
            return embeddings[:, wanted].add(output, alpha=ECHO)
        places = wanted[..., None].expand(-1, -1, embeddings.shape[-1])
        return embeddings.gather(1, places).add(output, alpha=ECHO)


class Rigged(NamedTuple):
    """A head, and what was planted in it.

    Attributes:
        head: drafts.
        hits: `[v]` bool: whether its first choice after each token is right.
    """

    head: DraftHead
    hits: Tensor


@torch.no_grad()
def rigged_head(
    target: PreTrainedModel,
    following: Tensor,
    hit_rate: float,
    *,
    tokens: Tensor | None = None,
    draft_vocab_size: int | None = None,
    seed: int = 0,
) -> Rigged:
    """Make a head that knows what follows each token of `target`, with errors planted at random.

    Charged is all that a trained head of these sizes costs: the reading of real features, each level's embedding,
    layer, output rows and top-k, the growing and sizing of the tree; and one addition per pass. Its weights alone say
    what it proposes, so it runs in any engine that runs heads, compiled or not.

    After each token the first choice is right with `hit_rate`, independently of all others, and that is also its
    probability: scores are calibrated. Where the first choice is wrong the right token is the last choice, so a tree
    yields what its first chain yields.

    Args:
        target: a model whose next token depends on the newest alone, such as `random_target`.
        following: `[v]` the token after each.
        hit_rate: probability that a first choice is right.
        tokens: `[n]` that it knows a first choice after; `None` for all.
        draft_vocab_size: tokens that it can propose, those after `tokens` among them; `None` for all.
        seed: of weights and errors, from a generator of its own.
    """
    known = _known(following, tokens, draft_vocab_size)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head: Any = DraftHead.from_target(target, draft_token_ids=known.ids, owns_embedding=True)
        layer = RiggedLayer(head.config, len(head.layers) - 1).to(head.device, head.dtype)
        layer.load_state_dict(head.layers[-1].state_dict())
        head.layers[-1] = layer
        head.lm_head.weight.normal_(std=_row_scale(len(known.ids), head.config.hidden_size))
    head.norm.weight.fill_(1.0)
    return Rigged(head.eval(), _plant(head, known, hit_rate, seed))


class _Known(NamedTuple):
    """Tokens `[n]` after which a choice is planted, those `[d]` that can be proposed, and which of these are right."""

    asked: Tensor
    ids: Tensor
    right: Tensor


def _known(following: Tensor, tokens: Tensor | None, draft_vocab_size: int | None) -> _Known:
    everything = torch.arange(len(following))
    asked = everything if tokens is None else tokens.cpu().unique()
    known, size = following[asked].unique(), draft_vocab_size or len(following)
    others = everything[~torch.isin(everything, known)][: max(size - len(known), 0)]
    ids = torch.cat([known, others]).sort().values
    return _Known(asked, ids, torch.searchsorted(ids, following[asked]))


def _plant(head: Any, known: _Known, hit_rate: float, seed: int) -> Tensor:
    """Fill the embedding of `head` with the outputs that its output rows need; return `Rigged.hits`."""
    embedding, rows, random = head.embed_tokens.weight, head.lm_head.weight, torch.Generator().manual_seed(seed)
    hits = torch.rand(len(embedding), generator=random) < hit_rate
    outputs = _outputs(rows.float().cpu(), known.right, hits[known.asked], hit_rate, random)
    embedding.zero_()[known.asked.to(embedding.device)] = outputs.to(embedding)
    return hits


def _outputs(rows: Tensor, right: Tensor, hits: Tensor, hit_rate: float, random: torch.Generator) -> Tensor:
    """Outputs `[n, h]` of which the output rows `[d, h]` make the planted first choices, as probable as `hit_rate`."""
    count, width = rows.shape
    wrong = (right + torch.randint(1, count, right.shape, generator=random)) % count
    first = rows[torch.where(hits, right, wrong)]
    along, length = normalize(first, dim=-1), first.norm(dim=-1, keepdim=True)
    away = torch.where(hits[:, None], torch.randn(first.shape, generator=random), -rows[right])
    away = normalize(away - (away * along).sum(-1, keepdim=True) * along, dim=-1)
    probability = min(max(hit_rate, 1 - SUREST), SUREST)
    wanted = _odds(probability, count) + float(rows.var()) * width / 2  # the others are normal, with that variance
    share = (wanted / math.sqrt(width) / length).clamp(0.0, 1.0)
    return math.sqrt(width) * (share * along + (1 - share**2).sqrt() * away)


def _odds(probability: float, count: int) -> float:
    """Logit of a choice of that probability, beside `count - 1` choices whose logits are 0."""
    return math.log(probability / (1 - probability)) + math.log(count - 1)


def _row_scale(count: int, width: int) -> float:
    """Standard deviation s of output rows, such that a normed output along one of them is as sure as `SUREST`.

    Its logit there is s width: s width = `_odds(SUREST)` + s^2 width / 2.
    """
    return 1 - math.sqrt(max(1 - 2 * _odds(SUREST, count) / width, 0.0))
