"""Part of the study `headroom`: decides with a fitted model of acceptance, as well as we can.

It tells how much of the oracle's gain is predictable. Level by level it stops and verifies the nodes that pay, or has
another level drafted. What a further level will be worth is fitted too, from the last level backwards (as Longstaff
and Schwartz, 2001, price an option), from inputs that are known by then. A second is worth the tokens that it brings
in this text.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from transformers_resps.policies.costs import CostTable

from .acceptance_model import FittedAcceptance, fit_net
from .positions import CHAIN, LEVELS, TOP_K, Positions


MAX_NODES = 32  # drafted and looked up
_RATES = (0.9, 1.15, 1.4, 1.7, 2.1, 2.6, 3.2)  # tokens per plain step, between which decisions are not told apart
_MEMORY, _PRIOR_STEPS = 0.95, 5.0  # of the running rate of a text


@dataclass(frozen=True, slots=True)
class Steps:
    """What each decision gives at every position, for each of `_RATES`: both `[t, r]`.

    Attributes:
        emitted: tokens.
        seconds: all in all.
        plain_seconds: of a plain step, on average.
    """

    emitted: Tensor
    seconds: Tensor
    plain_seconds: float


class Decider:
    """Decisions at the positions of some texts, fitted on others.

    Args:
        model: of acceptance, fitted on the same texts.
        fit: their positions.
        costs: of this machine.
        max_levels: 0 decides over looked-up nodes alone.
    """

    def __init__(self, model: FittedAcceptance, fit: Positions, costs: CostTable, max_levels: int = LEVELS) -> None:
        self._model, self._costs, self._max_levels = model, costs, max_levels
        drafts = [self._drafted(fit, level, is_fit=True) for level in range(max_levels + 1)]
        verify = self._verify_seconds(fit)
        self._nets = []
        coming: Tensor | None = None  # value of the best that can follow a level
        for level in reversed(range(max_levels)):
            ahead = self._values(drafts[level + 1], verify)[0]
            coming = ahead if coming is None else torch.maximum(ahead, coming)
            here = self._values(drafts[level], verify)[0]
            gain = coming - here - self._level_costs(verify, level)
            inputs = self._inputs(fit, drafts[level], here)
            net = fit_net(inputs.flatten(0, 1), gain.flatten(), level, is_odds=False)
            self._nets.insert(0, net)
            with torch.no_grad():
                more = net(inputs.flatten(0, 1)).view_as(gain)
            coming = torch.where(more > 0, coming - self._level_costs(verify, level), here)
        self._start = self._settle(fit, drafts, verify)

    def seconds(self, positions: Positions) -> Tensor:
        """Seconds of each text `[texts]`, prefill left out."""
        drafts = [self._drafted(positions, level, is_fit=False) for level in range(self._max_levels + 1)]
        steps = self._steps(positions, drafts, self._verify_seconds(positions))
        return _walk(steps, positions, self._start)

    def _settle(self, fit: Positions, drafts: list[tuple[Tensor, Tensor, Tensor]], verify: Tensor) -> float:
        """The rate with which a text begins, in tokens per plain step: what these decisions themselves attain."""
        steps, rate = self._steps(fit, drafts, verify), 1.0
        for _ in range(3):
            rate = len(fit) * steps.plain_seconds / float(_walk(steps, fit, rate).sum())
        return rate

    def _drafted(self, positions: Positions, drafted: int, *, is_fit: bool) -> tuple[Tensor, Tensor, Tensor]:
        """After some levels: expected and right nodes of the best n, both `[t, n + 1]`, and probabilities `[t, p]`."""
        model, levels = self._model, self._model.levels
        count = len(positions)
        probs, right = torch.zeros(count, 0), torch.zeros(count, 0, dtype=torch.bool)
        by_level = torch.zeros(count, len(levels))
        if drafted:
            by_level = model.node_probs(positions, is_fit=is_fit) * (levels <= drafted)
            probs, right = by_level, positions.right
        if not model.is_blind:
            places = positions.chain_places
            is_drafted = positions.shared(levels, drafted)
            accept_probs = model.chain_accept_probs(positions, drafted, is_fit=is_fit).clamp(max=0.999)
            agreed = torch.where(is_drafted, by_level.gather(1, places.clamp(min=0)), 1.0).amin(-1, keepdim=True)
            paths = accept_probs.masked_fill(is_drafted, 1.0).cumprod(-1) * agreed
            probs = torch.cat([probs, paths.masked_fill(is_drafted, 0.0)], dim=1)
            chain = (torch.arange(CHAIN) < positions.followed[:, None]) & ~is_drafted
            right = torch.cat([right, chain], dim=1)
        best = probs.sort(dim=1, descending=True, stable=True)
        kept = best.values[:, :MAX_NODES]
        hits = (right.gather(1, best.indices[:, :MAX_NODES]) & (kept > 0)).float()
        zero = torch.zeros(count, 1)
        missing = torch.zeros(count, MAX_NODES - kept.shape[1])
        expected, found = (torch.cat([zero, part, missing], 1).cumsum(1) for part in (kept, hits))
        return expected, found, by_level

    def _verify_seconds(self, positions: Positions) -> Tensor:
        """`[t, n + 1]` seconds of verifying n nodes and the root."""
        buckets, bucket_of = (positions.contexts // 32).unique(return_inverse=True)
        rows = [
            [self._costs.verify_seconds(nodes, int(bucket) * 32) for nodes in range(1, MAX_NODES + 2)]
            for bucket in buckets
        ]
        return torch.tensor(rows)[bucket_of]

    def _rates(self, verify: Tensor) -> Tensor:
        """Lambda in tokens per second: `[t, r]`."""
        return torch.tensor(_RATES) / (verify[:, :1] + self._costs.overhead)

    def _level_costs(self, verify: Tensor, drafted: int) -> Tensor:
        """Tokens that one more level costs, `[t, r]`."""
        less, more = (self._costs.draft_seconds(TOP_K, levels) for levels in (drafted, drafted + 1))
        return self._rates(verify) * (more - less)

    def _values(self, draft: tuple[Tensor, Tensor, Tensor], verify: Tensor) -> tuple[Tensor, Tensor]:
        """Net tokens of verifying the best number of nodes, and that number: both `[t, r]`."""
        extra = verify - verify[:, :1]
        net = draft[0][:, None] - self._rates(verify)[..., None] * extra[:, None]  # [t, r, n + 1]
        best = net.max(-1)
        return best.values, best.indices

    def _inputs(self, positions: Positions, draft: tuple[Tensor, Tensor, Tensor], here: Tensor) -> Tensor:
        """What the value of another level is fitted to: `[t, r, f]`."""
        expected, _, probs = draft
        masses = torch.stack([probs[:, self._model.levels == level].sum(1) for level in range(1, LEVELS + 1)], dim=1)
        deepest = torch.stack([probs[:, self._model.levels == level].amax(1) for level in range(1, LEVELS + 1)], dim=1)
        fixed = torch.cat([self._model.known(positions), masses, deepest, expected[:, [1, 4, 8]]], dim=1)
        rates = torch.tensor(_RATES).expand_as(here)
        own = torch.stack([here, rates], dim=-1)
        return torch.cat([own, fixed[:, None].expand(-1, len(_RATES), -1)], dim=-1)

    @torch.no_grad()
    def _steps(self, positions: Positions, drafts: list[tuple[Tensor, Tensor, Tensor]], verify: Tensor) -> Steps:
        shape = (len(positions), len(_RATES))
        going = torch.ones(shape, dtype=torch.bool)
        emitted, seconds = torch.zeros(shape), torch.zeros(shape)
        for level, draft in enumerate(drafts):
            here, nodes = self._values(draft, verify)
            if level < self._max_levels:
                more = self._nets[level](self._inputs(positions, draft, here).flatten(0, 1)).view(shape) > 0
                more &= positions.lefts[:, None] - 1 > level
            else:
                more = torch.zeros_like(going)
            stops = going & ~more
            taken = verify.gather(1, nodes) + self._costs.overhead
            taken = taken + self._costs.draft_seconds(TOP_K, level)
            emitted = torch.where(stops, draft[1].gather(1, nodes) + 1, emitted)
            seconds = torch.where(stops, taken, seconds)
            going &= more
        emitted = emitted.minimum(positions.lefts[:, None].float())
        return Steps(emitted, seconds, float(verify[:, 0].mean()) + self._costs.overhead)


def _walk(steps: Steps, positions: Positions, start: float) -> Tensor:
    """Seconds of each text, deciding at each step with the text's own running rate."""
    emitted, seconds, lefts = steps.emitted.long().tolist(), steps.seconds.tolist(), positions.lefts.tolist()
    plain, taken, place = steps.plain_seconds, [], 0
    while place < len(lefts):
        stop, total = place + lefts[place], 0.0
        tokens, time = start * _PRIOR_STEPS, plain * _PRIOR_STEPS
        while place < stop:
            rate = tokens / time * plain
            index = min(range(len(_RATES)), key=lambda one: abs(_RATES[one] - rate))
            gained, cost = emitted[place][index], seconds[place][index]
            tokens, time = tokens * _MEMORY + gained, time * _MEMORY + cost
            total, place = total + cost, place + gained
        taken.append(total)
    return torch.tensor(taken, dtype=torch.float64)
