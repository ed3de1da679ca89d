"""Tests by chi-square whether sampled tokens follow the target's distribution.

Each token has its own distribution, from a plain forward over its prefix. Wrong acceptance could only favour or
disfavour drafted tokens. So each drafted token has a bin, best first, and the other tokens are in three bins by
likelihood. If every token was drawn from its distribution, the counts minus their expectations are a sum of martingale
differences. Their covariance is the sum of the tokens' covariances; their quadratic form is asymptotically chi-square.

A control shows the power of the test: it picks tokens at the same positions by a wrong rule, which the test must
detect. The wrong rule, by Leviathan et al. (arXiv 2211.17192), keeps a drafted token with probability `min(1, p / q)`.
Here p is the target's and q the drafter's. The rule is right for tokens drawn from q, wrong for the best tokens of q.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..drafting import Committed, DraftCall, DraftRequest, DraftSource
from ..drafting.suffix_memory import SuffixMemory
from ..tree import DraftTree, TreeShape
from ..verifying.forward import TargetForward
from ..verifying.growing import GrowingMode
from .comparison import SAMPLED, ModelUnderTest


@dataclass(frozen=True, slots=True)
class Place:
    """One token of an output, with the target's and the drafter's predictions for its position."""

    token: int
    probs: Tensor  # [v] fp32, the target's distribution given the prefix
    drafted: list[int]  # the drafter's tokens, best first
    draft_probs: list[float]  # the drafter's probability of each


class DraftReader:
    """Computes the target's distributions and the drafts of `source` (`None`: prompt lookup) for given outputs."""

    def __init__(self, target: PreTrainedModel, source: DraftSource | None) -> None:
        self._target, self._source = target, source or SuffixMemory()
        self._source.prepare(target)

    @torch.no_grad()
    def read(self, prompt: Tensor, output: Tensor, drafts: int) -> list[Place]:
        """Return a `Place` for every token of `output` `[t]` after `prompt` `[s]`; the first place has no drafts."""
        text = torch.cat([prompt, output.to(prompt.device)]).to(self._target.device)
        logits = self._target(input_ids=text[None, :-1], use_cache=False, logits_to_keep=len(output)).logits[0]
        probs, drafted = logits.float().softmax(-1).cpu(), [([], []), *self._drafted(text, len(prompt), drafts)]
        return [Place(token, probs[place], *drafted[place]) for place, token in enumerate(output.tolist())]

    def _drafted(self, text: Tensor, start: int, drafts: int) -> list[tuple[list[int], list[float]]]:
        """Draft up to `drafts` candidates for each token after `text[start]`; return candidates and their probs."""
        request = DraftRequest(TreeShape(drafts + 1, 1, drafts, lookup=1))
        root = torch.zeros(1, 1, dtype=torch.long, device=text.device)
        levels, observed = [], 0
        layers, before = self._source.feature_layers, self._source.before_deepstack
        forward = TargetForward.of(self._target, layers, before_deepstack=before)
        with GrowingMode().verifier(forward, torch.arange(start, device=text.device)[None]) as verifier:
            drafter = self._source.drafter(DraftCall(self._target, verifier))
            _, (features,) = verifier.prefill(text[None, :start], logits_to_keep=1)
            for position in range(start, len(text) - 1):
                states = features.concatenated() if layers else None
                drafter.observe(Committed(text[None, observed : position + 1], states))
                pool, observed = drafter.draft(text[None, : position + 1], request), position + 1
                levels.append((pool.tokens[0].tolist(), pool.scores[0].exp().tolist()))
                _, features = verifier.verify(DraftTree.root_only(text[position : position + 1]))
                verifier.keep(root, [[0]])
        return levels


SIGNIFICANCE = 1e-4  # Tests with a lower p-value fail: one false alarm in ten thousand tests.
_MIN_VARIANCE = 5.0  # Bins with less variance are merged, because their counts are far from normally distributed.


@dataclass(frozen=True, slots=True)
class Fit:
    """Result of a chi-square test."""

    draws: int
    chi_square: float  # 0 if everything had to be pooled into one bin
    degrees: int  # degrees of freedom
    total_variation: float  # half the sum over bins of |observed - expected|, as shares of the draws

    @property
    def p_value(self) -> float:
        """Probability of a `chi_square` at least as large if all tokens follow their distributions."""
        if self.degrees == 0:
            return 1.0
        half = torch.tensor([self.degrees / 2, self.chi_square / 2], dtype=torch.float64)
        return float(torch.special.gammaincc(half[0], half[1]))

    @property
    def fits(self) -> bool:
        return self.p_value >= SIGNIFICANCE

    def __str__(self) -> str:
        return (
            f"chi-square {self.chi_square:.1f} with {self.degrees} degrees of freedom (p = {self.p_value:.2g}), "
            f"total variation {self.total_variation:.3f}, {self.draws} draws"
        )


def goodness_of_fit(probabilities: Tensor, bins: Tensor) -> Fit:
    """Test whether the `bins` `[t]`, into which t sampled tokens fell, follow their `probabilities` `[t, bins]`."""
    probabilities = probabilities.double()
    observed = torch.bincount(bins, minlength=probabilities.shape[1]).double()
    expected = probabilities.sum(0)
    covariance = torch.diag(expected) - probabilities.T @ probabilities
    total_variation = float((observed - expected).abs().sum() / 2 / len(bins))
    pooling = _pooling(covariance)  # [pooled, bins]
    difference = pooling @ (observed - expected)
    covariance = pooling @ covariance @ pooling.T
    degrees = len(pooling) - 1  # the last count follows from the others
    chi_square = 0.0
    if degrees:
        chi_square = float(difference[:-1] @ torch.linalg.solve(covariance[:-1, :-1], difference[:-1]))
    return Fit(len(bins), chi_square, degrees, total_variation)


def _pooling(covariance: Tensor) -> Tensor:
    """Merge bins until each has enough variance; return a 0/1 matrix `[merged bins, bins]` that sums the bins."""
    groups = [[index] for index in range(len(covariance))]

    def variance(group: list[int]) -> float:
        return float(covariance[group][:, group].sum())

    while len(groups) > 1:
        groups.sort(key=variance)
        if variance(groups[0]) >= _MIN_VARIANCE:
            break
        groups[:2] = [groups[0] + groups[1]]
    pooling = torch.zeros(len(groups), len(covariance), dtype=covariance.dtype)
    for row, group in enumerate(groups):
        pooling[row, group] = 1.0
    return pooling


DRAFTED = 4  # Number of bins for drafted tokens, best first.
_LIKELY = 3  # Tokens in the second bin of undrafted tokens; the first bin has the likeliest token, the third the rest.
TOKENS = 8  # Number of tokens of each output.
MIN_ACCEPTED = 16  # Number of accepted drafts that the test needs; the control cannot show that any were accepted.


@dataclass(frozen=True, slots=True)
class DistributionCheck:
    """Result of the statistical test of sampled outputs."""

    answers: int
    accepted: int  # accepted drafted tokens
    fit: Fit  # fit of the sampled tokens
    control: Fit  # fit of tokens picked by the wrong rule

    name = "distribution of sampled tokens"

    @property
    def passed(self) -> bool:
        return self.fit.fits

    @property
    def has_power(self) -> bool:
        """Whether enough drafts were accepted and the control's wrong rule was detected."""
        return self.accepted >= MIN_ACCEPTED and not self.control.fits

    @property
    def verdict(self) -> str:
        if not self.passed:
            return "NOT the target's distribution"
        if self.accepted < MIN_ACCEPTED:
            return f"NO POWER, only {self.accepted} of {MIN_ACCEPTED} needed drafted tokens were accepted"
        return "the target's" if self.has_power else "NO POWER, the wrong rule was not detected"

    def __str__(self) -> str:
        control = "NOT detected" if self.control.fits else "detected"
        return f"{self.fit}: {self.verdict}\n  control, with a wrong rule: {self.control}: {control}"


def check_distribution(model: ModelUnderTest, prompts: Sequence[Tensor], count: int) -> DistributionCheck:
    """Sample `count` outputs of `TOKENS` tokens from the prompts `[s]` in turn, and test the tokens' distribution.

    The model's generation settings are not used: temperature is 1, without logits processors and end tokens.
    """
    generator = torch.Generator().manual_seed(0)
    rows, own, wrong, accepted = [], [], [], 0
    with model.without_settings():
        reader = DraftReader(model.target, model.head)
        for seed in range(count):
            prompt = prompts[seed % len(prompts)]
            written, report = model.speculative([prompt], seed, max_new_tokens=TOKENS, **SAMPLED)
            [output] = written.outputs
            accepted += len(output) - report.target_forwards
            for place in reader.read(prompt, output, DRAFTED):
                bins = bins_of(place)
                rows.append(torch.zeros(DRAFTED + 3).index_add_(0, bins, place.probs))
                own.append(bins[place.token])
                wrong.append(bins[wrong_token(place, generator)])
    fits = [goodness_of_fit(torch.stack(rows), torch.stack(fallen)) for fallen in (own, wrong)]
    return DistributionCheck(count, accepted, *fits)


def bins_of(place: Place) -> Tensor:
    """Return each vocabulary token's bin `[v]`: a drafted token's rank, else one of three bins by likelihood."""
    bins = torch.full_like(place.probs, DRAFTED + 2, dtype=torch.long)
    likely = place.probs.topk(min(1 + _LIKELY + len(place.drafted), len(place.probs))).indices.tolist()
    undrafted = [token for token in likely if token not in place.drafted][: 1 + _LIKELY]
    bins[undrafted[:1]] = DRAFTED
    bins[undrafted[1:]] = DRAFTED + 1
    for rank, token in enumerate(place.drafted):
        bins[token] = rank
    return bins


def wrong_token(place: Place, generator: torch.Generator) -> int:
    """Pick a token by a wrong rule: accept each draft in turn with `min(1, p / q)`, else draw from `max(p - q, 0)`."""
    residual = place.probs.clone()
    for token, draft_prob in zip(place.drafted, place.draft_probs, strict=True):
        if float(torch.rand((), generator=generator)) * draft_prob < float(place.probs[token]):
            return token
        residual[token] = (residual[token] - draft_prob).clamp(min=0)
    return int(torch.multinomial(residual if residual.any() else place.probs, 1, generator=generator))
