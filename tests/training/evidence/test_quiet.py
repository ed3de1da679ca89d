"""A process that others disturbed, or that lies apart from the others, says why it gives no figure."""

import subprocess
import sys

import pytest

from training.evidence import quiet
from training.evidence.quiet import Watch, apart, probe


QUIET = [1.0, 1.01, 0.99, 1.0, 1.0, 1.01, 1.0, 0.99, 1.0]


def watch(**changes: object) -> Watch:
    made = Watch(0.1, 0.02, QUIET, QUIET, 0.05, 0.3)
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def test_a_quiet_run_has_no_reasons_against_it() -> None:
    assert watch().reasons_against_times == [] and Watch().reasons_against_times == []


@pytest.mark.parametrize(
    ("changes", "says", "against_ratios"),
    [
        ({"load_before": 1.2}, "others used 1.2 processors before it", True),
        ({"neighbours": 0.3}, "others used 0.30 processors during it", True),
        ({"before": [1.0, 1.0, 2.0, 2.0]}, "the first probe spread by", False),
        ({"after": [1.0, 1.0, 2.0, 2.0]}, "the last probe spread by", False),
        ({"after": [1.3 * seconds for seconds in QUIET]}, "the probes differ by 30%", False),
        ({"plain_spread": 0.2}, "plain decoding's rates spread by 20%", False),
    ],
)
def test_what_others_took_counts_against_ratios_and_a_probe_against_times_alone(
    changes: dict[str, object], says: str, against_ratios: bool
) -> None:
    found = watch(**changes)
    assert found.reasons_against_times[0].startswith(says) and bool(found.reasons) is against_ratios


def test_a_process_lies_apart_where_most_of_its_ratios_do() -> None:
    near = [[1.47, 1.35], [1.46, 1.35]]
    assert apart([*near, [1.48, 1.70]]) == [[], [], ["its ratios lie 13% off the other processes'"]]
    assert apart([[*row, 1.6] for row in near] + [[1.48, 1.70, 1.62]]) == [[], [], []]  # one arm sampled another text
    assert apart([[1.0], [1.2]]) == [
        ["its ratios lie 17% off the other processes'"], ["its ratios lie 20% off the other processes'"],
    ]  # fmt: skip
    assert apart([[1.0]]) == [[]] and apart([]) == []


def test_the_intel_processes_that_a_probe_threw_away_stay() -> None:
    assert apart([[1.468, 1.348, 1.57], [1.470, 1.350, 1.63], [1.461, 1.349, 1.55]]) == [[], [], []]


def test_the_probe_times_fixed_work_for_some_seconds_after_a_first_time() -> None:
    calls, pauses = list[int](), list[float]()
    times = iter(range(200))
    assert probe(lambda: calls.append(1), lambda: float(next(times)), pauses.append) == [1.0] * 60
    assert len(calls) == 61 and sum(pauses) > 3


def test_children_that_run_are_no_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    told = quiet.psutil.cpu_times()
    monkeypatch.setattr(quiet.psutil, "cpu_times", lambda: told)
    alone = quiet._seconds_of_others()
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as child:
        while sum(quiet.psutil.Process(child.pid).cpu_times()[:2]) < 0.2:
            pass
        assert quiet._seconds_of_others() <= alone - 0.2
        child.kill()
