"""Part of the study `headroom`: the strongest model of acceptance that we can fit.

It predicts which drafted nodes the target will accept, from inputs that are known before the decision. It is a
measuring instrument, too slow to decode with. Shapes: t positions, p pool nodes, c looked-up tokens, f inputs.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .positions import CHAIN, LEVELS, SIGNALS, TOP_K, Positions


_COMPONENTS = 24  # principal components of the target's features
_FOLDS = 2
_DRAFTED = (0, 1, 2, 3, 5)  # levels, after which looked-up tokens are learned from
_HIDDEN, _ITERATIONS, _DECAY = 12, 50, 5.0  # of the networks


class Net(nn.Module):
    """A linear map and a small hidden layer beside it: what is not linear in the inputs is little."""

    def __init__(self, inputs: Tensor, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.mean, self.spread = inputs.mean(0), inputs.std(0) + 1e-2
        self.linear = nn.Linear(inputs.shape[1], 1)
        self.hidden = nn.Sequential(nn.Linear(inputs.shape[1], _HIDDEN), nn.Tanh(), nn.Linear(_HIDDEN, 1, bias=False))
        nn.init.zeros_(self.linear.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        scaled = ((inputs - self.mean) / self.spread).clamp(-4, 4)
        return (self.linear(scaled) + self.hidden(scaled)).squeeze(-1)


def fit_net(inputs: Tensor, targets: Tensor, seed: int, *, is_odds: bool) -> Net:
    """Fit log odds or values to all rows at once; weight decay keeps the weights small."""
    net, loss_of = Net(inputs, seed), F.binary_cross_entropy_with_logits if is_odds else F.mse_loss
    weights = [net.linear.weight, net.hidden[0].weight, net.hidden[2].weight]
    optimizer = torch.optim.LBFGS(
        net.parameters(), max_iter=_ITERATIONS, history_size=20, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(net(inputs), targets) + _DECAY / len(inputs) * sum(part.square().sum() for part in weights)
        loss.backward()
        return loss

    optimizer.step(closure)
    return net.eval()


class FittedAcceptance:
    """Probabilities of acceptance, fitted on the positions of some texts.

    Each of two networks leaves half of the texts out: those are predicted by it alone, so that what is fitted on
    top of the predictions sees honest ones. Other texts are predicted by the mean of both.

    Args:
        fit: positions to fit on.
        levels: `[p]` of the pool's nodes.
        signals: which of `SIGNALS` it may see.
    """

    def __init__(self, fit: Positions, levels: Tensor, signals: Sequence[str] = SIGNALS) -> None:
        self.levels, self.signals = levels, signals
        self.is_blind, self._sees_agreement = "lookup" not in signals, "agreement" in signals
        features = fit.known["features"]
        self._center = features.mean(0)
        self._axes = torch.pca_lowrank(features - self._center, _COMPONENTS, niter=3)[2]
        self._nodes: list[Net] = []
        self._chains: list[Net] = []
        rows, targets, owners = self._node_rows(fit)
        chain_rows, chain_targets, chain_owners = self._chain_rows(fit)
        for fold in range(_FOLDS):
            self._nodes.append(
                fit_net(rows[owners % _FOLDS != fold], targets[owners % _FOLDS != fold], fold, is_odds=True)
            )
            if not self.is_blind:
                kept = chain_owners % _FOLDS != fold
                self._chains.append(fit_net(chain_rows[kept], chain_targets[kept], fold, is_odds=True))

    def known(self, positions: Positions) -> Tensor:
        """Everything the model may see before drafting: `[t, f]`."""
        parts = [positions.known[signal] for signal in self.signals if signal != "features"]
        if "features" in self.signals:
            parts.append((positions.known["features"] - self._center) @ self._axes)
        return torch.cat(parts, dim=1)

    def _node_inputs(self, positions: Positions) -> Tensor:
        """`[t, p, f]` of each pool node."""
        logs, parents = positions.log_probs, positions.parents
        count = logs.shape[1] // TOP_K
        groups = logs.unflatten(1, (count, TOP_K))  # siblings lie side by side, best first
        rest = (1 - groups.exp().sum(-1)).clamp(min=1e-4)
        entropy = -(groups.exp() * groups).sum(-1) - rest * rest.log()
        siblings = torch.stack([groups[..., 0], groups[..., 1], entropy, rest], dim=-1).repeat_interleave(TOP_K, 1)
        path = torch.where(parents < 0, 0.0, self._along_paths(positions, logs).gather(1, parents.clamp(min=0)))
        ranks = F.one_hot(torch.arange(logs.shape[1]) % TOP_K, TOP_K).float().expand(len(logs), -1, -1)
        levels = F.one_hot(self.levels - 1, LEVELS).float().expand(len(logs), -1, -1)
        own = torch.stack([logs, logs - torch.log1p(-logs.exp()), path], dim=-1)
        parts = [own, siblings, ranks, levels]
        if self._sees_agreement:
            on = positions.on_chain.float()
            above = torch.where(parents < 0, 1.0, on.gather(1, parents.clamp(min=0)))
            accept_prob = positions.accept_probs[:, :LEVELS][:, self.levels - 1] * above
            rival = on.unflatten(1, (count, TOP_K)).amax(-1).repeat_interleave(TOP_K, 1)
            logit = torch.where(accept_prob > 0, accept_prob.clamp(0.02, 0.98).logit(), 0.0)
            beside, past = rival * above * (1 - on), (1 - rival) * above * (accept_prob > 0)
            parts.append(
                torch.stack(
                    [part * by for part in (on * above, beside, past) for by in (1.0, logit, own[..., 1])], dim=-1
                )
            )
        parts.append(self.known(positions)[:, None].expand(-1, logs.shape[1], -1))
        return torch.cat(parts, dim=-1)

    def _along_paths(self, positions: Positions, values: Tensor) -> Tensor:
        """Sums of `values` `[t, p]` from the root to each node."""
        sums = values.clone()
        for level in range(2, LEVELS + 1):
            here = self.levels == level
            sums[:, here] += sums.gather(1, positions.parents[:, here])
        return sums

    def _node_rows(self, fit: Positions) -> tuple[Tensor, Tensor, Tensor]:
        """Nodes whose parent is right, in the order of the pool: inputs, outcomes and texts."""
        above = torch.where(fit.parents < 0, True, fit.right.gather(1, fit.parents.clamp(min=0)))
        above &= self.levels <= fit.lefts[:, None] - 1  # what would follow the text's end is not known
        return self._node_inputs(fit)[above], fit.right[above].float(), fit.text_of[:, None].expand_as(above)[above]

    def _chain_inputs(self, positions: Positions, drafted: int) -> Tensor:
        """`[t, c, f]` of each looked-up token that the head did not draft, when it drafted so many levels."""
        accept_probs, offsets = positions.accept_probs, torch.arange(1, CHAIN + 1)[None]
        columns = [accept_probs, offsets / CHAIN]
        if self._sees_agreement:
            is_asked, shared = float(drafted > 0), positions.shared(self.levels, drafted)
            agreed = shared.sum(-1, keepdim=True)
            paths = self._along_paths(positions, positions.log_probs).gather(1, positions.chain_places.clamp(min=0))
            columns += [
                (agreed < drafted).float(),
                (offsets - agreed) / CHAIN * is_asked,
                agreed / LEVELS,
                torch.where(shared, paths, 0.0).amin(-1, keepdim=True),
                torch.full((1, 1), drafted / LEVELS),
                positions.log_probs[:, :1] * is_asked,
            ]
        own = torch.stack([column.expand_as(accept_probs) for column in columns], dim=-1)
        return torch.cat([own, self.known(positions)[:, None].expand(-1, CHAIN, -1)], dim=-1)

    def _chain_rows(self, fit: Positions) -> tuple[Tensor, Tensor, Tensor]:
        offsets = torch.arange(CHAIN)[None]
        reached = (offsets <= fit.followed[:, None]) & (fit.accept_probs > 0) & (offsets < fit.lefts[:, None] - 1)
        right = (offsets < fit.followed[:, None]).float()
        owner = fit.text_of[:, None].expand_as(reached)
        inputs, targets, owners = [], [], []
        for drafted in _DRAFTED:
            kept = reached & ~fit.shared(self.levels, drafted)
            inputs.append(self._chain_inputs(fit, drafted)[kept])
            targets.append(right[kept])
            owners.append(owner[kept])
        return torch.cat(inputs), torch.cat(targets), torch.cat(owners)

    @torch.no_grad()
    def node_probs(self, positions: Positions, *, is_fit: bool) -> Tensor:
        """`[t, p]` probability that each pool node is accepted."""
        accept_probs = self._mean(self._nodes, self._node_inputs(positions), positions, is_fit)
        return self._along_paths(positions, accept_probs.clamp(1e-4, 0.999).log()).exp()

    @torch.no_grad()
    def chain_accept_probs(self, positions: Positions, drafted: int, *, is_fit: bool) -> Tensor:
        """`[t, c]` probability of each looked-up token given those before it, where the head did not draft it."""
        inputs = self._chain_inputs(positions, drafted)
        return self._mean(self._chains, inputs, positions, is_fit) * (positions.accept_probs > 0)

    def _mean(self, nets: list[Net], inputs: Tensor, positions: Positions, is_fit: bool) -> Tensor:
        predicted = torch.stack([net(inputs).sigmoid() for net in nets])  # [folds, t, n]
        if not is_fit:
            return predicted.mean(0)
        fold = (positions.text_of % _FOLDS)[None, :, None].expand(1, -1, predicted.shape[-1])
        return predicted.gather(0, fold)[0]
