"""docs/from_stock_to_published.py from a tiny stock model to the Hub and back, its commands run in this process."""

import json
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.hub.loopback_hub import LoopbackHub
from tests.targets import Architecture
from tests.test_docs import QUICKLY
from tests.tokenizers import ON_ONE_LINE, templated
from tests.training.publishing.tiny import CARD
from transformers_resps.tools import cli


ROOT = Path(__file__).parents[3]


def quickly(*words: str | Path) -> None:
    """A command of the script, shortened as in the tests of the pages."""
    program, *rest = map(str, words)
    named = " ".join([program, *rest[:1]])
    more = next((shlex.split(more) for name, more in QUICKLY.items() if name in named), [])
    more = [word for word in more if word != "--accept-noise"]
    if program == "resps":
        assert cli.main([*rest, *more]) in (0, 1) if rest[0] == "doctor" else cli.main([*rest, *more]) == 0
        return
    arguments = [*rest, *more]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", arguments)
        try:
            runpy.run_path(str(ROOT / rest[0]), run_name="__main__")
        except SystemExit as ended:
            assert ended.code in (0, None), arguments


def test_a_stock_model_gets_a_head_and_a_policy_that_anybody_can_download(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("transformers_resps.calibration.HF_HOME", str(tmp_path / "costs"))
    monkeypatch.setattr("transformers_resps.tools.quiet.other_load", lambda: 0.0)  # as on a quiet machine,
    monkeypatch.setattr("benchmarking.command.check_spread", lambda *_: None)  # which this one is not
    torch.manual_seed(1)
    Architecture("llama", {"max_position_embeddings": 1024}).build("sdpa").float().save_pretrained(tmp_path / "target")
    templated(ON_ONE_LINE).save_pretrained(tmp_path / "target")
    words = ("fghi", "gh", "hifgh", "ifgf", "jklm", "nopqr", "defg", "mnbd")
    for name, some in (("prompts", words), ("other", ("kjih", "dcbe", "rqpo"))):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"prompt": word}) for word in some))
    (tmp_path / "card.yaml").write_text(yaml.safe_dump(CARD))
    (tmp_path / "training").symlink_to(ROOT / "training")
    monkeypatch.chdir(tmp_path)

    script: dict[str, Any] = runpy.run_path(str(ROOT / "docs" / "from_stock_to_published.py"), run_name="script")
    monkeypatch.setitem(script["main"].__globals__, "run", quickly)
    given = "--target target --prompts prompts.jsonl --benchmark other.jsonl --card card.yaml --output work"
    script["main"]([*given.split(), "--repository", "tester/tiny"])

    assert "The same text." in capsys.readouterr().out
    for kind, drafts in (("head", "draft-head"), ("policy", "draft-policy")):
        files = hub.repositories[f"tester/tiny-{kind}"].files
        needed = {"README.md", "config.json", "model.safetensors", "metrics.json", "recipe.yaml", "results.json"}
        assert needed | {"ratios.png", "training_prompts.json", "custom_generate/generate.py"} <= files.keys()
        card = files["README.md"].decode()
        assert "base_model: maker/tiny" in card and drafts in card and f'"tester/tiny-{kind}"' in card
        assert "| plain |" in card and "](ratios.png)" in card and "Letters (mit)" in card
        assert str(tmp_path) not in "".join(
            files[name].decode() for name in files if name.endswith((".json", ".yaml"))
        )
