"""Training in several processes, as `accelerate launch` starts them on GPUs; here with gloo on two processors."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from tests.trainers import two_processes
from tests.trainers.heads import bits
from transformers_resps import MtpHead


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
    target, head = two_processes.fresh()
    torch.manual_seed(2)
    for start in (head, MtpHead.fresh(target)):
        kind, before = type(start), bits(start)
        folders = [tmp_path / f"{kind.__name__}-of-{count}" for count in (1, 2)]
        alone, together = (bits(kind.from_pretrained(folder, target=target)) for folder in folders)
        for name, weight in alone.items():
            torch.testing.assert_close(together[name], weight, atol=1e-5, rtol=1e-3, msg=name)
        assert not any(torch.equal(weight, before[name]) for name, weight in alone.items() if "proj" in name)
