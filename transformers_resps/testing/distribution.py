"""Test whether sampled tokens follow the target's distribution, on the first tokens of many sampled answers.

The exact distribution comes from plain forwards over the texts that were written. Trees can bend a distribution only
towards or away from what they draft, so the bins are the drafted tokens of each place, best first, and the rest of the
vocabulary in three pools by likelihood.

A test that finds nothing may have no power, so it also runs on tokens of a rule that is known to be wrong. The
speculative sampling of Leviathan et al. (arXiv 2211.17192) keeps a drafted token with probability `min(1, p / q)`,
which is right for tokens drawn from q, and wrong for the k best of q. The control picks tokens by this rule, at the
same places with the same drafts. If the test cannot tell them from the target's own, it had no power.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .drafts import DraftReader, Place
from .goodness_of_fit import Fit, goodness_of_fit
from .model_under_test import ModelUnderTest
from .texts import SAMPLED


DRAFTED = 4  # bins for drafted tokens, best first
_LIKELY = 3  # undrafted tokens in the second pool; the first holds the likeliest one, the third the rest
TOKENS = 8  # of each answer
MIN_ACCEPTED = 16  # the control tests the statistic only, so enough of the engine's own drafts must be accepted


@dataclass(frozen=True, slots=True)
class DistributionCheck:
    """The result of the test.

    Attributes:
        answers: number of sampled answers.
        accepted: number of drafted tokens in them.
        fit: of the sampled tokens.
        control: of the tokens picked by the wrong rule.
    """

    answers: int
    accepted: int
    fit: Fit
    control: Fit

    name = "distribution of sampled tokens"

    @property
    def passed(self) -> bool:
        return self.fit.fits

    @property
    def has_power(self) -> bool:
        """Whether enough drafts were accepted, and the wrong rule was detected."""
        return self.accepted >= MIN_ACCEPTED and not self.control.fits

    @property
    def verdict(self) -> str:
        if not self.passed:
            return "NOT the target's distribution"
        if self.accepted < MIN_ACCEPTED:
            return f"NO POWER, only {self.accepted} of {MIN_ACCEPTED} needed drafted tokens were accepted"
        return "the target's" if self.has_power else "NO POWER, the wrong rule was not detected"

    def __str__(self) -> str:
        found = "NOT detected" if self.control.fits else "detected"
        return f"{self.fit}: {self.verdict}\n  control, with a wrong rule: {self.control}: {found}"


def check_distribution(model: ModelUnderTest, prompts: Sequence[Tensor], answers: int) -> DistributionCheck:
    """Sample the first `TOKENS` tokens of `answers` answers, over `prompts` `[s]` in turn, each with its own seed.

    Temperature 1, no processors and no end token, whatever the model's settings say.
    """
    generator = torch.Generator().manual_seed(0)
    rows, own, wrong, accepted = [], [], [], 0
    with model.without_settings():
        reader = DraftReader(model.target, model.head)
        for seed in range(answers):
            prompt = prompts[seed % len(prompts)]
            written, report = model.speculative([prompt], seed, max_new_tokens=TOKENS, **SAMPLED)
            [answer] = written.answers
            accepted += len(answer) - report.target_forwards
            for place in reader.read(prompt, answer, DRAFTED):
                bins = bins_of(place)
                rows.append(torch.zeros(DRAFTED + 3).index_add_(0, bins, place.probs))
                own.append(bins[place.token])
                wrong.append(bins[wrong_token(place, generator)])
    probabilities = torch.stack(rows)
    fits = [goodness_of_fit(probabilities, torch.stack(fallen)) for fallen in (own, wrong)]
    return DistributionCheck(answers, accepted, *fits)


def bins_of(place: Place) -> Tensor:
    """The bin of every token, `[v]`."""
    bins = torch.full_like(place.probs, DRAFTED + 2, dtype=torch.long)
    likely = place.probs.topk(min(1 + _LIKELY + len(place.drafted), len(place.probs))).indices.tolist()
    undrafted = [token for token in likely if token not in place.drafted][: 1 + _LIKELY]
    bins[undrafted[:1]] = DRAFTED
    bins[undrafted[1:]] = DRAFTED + 1
    for rank, token in enumerate(place.drafted):
        bins[token] = rank
    return bins


def wrong_token(place: Place, generator: torch.Generator) -> int:
    """A token by `min(1, p / q)` on the best drafts, or, if none is kept, from what p has more than q."""
    residual = place.probs.clone()
    for token, draft_prob in zip(place.drafted, place.draft_probs, strict=True):
        if float(torch.rand((), generator=generator)) * draft_prob < float(place.probs[token]):
            return token
        residual[token] = (residual[token] - draft_prob).clamp(min=0)
    return int(torch.multinomial(residual if residual.any() else place.probs, 1, generator=generator))
