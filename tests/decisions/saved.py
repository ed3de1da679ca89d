"""Files of every kind that users keep, and what they hold. `files/` was written before the package had rooms.

python -m tests.decisions.saved FOLDER
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.conftest import build_target
from transformers_resps import AutoPolicy, DraftHead, FixedPolicy, TreeShape, attach
from transformers_resps.policies.acceptance_model import AcceptanceModel, PlattScaling
from transformers_resps.policies.action_grid import ActionGrid
from transformers_resps.policies.costs import CostTable
from transformers_resps.policies.guard import BaselineGuard
from transformers_resps.policies.resps import ReSpSConfig, ReSpSPolicy
from transformers_resps.policies.throughput import ThroughputPolicy
from transformers_resps.replay import RankedText, RecordedText, record_pools


SAVED = Path(__file__).with_name("files")
SHAPES = (TreeShape.plain(), TreeShape(4, 2, 2), TreeShape(6, 3, 2), TreeShape(1, 0, 1, 3))
PROMPT = torch.tensor([[5, 7, 11, 3, 9, 7, 11]])


def target() -> Any:
    return attach(build_target())


def write(folder: Path) -> None:
    """Save one of each kind, and what it answers."""
    model = target()
    torch.manual_seed(1)
    head = DraftHead.from_target(model, draft_vocab_size=48).eval()
    head.save_pretrained(folder / "head")
    torch.manual_seed(2)
    re_sps = ReSpSPolicy(ReSpSConfig(head.config.features_width, ActionGrid(SHAPES), hidden_size=8, persistence=2))
    acceptance = AcceptanceModel([PlattScaling(0.1 * level, 1.0 + 0.05 * level) for level in range(4)])
    FixedPolicy(TreeShape(6, 3, 2, 4)).save_pretrained(folder / "fixed")
    BaselineGuard(ThroughputPolicy(top_k=3, acceptance=acceptance)).save_pretrained(folder / "guard")
    re_sps.save_pretrained(folder / "resps")
    CostTable({16: {1: 0.03, 4: 0.04}}, {2: 0.002}, {"device": "planted"}, 0.001, {16: 0.029}).save(
        folder / "costs.json"
    )
    text = model.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), max_new_tokens=24)[0]
    recorded = record_pools(model, head, text, PROMPT.shape[1], depths={1: 3, 2: 3})
    recorded.save(folder / "recorded.safetensors")
    RankedText.from_recording(recorded).save(folder / "replay.safetensors")
    (folder / "read.json").write_text(json.dumps(read(folder), indent=1) + "\n", encoding="utf-8")
    save_file({"drafted": drafted(folder)}, folder / "drafted.safetensors")


def read(folder: Path) -> dict[str, Any]:
    """What the files say to the code that loads them."""
    recorded = RecordedText.load(folder / "recorded.safetensors")
    replayed = RankedText.load(folder / "replay.safetensors")
    table = CostTable.load(folder / "costs.json")
    policies = {name: AutoPolicy.from_pretrained(folder / name) for name in ("fixed", "guard", "resps")}
    return {
        "text": recorded.input_ids.tolist(),
        "emitted": {str(shape): replayed.emitted(shape).tolist() for shape in SHAPES},
        "seconds": [table.step_seconds(shape, 20) for shape in SHAPES],
        "policies": {name: {"policy_type": one.policy_type, **one.to_config()} for name, one in policies.items()},
    }


def drafted(folder: Path) -> torch.Tensor:
    """The text that a saved head helps to write; it is the target's, so the steps come with it."""
    model = target()
    head = DraftHead.from_pretrained(folder / "head", target=model)
    policy = AutoPolicy.from_pretrained(folder / "resps")
    options = {"attention_mask": torch.ones_like(PROMPT), "max_new_tokens": 24, "return_dict_in_generate": True}
    out = model.generate(PROMPT, assistant_model=head, policy=policy, **options)
    return torch.cat([out.sequences[0], torch.tensor([step.verified for step in out.speculation.steps])])


def wanted() -> torch.Tensor:
    return load_file(SAVED / "drafted.safetensors")["drafted"]


if __name__ == "__main__":
    write(Path(sys.argv[1]))
