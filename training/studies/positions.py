"""Part of the study `headroom`: what is known at each position of recorded texts before a decision, and what followed.

Shapes: t positions, p pool nodes, c looked-up tokens, f inputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from transformers_resps.drafting.prompt_lookup import Lookup
from transformers_resps.drafting.suffixes import LONGEST_MATCH, Suffixes
from transformers_resps.replay.recorded_text import RecordedText
from transformers_resps.tree import CandidatePool


TOP_K = 4  # of the pool that is looked at
LEVELS = 6
CHAIN = 12  # looked-up tokens that are considered
SIGNALS = ("scores", "lookup", "agreement", "recent", "features")  # agreement: of the head with the lookup
_CONTEXT_SCALE = 1000.0


@dataclass(frozen=True, slots=True)
class Positions:
    """What may be known at all positions of some texts, and what the text went on with.

    Attributes:
        known: before drafting, by signal: `[t, f]` each of `SIGNALS`.
        log_probs: `[t, p]` of each pool node given its parent.
        parents: `[t, p]` places in the pool, -1 for the root.
        right: `[t, p]` bool, on the text's own path.
        on_chain: `[t, p]` bool, the looked-up continuation passes through it.
        accept_probs: `[t, c]` how often such looked-up tokens were accepted, given those before; 0 without one.
        chain_places: `[t, c]` its place in the pool, -1 where the head did not draft it.
        followed: `[t]` how many looked-up tokens the text follows.
        lefts: `[t]` tokens that the text still gains.
        contexts: `[t]` positions of the text before the step.
        text_of: `[t]` index of the text.
    """

    known: dict[str, Tensor]
    log_probs: Tensor
    parents: Tensor
    right: Tensor
    on_chain: Tensor
    accept_probs: Tensor
    chain_places: Tensor
    followed: Tensor
    lefts: Tensor
    contexts: Tensor
    text_of: Tensor

    def __len__(self) -> int:
        return len(self.followed)

    def shared(self, levels: Tensor, drafted: int) -> Tensor:
        """Which looked-up tokens the head has proposed, too, when it drafted so many levels: `[t, c]` bool."""
        return (self.chain_places >= 0) & (levels[self.chain_places.clamp(min=0)] <= drafted)


def read_positions(texts: Sequence[RecordedText]) -> Positions:
    """Read all positions of `texts`, one text after the other."""
    parts = [_read_text(text, index) for index, text in enumerate(texts)]
    columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    known = {signal: columns.pop(signal) for signal in SIGNALS}
    return Positions(known=known, **columns)


def levels_of(text: RecordedText) -> Tensor:
    """Level of each pool node `[p]`."""
    levels = text.pools[TOP_K].levels
    return levels[levels <= LEVELS]


def _read_text(text: RecordedText, index: int) -> dict[str, Tensor]:
    levels, full = levels_of(text), text.pools[TOP_K]
    tokens, parents, scores = (part[:, : len(levels)] for part in (full.tokens, full.parents, full.scores))
    pool = CandidatePool(tokens, parents, scores, levels)
    parent_scores = scores.gather(1, parents.clamp(min=0)).masked_fill(parents < 0, 0.0)
    path = pool.nodes_along(text.upcoming(LEVELS))
    chains, accept_probs, lengths = chains_of(text)
    places = pool.nodes_along(chains)
    right, on_chain = ((nodes[..., None] == torch.arange(len(levels))).any(1) for nodes in (path, places))
    drafted_match = (path >= 0).sum(-1)
    upcoming = text.upcoming(CHAIN)
    followed = (chains == upcoming).int().cumprod(-1).sum(-1)
    count = len(text)
    outcomes = [
        (drafted_match > 0, 1),
        (right[:, 0], 1),
        (followed > 0, 1),
        (drafted_match, LEVELS),
        (followed.clamp(max=6), LEVELS),
    ]
    earlier = [_window(hits.float(), width, delay) for hits, delay in outcomes for width in (1, 4, 16)]
    place = torch.arange(count)
    contexts = text.prompt_length + 1 + place
    features = text.features.float().unflatten(1, (3, -1))
    return {
        "scores": torch.stack([contexts / _CONTEXT_SCALE, place / 100.0], dim=1),
        "recent": torch.stack(earlier, dim=1),
        "lookup": torch.cat(
            [lengths[:, None] / LONGEST_MATCH, (lengths[:, None] > 0).float(), accept_probs[:, :4]], dim=1
        ),
        "agreement": torch.zeros(count, 0),  # it is about nodes: nothing of it is known before drafting
        "features": F.layer_norm(features, features.shape[2:]).flatten(1),
        "log_probs": (scores - parent_scores).clamp(min=-12.0, max=-1e-4),
        "parents": parents,
        "right": right,
        "on_chain": on_chain,
        "accept_probs": accept_probs,
        "chain_places": places,
        "followed": followed,
        "lefts": count - place,
        "contexts": contexts,
        "text_of": torch.full((count,), index),
    }


def chains_of(text: RecordedText) -> tuple[Tensor, Tensor, Tensor]:
    """Look up tokens `[t, c]` (-2 for none), their acceptance probabilities `[t, c]`, lengths of the matches `[t]`."""
    tokens, lookup, seen = text.input_ids.tolist(), Lookup(), Suffixes()
    chains, accept_probs, lengths = [], [], []
    for root in range(text.prompt_length, text.prompt_length + len(text)):
        lookup.extend(tokens[lookup.length : root + 1])
        seen.extend(tokens[len(seen) : root + 1])
        found, path, node = lookup.found.grow(CHAIN), list[int](), -1
        while node in found.parents:
            node = found.parents.index(node)  # the likeliest child
            path.append(node)
        alive = [1.0, *(found.odds[node] for node in path)]
        chains.append([*(found.tokens[node] for node in path), *[-2] * (CHAIN - len(path))])
        accept_prob = [after / before for before, after in zip(alive, alive[1:], strict=False)]
        accept_probs.append([*accept_prob, *[0.0] * (CHAIN - len(accept_prob))])
        lengths.append(float(seen.search(seen.context).longest))
    return torch.tensor(chains), torch.tensor(accept_probs), torch.tensor(lengths)


def _window(hits: Tensor, width: int, delay: int) -> Tensor:
    """Mean of `width` outcomes `[t]` before each position, the last being `delay` before: later ones are not known."""
    before = F.pad(hits, (width + delay - 1, 0))[: len(hits) + width - 1]
    return before.unfold(0, width, 1).mean(1)
