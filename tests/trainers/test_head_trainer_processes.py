"""Training in several processes, as `accelerate launch` starts them on GPUs; here with gloo on two processors."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from tests.trainers import two_processes
from transformers_resps import DraftHead


def test_two_processes_train_what_one_does_with_twice_the_accumulation(tmp_path: Path) -> None:
    two_processes.train(tmp_path, accumulation=2)
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "-m", "tests.trainers.two_processes", str(tmp_path)],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    alone, together = (DraftHead.from_pretrained(tmp_path / f"of-{count}").state_dict() for count in (1, 2))
    for name, weight in alone.items():
        torch.testing.assert_close(together[name], weight, atol=1e-5, rtol=1e-3, msg=name)
    assert not torch.equal(alone["fc.weight"], two_processes.fresh()[1].fc.weight)
