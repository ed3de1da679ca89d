r"""Fit `policy="auto"` to a head and your prompts: how often the head's drafts are accepted there.

    python training/fit_policy.py --config training/recipes/throughput_policy.yaml --target TARGET --head HEAD \
        --dataset my.jsonl --output_dir my-policy

The target answers the prompts once, and the head's drafts are recorded at every position. The policy is fitted to most
of the recordings, and tested on the others with the costs of this machine. It contains no costs: it learns them while
it decodes. If the run is interrupted, the same command resumes it.

The result is `OUTPUT_DIR/policy`, for `AutoPolicy.from_pretrained`. Its gain on held-out prompts is printed.
"""

import hashlib
import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prompts.policy_prompts import PromptArguments, name_of
from prompts.recordings import load, record
from publishing import recipe_of, write_run
from runs.command_line import parse
from transformers_resps import BaselineGuard, DraftHead, attach
from transformers_resps.bench.headroom import shapes_for
from transformers_resps.bench.models import load_target
from transformers_resps.bench.provenance import machine
from transformers_resps.calibration.cost_table import CostTable
from transformers_resps.calibration.measuring import calibrate
from transformers_resps.data import write_training_prompts
from transformers_resps.head import pair_identity
from transformers_resps.replay import Oracle, OutcomeTable, RecordedText, ReplayText, fitted_policy, replay_policy


@dataclass
class FitArguments(PromptArguments):
    """How much is recorded, and where."""

    limit: int = field(default=60, metadata={"help": "Maximum number of prompts; 0 for all."})
    max_new_tokens: int = field(default=96, metadata={"help": "Maximum length of an answer in tokens."})
    output_dir: str = field(default="policy-fit", metadata={"help": "Folder for recordings, costs and the policy."})


def recorded(
    target: Any, head: DraftHead, prompts: list[Tensor], script: FitArguments, kind: str
) -> list[RecordedText]:
    """The recordings of exactly these prompts; missing ones are made."""
    names = "".join(sorted(map(name_of, prompts)))
    folder = Path(script.output_dir) / f"{kind}-{hashlib.sha256(names.encode()).hexdigest()[:8]}"
    record(target, head, prompts, script.temperature, folder, script.max_new_tokens)
    texts = load(folder)
    if not texts:
        raise ValueError(
            f"None of {len(prompts)} prompts has an answer of at least four tokens. Pass other prompts, or raise "
            "--max_new_tokens."
        )
    return texts


def compare(fitted_to: list[RecordedText], held_out: list[RecordedText], costs: CostTable) -> dict[str, float]:
    """Compare the fitted policy with the best fixed shape, found on the same recordings, and with the oracle."""
    grid = shapes_for("cpu")
    searched, tested = (
        Oracle(OutcomeTable([ReplayText.from_recording(text).outcomes(grid, costs) for text in texts]))
        for texts in (fitted_to, held_out)
    )
    headroom = tested.headroom(searched.best_fixed)
    policy, seconds = BaselineGuard(fitted_policy(fitted_to)), 0.0  # keeps learning, as in use
    for text in held_out:
        seconds += replay_policy(text, policy, costs).seconds
    return {
        "tokens_per_second": headroom.tokens / seconds,
        "best_fixed_tokens_per_second": headroom.tokens / headroom.fixed_seconds,
        "gain_over_best_fixed": headroom.fixed_seconds / seconds,
        "oracle_regret": seconds / headroom.oracle_seconds - 1.0,
    }


def main() -> None:
    (script,) = parse(FitArguments)
    recipe = recipe_of(sys.argv, asdict(script))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    target = attach(load_target(script.target, script.target_dtype, device, packed=script.pack))
    head = DraftHead.from_pretrained(script.head, target=target)
    prompts = script.read_prompts()
    prompts.check_context(target, script.max_new_tokens)
    costs = calibrate(target, head, folder=Path(script.output_dir) / "costs")
    fitted_to = recorded(target, head, [*prompts.train, *prompts.watched], script, "fit")
    held_out = recorded(target, head, prompts.tested, script, "test")
    found = compare(fitted_to, held_out, costs)
    folder = Path(script.output_dir) / "policy"
    BaselineGuard(fitted_policy(fitted_to, **pair_identity(target, head))).save_pretrained(folder)
    write_training_prompts(folder, prompts.first_questions)
    where = machine(target)
    facts = {"texts": len(fitted_to), "dtype": where["dtype"], "device": where["device"]}
    write_run(folder, {"held_out_texts": len(held_out), **found, "training": facts}, recipe)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
