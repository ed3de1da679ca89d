"""What a step may ask of an accelerator beside the target's forward, counted on a device that no machine has.

Kernels and host synchronisations are means over the steps of one text; a copy between host and device synchronises,
either way. When one of them comes back, `python -m tests.pretend "8/4/2"` shows the line.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


ROOT = Path(__file__).parents[2]

# Call -> kernels and synchronisations of a step, at most. Stock decoding stands beside ours.
BUDGETS = {
    "stock plain": (16, 1.0),
    "stock prompt lookup": (42, 13.0),
    "plain": (7, 1.0),
    "8/4/2": (163, 1.0),
    "60/8/10": (285, 1.0),
    # The draft is one launch, and so is what the target computes for a tree; what is accepted moves in a few.
    "8/4/2 captured": (13, 2.0),
    "60/8/10 captured": (15, 2.0),
    "auto captured": (23.4, 3.9),
    # In the invariant mode what each node reads is laid out on the device, too; waits are of a copy to it and a read.
    "8/4/2 with one text": (266, 2.0),
    "8/4/2 with one text, captured": (21, 2.0),
    "8/4/2 in a window": (167, 1.0),  # so small that it moves on at every step
    "8/4/2 in a window, captured": (18, 2.0),
    "8/4/2 sampled": (177, 1.0),
    "8/4/2 sampled, penalty": (238, 2.0),
    "8/4/2 of three rows": (207, 3.3),
    "auto": (207, 2.7),
    "mtp 8/3/2": (238, 2.0),
    "mtp 8/4/2": (292, 2.0),
    "lookups": (7, 1.23),
}
MTP_LEVEL = 25  # kernels beside those of the decoder layer
# Kernels of a block draft of seven levels beside those of its layers; a correction follows each path.
BLOCKS = {
    "block": 40,
    "causal block of a window": 40,
    "block of a draft vocabulary": 40,
    "corrected block": 58,
    "corrected block with confidence": 66,
    "selected block": 60,
}
BLOCK_CAPTURED = 4  # a launch, and what tells it where to write

# Kernels per recurrent layer that reading any tree adds to a plain step, in which what has a kernel of its own counts
# once, and those that keeping nodes launches for three such layers, at most. Neither waits.
RECURRENT = {"qwen3_5_text": (40, 33), "granitemoehybrid": (30, 33)}
TREES = ("chain", "whole chain", "tree", "whole leaf of a tree")


def test_steps_stay_within_their_budgets_and_texts_are_those_of_plain_decoding() -> None:
    """One test, because counts and texts come from one process, which takes half a minute."""
    command = [sys.executable, "-m", "tests.pretend"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    found: dict[str, Any] = json.loads(ran.stdout)
    for call, (kernels, waits) in BUDGETS.items():
        counted = found["counts"][call]
        assert counted["kernels"] <= kernels and counted["waits"] <= waits, (call, counted)
    deep, shallow = (found["counts"][f"mtp 8/{depth}/2"]["kernels"] for depth in (4, 3))
    assert found["layer"] > 0 and deep - shallow <= found["layer"] + MTP_LEVEL, (deep, shallow, found["layer"])
    for head, kernels in BLOCKS.items():
        drafted, captured = found["blocks"][head]["drafted"], found["blocks"][head]["captured"]
        assert drafted["layers"] > 0 and drafted["kernels"] <= kernels and drafted["waits"] == 0, (head, drafted)
        assert captured["kernels"] <= BLOCK_CAPTURED and captured["waits"] == 0, (head, captured)
    for target, counted in found["hybrids"].items():
        (read, kept), plain = RECURRENT[target], counted["plain"]["verify"]
        for tree in TREES:
            verify, keep = counted[tree]["verify"], counted[tree]["keep"]
            assert verify["own"] <= plain["own"] + read and keep["beside"] <= kept, (target, tree, verify, keep)
            assert verify["waits"] == keep["waits"] == 0, (target, tree, verify, keep)
            assert keep["own"] == keep["fallback"] == 0, "no mixer reads accepted nodes again"
    assert found["texts"], "nothing was written"
    for call, (plain, drafted) in found["texts"].items():
        assert drafted == plain, call
