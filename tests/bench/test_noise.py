import pytest

from transformers_resps.bench.noise import BusyMachine, check_load, check_spread
from transformers_resps.bench.timing import AnswerTiming


def answers(rates: list[float]) -> list[AnswerTiming]:
    return [AnswerTiming("plain", f"x/{number}", 0, 11, 11, 10 / rate) for number, rate in enumerate(rates)]


def test_a_machine_that_others_use_is_refused_before_the_start() -> None:
    for quiet in (None, 0.0, 0.5):
        check_load(quiet)
    with pytest.raises(BusyMachine, match="use 1.7 CPUs, but at most 0.5 .*--accept-noise"):
        check_load(1.7)


def test_a_wide_spread_of_plain_decoding_stops_the_measurement() -> None:
    check_spread(answers([10, 10, 11, 10, 12, 11, 10, 11]), "j")
    with pytest.raises(BusyMachine, match=r"spread by 50%.*8 answers.*more than 25%.*Delete j.*--accept-noise"):
        check_spread(answers([5, 5, 5, 10, 10, 10, 10, 10]), "j")


def test_few_answers_are_not_judged() -> None:
    check_spread(answers([1, 10, 1, 10, 1, 10, 1]), "j")
