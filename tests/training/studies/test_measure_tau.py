"""The script that measures tau, against what calls of `generate` report."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.targets import Architecture
from tests.tokenizers import letter_tokenizer
from transformers_resps import DraftHead, FixedPolicy, TreeShape, attach


def test_tau_is_all_tokens_over_all_forwards_of_the_first_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target: Any = Architecture("llama").build("sdpa").float()
    torch.manual_seed(1)
    head = DraftHead.from_target(target)
    target.save_pretrained(tmp_path / "target")
    head.save_pretrained(tmp_path / "head")
    tokenizer = letter_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(tmp_path / "target")
    words = ("fghi", "gh", "hifgh")
    file = tmp_path / "words.jsonl"
    file.write_text("\n".join(json.dumps({"turns": [word, "never asked"]}) for word in words), encoding="utf-8")
    paths = [str(tmp_path / name) for name in ("target", "head")]
    options = ["--dataset", str(file), "--limit", "2", "--shapes", "6,2,3", "1,0,1", "--max-new-tokens", "12"]
    monkeypatch.setattr(sys, "argv", ["measure_tau.py", *paths, *options, "--output", str(tmp_path / "tau.json")])

    runpy.run_module("training.studies.measure_tau", run_name="__main__")

    attach(target)
    emitted = forwards = 0
    for word in words[:2]:
        ids = tokenizer(word, return_tensors="pt").input_ids
        policy = FixedPolicy(TreeShape(6, 2, 3))
        out = target.generate(
            ids, assistant_model=head, policy=policy, max_new_tokens=12, do_sample=False, return_dict_in_generate=True
        )
        emitted += out.sequences.shape[1] - ids.shape[1]
        forwards += out.speculation.target_forwards
    tree, plain = json.loads((tmp_path / "tau.json").read_text())["rows"]
    assert tree["tau"] == {"words": round(emitted / forwards, 3)} and tree["mean"] == tree["tau"]["words"]
    assert plain["mean"] == 1.0 and plain["shape"] == "plain"
