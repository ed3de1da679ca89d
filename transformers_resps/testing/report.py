"""The report of a lossless check: printed, a page that can be pasted into an issue."""

from dataclasses import dataclass

from .distribution import DistributionCheck
from .texts import TextCheck


@dataclass(frozen=True, slots=True)
class LosslessReport:
    """The result of `assert_lossless`; printed, it is a short page.

    Attributes:
        facts: versions, device, dtype, threads, target, head, policy.
        texts: answers compared token for token, one entry per decoding setting.
        distribution: the test of sampled tokens, with its control.
        seconds: that the check took.
    """

    facts: dict[str, str]
    texts: tuple[TextCheck, ...]
    distribution: DistributionCheck
    seconds: float

    @property
    def is_lossless(self) -> bool:
        """Whether every answer is the plain one or differs first at a near-tie, and the sampled tokens fit."""
        return self.distribution.passed and all(check.passed for check in self.texts)

    @property
    def is_tested(self) -> bool:
        """Whether drafted tokens of the policy were accepted; otherwise its answers are plain decoding's own."""
        return self.distribution.has_power or any(check.accepted for check in self.texts if check.is_of_policy)

    @property
    def verdict(self) -> str:
        if not self.is_lossless:
            failed = [check.name for check in self.texts if not check.passed]
            failed += [] if self.distribution.passed else [self.distribution.name]
            return f"NOT LOSSLESS: {', '.join(failed)}"
        if not self.is_tested:
            beside = "" if any(check.accepted for check in self.texts) else ", nor of the built-in trees"
            return (
                f"NOTHING WAS TESTED: no drafted token of the policy was accepted{beside}, so its answers were plain "
                "decoding's own. Pass a trained head, or prompts that it can draft for"
            )
        differing = sum(len(check.differences) for check in self.texts)
        exact = (
            "every answer is the plain one"
            if not differing
            else f"every answer is the plain one, except for {differing} that differ at a near-tie"
        )
        blind = "" if self.distribution.has_power else "; the distribution test had no power"
        idle = [check.name for check in self.texts if check.is_of_policy and not check.accepted]
        untested = f"; no draft was accepted in {len(idle)} of the comparisons" if idle else ""
        return f"LOSSLESS: {exact}{untested}{blind}"

    def __str__(self) -> str:
        width = max(map(len, self.facts))
        lines = [f"{name:{width}}  {value}" for name, value in self.facts.items()]
        lines.append("")
        for check in self.texts:
            lines.append(f"{check.name}: {check}")
            lines += [f"  {difference}" for difference in (*check.differences, *check.mismatches)]
        lines += [f"{self.distribution.name}: {self.distribution}", ""]
        return "\n".join([*lines, f"{self.verdict} ({self.seconds:.0f} s)"])


class NotLosslessError(AssertionError):
    """`assert_lossless` found output that is not the model's own.

    Attributes:
        report: the whole `LosslessReport`.
    """

    def __init__(self, report: LosslessReport) -> None:
        super().__init__(str(report))
        self.report = report
