import pytest

from transformers_resps.bench.advice import Standing, advise
from transformers_resps.bench.timing import Interval


EVEN = Interval(1.0, 1.0, 1.0)


def standing(name: str, effort: int, to_plain: tuple[float, float, float], to_fastest: Interval = EVEN) -> Standing:
    return Standing(name, effort, Interval(*to_plain), to_fastest)


BEHIND, WITHIN = Interval(0.8, 0.7, 0.9), Interval(0.97, 0.9, 1.05)
CASES = {
    "a policy that is surely fastest": (
        [standing("best fixed 12/4/4", 3, (1.2, 1.1, 1.3), BEHIND), standing("auto", 4, (1.5, 1.4, 1.6))],
        "Use auto: 1.50 times plain decoding (1.40 to 1.60).",
    ),
    "a fixed tree within noise of a policy": (
        [standing("best fixed 12/4/4", 3, (1.46, 1.3, 1.5), WITHIN), standing("Re-SpS mine", 5, (1.5, 1.4, 1.6))],
        "Best fixed 12/4/4 is as good as anything here: 1.46 times plain decoding (1.30 to 1.50); Re-SpS mine, with "
        "1.50, is not faster beyond noise.",
    ),
    "everything loses": (
        [standing("auto", 4, (0.97, 0.95, 0.99)), standing("best fixed 4/3/1", 3, (0.8, 0.7, 0.9), BEHIND)],
        "Speculation does not pay on this machine: verification of 8 nodes costs 2.1 plain steps, and the fastest, "
        "auto, reaches 0.97 (0.95 to 0.99).",
    ),
    "a gain within noise is none": (
        [standing("auto", 4, (1.04, 0.98, 1.1))],
        "Decode plainly: nothing is faster beyond noise on this machine: verification of 8 nodes costs 2.1 plain "
        "steps, and the fastest, auto, reaches 1.04 (0.98 to 1.10).",
    ),
    "a simpler method that is not surely better than plain does not replace one that is": (
        [standing("prompt lookup", 1, (1.1, 0.7, 1.6), WITHIN), standing("auto", 4, (1.2, 1.1, 1.3))],
        "Use auto: 1.20 times plain decoding (1.10 to 1.30).",
    ),
    "nothing to compare": (
        [],
        "Nothing was compared with plain decoding: choose with --methods, --policy or --shapes.",
    ),
}


@pytest.mark.parametrize(("standings", "sentence"), CASES.values(), ids=CASES)
def test_the_advice_follows_from_the_intervals(standings: list[Standing], sentence: str) -> None:
    assert advise(standings, 2.1, 10) == sentence


def test_without_a_cost_table_the_advice_names_no_cost() -> None:
    assert "verification" not in advise([standing("auto", 4, (0.9, 0.8, 0.95))], None, 10)


def test_one_prompt_gives_no_advice_and_a_few_are_told_first() -> None:
    fast = [standing("auto", 4, (2.0, 1.9, 2.1))]
    assert advise(fast, 2.1, 1).startswith("NOT ENOUGH EVIDENCE: one prompt says nothing about others.")
    few = advise(fast, 2.1, 2)
    assert few.startswith("NOT ENOUGH EVIDENCE: 2 prompts") and few.endswith("on these: Use auto: 2.00 times plain "
        "decoding (1.90 to 2.10).")  # fmt: skip
    assert advise(fast, 2.1, 8).startswith("Use auto")
    assert advise([], None, 2).startswith("Nothing was compared")
