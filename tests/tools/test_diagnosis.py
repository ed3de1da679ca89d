"""The verdict over readings, from tallies made up by hand."""

from dataclasses import replace

import pytest

from transformers_resps.heads.model import HeadReading
from transformers_resps.tools.diagnosis import Diagnosis, ReadingScore, Tally


@pytest.mark.parametrize(
    ("kept", "nats", "is_healthy"),
    [
        ([30, 33, 31, 36], [-90.0, -95.0, -92.0, -99.0], True),  # the same
        ([39, 42, 41, 45], [-90.0, -95.0, -92.0, -99.0], False),  # keeps more in every answer
        ([31, 33, 30, 36], [-80.0, -86.0, -81.0, -89.0], False),  # keeps as many, and is likelier in every answer
        ([31, 33, 30, 36], [-80.0, -99.0, -70.0, -110.0], True),  # likelier here, unlikelier there
        ([29, 32, 30, 36], [-89.9, -94.9, -91.9, -98.9], True),  # surely likelier, by nothing that matters
        ([20, 23, 21, 26], [-80.0, -86.0, -81.0, -89.0], True),  # likelier, but keeps fewer
    ],
)
def test_a_reading_is_better_only_beyond_noise(kept: list[int], nats: list[float], is_healthy: bool) -> None:
    def score(theta: float, kept: list[int], nats: list[float]) -> ReadingScore:
        tallies = (Tally(40, k, n) for k, n in zip(kept, nats, strict=True))
        return ReadingScore(HeadReading((2, 4, 5), theta, False), (0.5, 0.4), tuple(tallies))

    configured = score(1e6, [30, 33, 31, 36], [-90.0, -95.0, -92.0, -99.0])
    found = Diagnosis((configured, score(1e4, kept, nats)))
    assert found.is_healthy is is_healthy and found.overrides == ({} if is_healthy else {"rope_theta": 1e4})


def cells(*kept: list[int]) -> Diagnosis:
    """Of readings whose chains keep so many tokens at 40 positions of each answer; nats that tell nothing."""
    readings = [HeadReading((2, 4, 5), base, False) for base in (1e4, 1e5, 1e6)]
    tallies = [tuple(Tally(40, number, -90.0) for number in row) for row in kept]
    return Diagnosis(tuple(ReadingScore(r, (0.5, 0.4), t) for r, t in zip(readings, tallies, strict=False)))


def test_a_verdict_of_too_little_evidence_says_so_first() -> None:
    alike = [30, 33, 31, 36] * 3
    scattered = [42, 21, 34, 33, 18, 42, 31, 35, 36, 27, 34, 33]
    assert cells(alike, alike).verdict.startswith("The head is read as it was trained")
    few = "Too little evidence: 9 answers of 360 positions. So far 0.81 of 2 drafted tokens accepted as configured, "
    assert cells(alike[:9], alike[:9]).verdict.startswith(few + "and no other settings are surely better")
    doubtful = cells(alike, scattered)
    gain, error = doubtful.gain(doubtful.scores[1])
    assert doubtful.is_healthy and doubtful.possible_gain == pytest.approx(gain + 3 * error)
    assert doubtful.verdict.startswith(
        f"Too little evidence: other settings might accept {doubtful.possible_gain:.2f}"
    )
    for unsure in (doubtful, cells(alike[:9], alike[:9])):
        assert "as it was trained" not in unsure.verdict and unsure.verdict.endswith("Read more answers.")
    longer = cells([k + 400 for k in alike], [k + 400 for k in scattered])  # the same doubt in longer steps
    assert longer.possible_gain == pytest.approx(doubtful.possible_gain) and longer.has_evidence
    better = [number + 9 for number in alike]
    early = cells(alike[:9], better[:9]).verdict
    assert early.startswith("Too little") and "1.03 with `rope_theta=100000.0`" in early and "wrongly" not in early
    assert cells(alike, better).verdict.startswith("The head is read wrongly")
    wrong = cells(alike, better, [number + 9 for number in scattered]).verdict  # surely wrong, but which is right?
    assert wrong.startswith("The head is read wrongly") and "With more answers, other settings might accept" in wrong


def test_it_is_settled_when_more_answers_would_change_nothing() -> None:
    alike = [30, 33, 31, 36] * 5
    worse, scattered = [number - 9 for number in alike], [36, 27, 34, 33] * 5
    assert cells(alike, worse).is_settled and cells(worse, alike).is_settled
    assert not cells(alike[:16], worse[:16]).is_settled  # too early
    assert not cells(alike, scattered).is_settled and not cells(worse, alike, scattered).is_settled


def test_only_readings_that_are_far_worse_are_not_followed() -> None:
    base = [30, 33, 31, 36, 30, 33, 31, 36]
    found = cells(base, [k + 1 for k in base], [k - 9 for k in base])
    assert found.worth_following == tuple(score.reading for score in found.scores)  # as likely, so it may be better
    unlikely = replace(found.scores[2], tallies=tuple(replace(t, log_prob=-150.0) for t in found.scores[2].tallies))
    dropped = Diagnosis((*found.scores[:2], unlikely))
    assert dropped.worth_following == tuple(score.reading for score in found.scores[:2])
    turned = Diagnosis((unlikely, *found.scores[:2]))
    assert turned.worth_following == tuple(score.reading for score in turned.scores)  # the configured one is kept
    few = Diagnosis(tuple(replace(score, tallies=score.tallies[:7]) for score in dropped.scores))
    assert len(few.worth_following) == 3
