"""The script from prompts to a throughput policy, and what its folder lacks before it can be published."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from publishing import find_faults
from tests.targets import Architecture
from transformers_resps import AutoPolicy, BaselineGuard, DraftHead, ThroughputPolicy, attach


TRAINING = Path(__file__).parents[2] / "training"
CARD = {
    "target": "maker/tiny",
    "head": "maker/tiny-head",
    "license": "mit",
    "target_license": "mit",
    "languages": ["en"],
    "data": [{"name": "Letters", "license": "mit", "what": "answered by the target itself"}],
}


def test_prompts_become_a_policy_that_lacks_only_its_measurements(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = yaml.safe_load((TRAINING / "recipes" / "throughput_policy.yaml").read_text())
    given = {"target": "target", "head": "head", "dataset": "prompts.jsonl", "output_dir": "run", "card": CARD}
    (folder / "mine.yaml").write_text(yaml.safe_dump({**recipe, **given, "max_new_tokens": 16}))
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(TRAINING)  # as for a script that is run from there
    monkeypatch.setattr(sys, "argv", ["fit_policy.py", "--config", "mine.yaml"])

    runpy.run_path(str(TRAINING / "fit_policy.py"), run_name="__main__")
    made = Path("run/policy")
    recordings = {file: file.stat().st_mtime_ns for file in Path("run").rglob("*.safetensors") if file.parent != made}
    metrics = json.loads((made / "metrics.json").read_text())
    assert metrics["held_out_texts"] == 1 and metrics["training"]["texts"] == 5 == len(recordings) - 1
    rates = metrics["tokens_per_second"], metrics["best_fixed_tokens_per_second"]
    assert metrics["gain_over_best_fixed"] == pytest.approx(rates[0] / rates[1])
    (fault,) = find_faults(made, "policy")
    assert fault.startswith("results.json is missing")
    assert "weighs each node" in (card := (made / "README.md").read_text()) and "A guard stops drafting" in card

    runpy.run_path(str(TRAINING / "fit_policy.py"), run_name="__main__")
    assert recordings == {file: file.stat().st_mtime_ns for file in recordings}
    policy = AutoPolicy.from_pretrained(made)
    assert isinstance(policy, BaselineGuard) and isinstance(policy.policy, ThroughputPolicy)
    assert any(one.slope != 1.0 for one in policy.policy.acceptance.scalings)
    prompt, head = torch.tensor([[5, 6, 7, 3]]), DraftHead.from_pretrained("head")
    target: Any = Architecture("llama").build("sdpa").float()
    plain = target.generate(prompt, max_new_tokens=12, do_sample=False)
    out = attach(target).generate(prompt, max_new_tokens=12, do_sample=False, assistant_model=head, policy=policy)
    assert torch.equal(out, plain)
