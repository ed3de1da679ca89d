"""A run that was not quiet says why."""

import pytest

from training.evidence.quiet import Watch, apart, drift_of, probe, spread_of


QUIET = [1.0, 1.01, 0.99, 1.0, 1.0, 1.01, 1.0, 0.99, 1.0]


def watch(**changes: object) -> Watch:
    made = Watch(0.1, 0.02, QUIET, QUIET, 0.05, 0.3)
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def test_a_quiet_run_has_no_reasons_against_it() -> None:
    assert watch().reasons == []
    assert watch(load_before=None, neighbours=None, plain_spread=None).reasons == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"load_before": 1.2}, "others used 1.2 processors before it"),
        ({"neighbours": 0.3}, "others used 0.30 processors during it"),
        ({"before": [1.0, 1.0, 2.0, 2.0]}, "the first probe spread by"),
        ({"after": [1.0, 1.0, 2.0, 2.0]}, "the last probe spread by"),
        ({"after": [1.3 * seconds for seconds in QUIET]}, "the probes differ by 30%"),
        ({"plain_spread": 0.2}, "plain decoding's rates spread by 20%"),
    ],
)
def test_each_sign_of_a_busy_machine_is_a_reason(changes: dict[str, object], says: str) -> None:
    assert watch(**changes).reasons[0].startswith(says)


def test_processes_that_lie_apart_are_a_reason() -> None:
    assert apart([100.0, 105.0, 109.0]) == []
    assert apart([100.0, 120.0]) == ["its processes lie 20% apart"]


def test_the_probe_times_fixed_work_for_some_seconds_after_a_first_time() -> None:
    calls, pauses = list[int](), list[float]()
    times = iter(range(200))
    assert probe(lambda: calls.append(1), lambda: float(next(times)), pauses.append) == [1.0] * 60
    assert len(calls) == 61 and sum(pauses) > 3 and spread_of([1.0] * 3) is None and drift_of([], [1.0]) is None
