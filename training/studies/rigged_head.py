"""Part of the study `engine_speed`: a head that is right at a chosen rate, for targets without a trained head.

It lets an engine be measured at a known mean acceptance length.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedModel

from transformers_resps import DraftHead
from transformers_resps.head import Attend
from transformers_resps.head.layer import Wanted


SUREST = 0.999  # the highest probability of a first choice
ECHO = 1e-4  # of the real output, so that no compiler leaves the layers out


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


class RiggedHead(DraftHead):
    """Runs as every head does, and then proposes the recorded text of one prompt, with errors planted at random.

    Charged is all that a trained head of these sizes costs: the reading of real features, each level's layers, output
    rows and top-k, the growing and sizing of the tree; and beside it, per pass, one lookup by position and one
    addition. The planted outputs replace what the layers say, so that any engine can draft with it, compiled or not.

    At each position the first choice is right with the planted rate, whatever came before, and that rate is also its
    probability: scores are calibrated. Where the first choice is wrong the right token is the last choice, so a tree
    yields what its first chain yields, and its width is paid for nothing.

    Attributes:
        outputs: `[positions, h]` what replaces the output at each position of the text; zero where nothing is known.
    """

    outputs: Tensor

    @classmethod
    def for_texts(
        cls, target: PreTrainedModel, texts: Sequence[Tensor], draft_vocab_size: int | None = None, seed: int = 0
    ) -> "RiggedHead":
        """Make a head for `target` that can propose `texts`.

        Args:
            target: any causal model.
            texts: `[s]` each, prompt and plain continuation.
            draft_vocab_size: tokens that it can propose, those of `texts` among them; `None` for all.
            seed: of its weights.
        """
        size = draft_vocab_size or target.config.get_text_config().vocab_size
        used = torch.cat([text.cpu() for text in texts]).unique()
        others = torch.arange(size)
        others = others[~torch.isin(others, used)]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            made: Any = cls.from_target(target, draft_token_ids=torch.cat([used, others])[: max(size, len(used))])
            made.lm_head.weight.data.normal_(std=_row_scale(*reversed(made.lm_head.weight.shape)))
        made.norm.weight.data.fill_(1.0)
        head: RiggedHead = made.eval()
        # No buffer, which a compiler may take for a constant.
        head.outputs = head.norm.weight.detach().new_zeros(max(map(len, texts)), head.config.hidden_size)
        return head

    @torch.no_grad()
    def plant(self, text: Tensor, hit_rate: float, seed: int = 0) -> Tensor:
        """Propose `text` from here on, in place of another.

        Args:
            text: `[s]` prompt and plain continuation, without padding.
            hit_rate: probability that a first choice is right, alike at every position.
            seed: of the errors.

        Returns:
            `[s]` bool: whether the first choice for each token is right.

        Raises:
            ValueError: the head has no room for the text, or cannot propose a token of it.
        """
        known, text = self.draft_token_ids.cpu(), text.cpu()
        if len(text) > len(self.outputs) or not bool(torch.isin(text, known).all()):
            raise ValueError(
                f"The head was made for other texts than this one of {len(text)} tokens. Pass it to `for_texts`."
            )
        random = torch.Generator().manual_seed(seed)
        rows = self.lm_head.weight.detach().float().cpu()
        count, width = rows.shape
        hits = torch.rand(len(text), generator=random) < hit_rate
        right = torch.searchsorted(known, text)
        wrong = (right + torch.randint(1, count, right.shape, generator=random)) % count
        first = rows[torch.where(hits, right, wrong)]
        along, length = normalize(first, dim=-1), first.norm(dim=-1, keepdim=True)
        away = torch.where(hits[:, None], torch.randn(first.shape, generator=random), -rows[right])
        away = normalize(away - (away * along).sum(-1, keepdim=True) * along, dim=-1)
        wanted = _logit(min(max(hit_rate, 1 - SUREST), SUREST), count, float(rows.std()), width) / math.sqrt(width)
        share = (wanted / length).clamp(0.0, 1.0)
        planted = math.sqrt(width) * (share * along + (1 - share**2).sqrt() * away)
        # The output at position t predicts token t + 2; see `DraftHead`.
        self.outputs.zero_()
        self.outputs[: len(text) - 2] = planted[2:].to(self.outputs)
        return hits

    def forward(
        self,
        hidden: Tensor,
        embeddings: Tensor,
        positions: Tensor,
        attend: Attend,
        *,
        wanted: Wanted = slice(None),
    ) -> Tensor:
        """As `DraftHead.forward`, with the planted outputs."""
        output = super().forward(hidden, embeddings, positions, attend, wanted=wanted)
        is_part = isinstance(wanted, slice)
        places = positions[:, wanted] if is_part else positions.expand(len(wanted), -1).gather(1, wanted)
        return self.outputs[places.clamp(max=len(self.outputs) - 1)].add(output, alpha=ECHO)


def _logit(probability: float, count: int, scale: float, width: int) -> float:
    """Of a first choice among `count`, the others normal with variance `scale^2 width`, so that it is as probable."""
    return math.log(probability / (1 - probability)) + math.log(count - 1) + scale**2 * width / 2


def _row_scale(width: int, count: int) -> float:
    """Standard deviation of output rows, so that a row alone can be as sure as `SUREST`.

    A normed hidden state along a row of scale s has the logit s width there: s width = `_logit(SUREST, ..., s, ...)`.
    """
    most = math.log(SUREST / (1 - SUREST)) + math.log(count - 1)
    return 1 - math.sqrt(max(1 - 2 * most / width, 0.0))
