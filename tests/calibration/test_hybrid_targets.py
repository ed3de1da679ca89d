"""What steps cost on a target whose recurrent layers read the accepted tokens once more."""

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import FakeClock
from tests.recurrent_targets import NEEDS_STATES, recurrent
from transformers_resps import calibrate
from transformers_resps.verifying.hybrids import known_mixers


pytestmark = NEEDS_STATES


def test_reading_the_accepted_tokens_again_is_in_the_price_of_a_tree(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fake_clock: FakeClock
) -> None:
    target = recurrent("qwen3_next")[0].build()
    mixers = known_mixers(target)
    kind = type(next(iter(mixers.values())))
    forward = kind.forward

    def timed(self: Any, *arguments: Any, **keywords: Any) -> Any:
        fake_clock.advance(1.0)
        return forward(self, *arguments, **keywords)

    monkeypatch.setattr(kind, "forward", timed)
    verify = calibrate(target, folder=tmp_path, clock=fake_clock).verify
    for seconds in verify.values():
        assert seconds[1] == len(mixers)
        assert {seconds[nodes] for nodes in seconds if nodes > 2} == {2 * len(mixers)}
