"""Steps and saved files are those of the code before it was moved into rooms."""

import json
from pathlib import Path

from tests.decisions import saved
from tests.decisions.cases import decided, tiny_calls


KNOWN = json.loads(Path(__file__).with_name("decisions.json").read_text(encoding="utf-8"))


def test_every_step_decides_what_it_always_did() -> None:
    odd = [name for name, call in tiny_calls() if decided(call()) != KNOWN[f"tiny: {name}"]]
    assert not odd


def test_files_of_earlier_code_hold_what_they_held() -> None:
    read = json.loads((saved.SAVED / "read.json").read_text(encoding="utf-8"))
    assert json.loads(json.dumps(saved.read(saved.SAVED))) == read
    assert saved.drafted(saved.SAVED).tolist() == saved.wanted().tolist()
