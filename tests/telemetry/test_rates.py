"""Rates and their intervals, by hand."""

from transformers_resps.telemetry.report import Timing, bootstrap_interval, rate


def test_the_rate_is_total_over_total_not_a_mean_of_rates() -> None:
    assert rate([Timing(10, 1.0), Timing(10, 4.0)]) == 4.0


def test_the_interval_is_paired_and_covers_the_ratios_of_the_prompts() -> None:
    own = [[Timing(10, 1.0), Timing(10, 10.0)]]
    base = [[Timing(10, 3.0), Timing(10, 10.0)]]
    low, high = bootstrap_interval(own, base)
    assert 1.0 <= low < high <= 3.0
    assert bootstrap_interval(own, own) == (1.0, 1.0)  # both of one draw
    assert bootstrap_interval(own, base) == (low, high)  # the same every time


def test_the_interval_holds_processes_that_differ() -> None:
    own = [[Timing(10, seconds)] * 4 for seconds in (0.5, 1.0, 0.8)]
    low, high = bootstrap_interval(own, [[Timing(10, 1.0)] * 4] * 3)
    assert low < 1.1 and high > 1.6
