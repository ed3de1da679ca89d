"""Folders of a head and a policy as training and measuring leave them, with figures made up by hand."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarking.provenance import config_sha256, weights_sha256
from publishing import write_card
from tests.training.publishing.tiny import TARGET, tiny_target
from transformers_resps import DraftHead, TreeShape
from transformers_resps.data import write_training_prompts
from transformers_resps.policies.action_grid import ActionGrid
from transformers_resps.policies.resps import ReSpSConfig, ReSpSPolicy


DATA = [
    {"name": "Tiny Talk", "license": "mit", "what": "opening turns, answered by the target", "hub_id": "maker/talk"},
    {"name": "Sums", "license": "cc-by-4.0", "what": "questions, answered by the target"},
]
CARD = {"license": "apache-2.0", "target_license": "apache-2.0", "languages": ["en", "fr"], "data": DATA}


def head_folder(folder: Path) -> Path:
    """A complete folder of a head."""
    torch.manual_seed(1)
    head = DraftHead.from_target(tiny_target(), draft_vocab_size=48, default_tree=[8, 3, 3])
    head.save_pretrained(folder)
    training = {"steps": 650, "positions": 560000, "epochs": 1.667, "minutes": 42.2}
    metrics = {
        "held_out_texts": 50,
        "agreement": {"1": 0.4735, "2": 0.4379},
        "tau_texts": 9,
        "simulated_tau": {"6/2/4": 1.84, "8/3/3": 1.94},
        "draft_vocab_size": 48,
        "coverage": 0.9893,
        "training": training | {"dtype": "float32", "device": "Ash Tray 9"},
    }
    recipe = {"target": TARGET, "steps": 4, "card": {**CARD, "limits": ["answers of at most 224 tokens were seen."]}}
    return complete(folder, metrics, recipe, "head", ["a", "b"])


def policy_folder(folder: Path) -> Path:
    """A complete folder of a policy with weights."""
    target = {"name_or_path": TARGET, "hidden_size": 12}
    config = ReSpSConfig(
        12, ActionGrid((TreeShape.plain(), TreeShape(4, 2, 2))), target=target, head={"hidden_size": 12}
    )
    ReSpSPolicy(config, seed=3).save_pretrained(folder)
    metrics = {
        "held_out_texts": 30,
        "tokens_per_second": 21.5,
        "best_fixed_tokens_per_second": 20.0,
        "gain_over_best_fixed": 1.075,
        "oracle_regret": 0.31,
        "training": {"steps": 800, "texts": 140, "minutes": 3.4, "device": "Ash Tray 9"},
    }
    recipe = {"objective": "full_information", "card": {**CARD, "head": "maker/tiny-head", "limits": []}}
    return complete(folder, metrics, recipe, "tiny-policy", ["a"])


def complete(folder: Path, metrics: dict[str, Any], recipe: dict[str, Any], method: str, datasets: list[str]) -> Path:
    (folder / "metrics.json").write_text(json.dumps(metrics))
    write_training_prompts(folder, ["What is it?"])
    (folder / "recipe.yaml").write_text("# As it was run.\n" + yaml.safe_dump(recipe))
    hashes = {"weights_sha256": {method: weights_sha256(folder)}, "config_sha256": {method: config_sha256(folder)}}
    (folder / "results.json").write_text(json.dumps(results(datasets) | hashes))
    (folder / "speed_ratio.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(20))
    write_card(folder)
    return folder


def results(datasets: list[str]) -> dict[str, Any]:
    """What `resps bench` would have written, as far as publishing reads it."""

    def row(method: str, ratio: float, tau: float, measured: bool = True) -> dict[str, Any]:
        figures = {"tokens_per_second": 20 * ratio, "low": ratio - 0.1, "high": ratio + 0.1, "spread": 0.0}
        return {"method": method, "ratio": ratio, "tau": tau, **figures, "temperature": 0.0, "measured": measured}

    rows = [row("plain", 1.0, 1.0), row("tree 8/3/3", 1.45, 2.25), row("oracle", 2.0, 0.0, measured=False)]
    return {
        "schema_version": 2,
        "partial": False,
        "command": ["resps", "bench", TARGET, "head"],
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "dirty": False,
        "device": "Ash Tray 9",
        "dtype": "float32",
        "threads": 2,
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "settings": {"temperatures": [0.0], "max_new_tokens": 128, "repeats": 3},
        "noise": {"accepted": False},
        "unexplained": [],
        "advice": "Use the tree 8/3/3: 1.45 times plain decoding.",
        "same_text": {"plain": 20, "tree 8/3/3": 20},
        "summaries": {name: rows for name in [*datasets, "all"]},
        "measurements": [{"prompt": f"{name}/{number}"} for name in datasets for number in range(10)],
    }


def changed(folder: Path, **files: Any) -> Path:
    """`folder` with values of its JSON files replaced: `results={"partial": True}`."""
    for name, values in files.items():
        file = folder / f"{name}.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return folder


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def copy(source: Path, folder: Path) -> Path:
    return Path(shutil.copytree(source, folder))
