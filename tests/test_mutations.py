"""The planted bugs have a place; `python -m tests.mutations` tells whether the tests notice them."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.mutations.bugs import MUTATIONS
from tests.mutations.bugs.decoding import no_end
from tests.mutations.planted import Blame
from tests.mutations.planting import Mutation, plant, resolve
from transformers_resps.decoding import acceptance, loop


ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.bug)
def test_a_bug_takes_the_place_of_a_function(mutation: Mutation, monkeypatch: pytest.MonkeyPatch) -> None:
    *_, right = resolve(mutation.symbol)
    mutation.plant(monkeypatch.setattr)
    *_, planted = resolve(mutation.symbol)
    assert planted is not right and type(planted) is type(right)


@pytest.mark.parametrize("named", sorted({mutation.tests for mutation in MUTATIONS}))
def test_the_tests_that_must_notice_a_bug_are_there(named: str) -> None:
    file, _, function = named.partition("::")
    assert f"def {function}(" in (ROOT / file).read_text(encoding="utf-8") if function else (ROOT / file).is_file()


@pytest.mark.parametrize("symbol", ["tree:DraftTree.gone", "tree:Gone.from_pool", "gone:DraftTree"])
def test_a_symbol_that_is_gone_is_named(symbol: str) -> None:
    with pytest.raises(LookupError, match=f"has no `{symbol}`. The bug 'old' needs it"):
        replace(no_end, bug="old", symbol=symbol).plant()


def test_a_parameter_that_is_gone_is_named() -> None:
    with pytest.raises(TypeError, match="`tree:followed` has no parameter 'count', 'self', 'token'. The bug 'old'"):
        replace(no_end, bug="old", symbol="tree:followed").plant()


def test_a_bug_is_planted_wherever_its_function_was_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    symbol = "decoding.acceptance:read_picks"
    plant(symbol, lambda read_picks: lambda batch, tree, logits: None, monkeypatch.setattr)
    assert acceptance.read_picks is loop.read_picks is resolve(symbol)[-1]
    assert acceptance.read_picks(None, None, None) is None


def test_a_bug_that_fails_itself_is_not_counted_as_caught() -> None:
    mutation = next(mutation for mutation in MUTATIONS if "processors" in mutation.bug)
    call = pytest.CallInfo.from_call(lambda: mutation.wrong(print, None, None, None, None), "call")
    with pytest.raises(pytest.exit.Exception, match="the bug itself raised KeyError"):
        Blame().pytest_exception_interact(call)
