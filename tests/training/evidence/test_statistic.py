"""The protocol's statistic against what can be computed by hand."""

import numpy as np
import pytest

from training.evidence.statistic import permutation_p, speed, tau, wilson

from .files import rows_of


ARMS = ("plain", "auto")


def test_a_speed_is_total_tokens_over_total_seconds_of_the_same_requests() -> None:
    found = speed([rows_of(ARMS, {"auto": 0.5}, number=number) for number in range(3)], "auto", "plain")
    assert found.ratio == pytest.approx(2.0)
    assert found.low == pytest.approx(2.0) and found.high == pytest.approx(2.0)  # each request alike: nothing to draw
    assert found.lowest == pytest.approx(2.0) and found.highest == pytest.approx(2.0)


def test_what_lasts_longer_weighs_more() -> None:
    rows = [
        {"arm": arm, "prompt": f"a/{place}", "tokens": 10, "seconds": seconds}
        for place, pair in enumerate(((1.0, 0.5), (9.0, 9.0)))
        for arm, seconds in zip(ARMS, pair, strict=True)
    ]
    assert speed([rows], "auto", "plain").ratio == pytest.approx(10 / 9.5)


def test_an_interval_holds_processes_that_differ() -> None:
    processes = [rows_of(ARMS, {"auto": seconds}, number=0) for seconds in (0.5, 1.0, 0.8)]
    found = speed(processes, "auto", "plain")
    assert found.lowest == pytest.approx(1.0) and found.highest == pytest.approx(2.0)
    assert found.low < found.ratio < found.high and found.low < 1.1


def test_requests_that_are_not_paired_are_refused() -> None:
    rows = rows_of(ARMS, {})
    with pytest.raises(ValueError, match="auto did not answer every prompt"):
        speed([rows, rows[:-1]], "auto", "plain")


def test_tau_is_tokens_over_forwards() -> None:
    assert tau([rows_of(ARMS, {})], "auto") == 2.0


def test_the_wilson_interval_is_that_of_the_formula() -> None:
    low, high = wilson(1000, 1000)
    assert low == pytest.approx(1000 / (1000 + 1.959964**2)) and high == 1.0
    low, high = wilson(5, 10)
    assert (low, high) == (pytest.approx(0.2366, abs=1e-4), pytest.approx(0.7634, abs=1e-4))


def test_a_permutation_finds_other_distributions_and_no_difference_in_equal_ones() -> None:
    drawn = np.random.default_rng(1)
    own, same = drawn.integers(0, 4, (2, 60, 3))
    distance, chance = permutation_p(own, same, draws=200)
    assert 0 < distance < 0.3 and chance > 0.05
    distance, chance = permutation_p(own, drawn.integers(2, 6, (60, 3)), draws=200)
    assert distance > 0.3 and chance < 0.01
