"""The comparison with vLLM, with our own reading of the exports in its place, and a module that stands for vLLM."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.conftest import build_target
from tests.tools.conversations import save_models, save_rows
from training.studies import vllm_exports
from training.studies.vllm_exports import Decoded
from transformers_resps import DraftHead, attach


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    torch.manual_seed(0)
    target = build_target(num_hidden_layers=6, initializer_range=0.3)
    torch.manual_seed(1)
    head = DraftHead.from_target(target, 48, feature_layers=[1, 2, 4])
    file = save_rows(tmp_path / "mine.jsonl", [["defg"], ["klkl"]])
    given = [*save_models(tmp_path, target, head), "--dataset", file, "--vllm", "python", "--max-new-tokens", "8"]
    return [*given, "--output", str(tmp_path)]


def rows(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "results.json").read_text())["rows"]
    return found


@pytest.mark.parametrize("misread", [False, True])
def test_each_variant_is_compared_in_both_layouts_as_its_files_say(
    misread: bool, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []

    def there(python: Path, options: dict[str, Any], prompts: Any, most: int) -> tuple[str, list[Decoded]]:
        assert options["dtype"] == "float32" and options["speculative_config"]["num_speculative_tokens"] == 3
        target: Any = attach(AutoModelForCausalLM.from_pretrained(options["model"], dtype=torch.float32))
        read.append(DraftHead.from_pretrained(options["speculative_config"]["model"], target=target))
        texts = [torch.tensor(ids) for ids in prompts]
        found = vllm_exports.here(target, read[-1], texts, most)
        return "0.0", [Decoded(one.tokens, one.drafts + misread) for one in found]

    monkeypatch.setattr(vllm_exports, "there", there)
    assert vllm_exports.main(command) == misread
    found = rows(tmp_path)
    assert [(one["head"], one["layout"]) for one in found] == [
        (name, layout)
        for name in ("as trained", "attention_bias", "feedback_post_norm", "a fourth layer")
        for layout in ("speculators", "specforge")
    ]
    assert all(one["prompts"] == one["same texts as plain"] == 2 for one in found)
    assert all(one["same numbers of drafts"] == (0 if misread else 2) for one in found)
    configs = [head.config for head in read[::2]]
    assert [config.attention_bias for config in configs] == [False, True, False, False]
    assert [config.feedback_post_norm for config in configs] == [False, False, True, False]
    assert [config.feature_layers for config in configs] == 3 * [[1, 2, 4]] + [[1, 2, 4, 5]]


def test_the_kept_measurement_is_what_the_pages_say() -> None:
    root = Path(vllm_exports.__file__).parents[2]
    found = json.loads((root / "training" / "studies" / "measurements" / "smollm2-vllm.json").read_text())
    assert len(found["rows"]) == 8 and all(
        one["prompts"] == one["same texts as plain"] == one["same numbers of drafts"] == 10 for one in found["rows"]
    )
    page = (root / "docs" / "train-a-head.md").read_text()
    said = re.search(r"vLLM (\S+) on a CPU.*exactly our steps: (\d+)", page, re.DOTALL)
    assert said and [*said.groups()] == [found["vllm"], str(found["rows"][0]["drafts in vLLM"])]


def test_an_engine_that_fails_ends_the_study(command: list[str]) -> None:
    command[command.index("python")] = "false"
    with pytest.raises(SystemExit, match="2"):
        vllm_exports.main(command)
