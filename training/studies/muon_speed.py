"""Time a step of `torch.optim.Muon` and of ours on the matrices of a draft head.

Question: is `torch.optim.Muon` as fast as ours, with the same updates?
Answer: no. It takes 1.25 times as long as ours (1.15 to 1.42) where the CPU has bfloat16 units, without them 6.5 times
(6.3 to 6.6); EPYC with AVX-512, one thread, torch 2.13, SmolLM2's sizes. The updates differ by less than 1%, because
torch's rounds to bfloat16.

    python -m training.studies.muon_speed
    ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI python -m training.studies.muon_speed  # as on a CPU without bfloat16 units

Method: both take the same steps in turn, so that a busy machine slows both.
"""

import argparse
import time
from statistics import median

import torch
from torch import Tensor

from transformers_resps.trainers.muon import Muon


def shapes_of(hidden: int, kv: int, intermediate: int) -> list[tuple[int, int]]:
    """The matrices that Muon trains in an EAGLE-3 head of one layer."""
    attention = [(hidden, 2 * hidden), (kv, 2 * hidden), (kv, 2 * hidden), (hidden, hidden)]
    return [(hidden, 3 * hidden), *attention, (intermediate, hidden), (intermediate, hidden), (hidden, intermediate)]


def seconds_of_step(optimiser: torch.optim.Optimizer, weights: list[Tensor], gradients: list[Tensor]) -> float:
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient.clone()
    started = time.perf_counter()
    optimiser.step()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs=3, default=[576, 192, 1536], help="hidden, key-value, intermediate")
    parser.add_argument("--repeats", type=int, default=12)
    args = parser.parse_args()
    torch.manual_seed(0)
    start = [0.02 * torch.randn(shape) for shape in shapes_of(*args.sizes)]
    ours, theirs = ([torch.nn.Parameter(weight.clone()) for weight in start] for _ in range(2))
    our_muon = Muon([{"params": ours, "matrices": True}], lr=2e-3)
    torch_muon = torch.optim.Muon(theirs, lr=2e-3, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    ratios = []
    for _ in range(args.repeats):
        gradients = [torch.randn_like(weight) * torch.logspace(0, -2, weight.shape[1]) for weight in start]
        spent = seconds_of_step(our_muon, list(ours), gradients)
        ratios.append(seconds_of_step(torch_muon, list(theirs), gradients) / spent)
    moved, moved_by_torch = (
        torch.cat([(weight.detach() - before).flatten() for weight, before in zip(weights, start, strict=True)])
        for weights in (ours, theirs)
    )
    print(f"torch / ours: median {median(ratios):.2f}, from {min(ratios):.2f} to {max(ratios):.2f}")
    print(f"what they moved differs by {(moved_by_torch - moved).norm() / moved.norm():.1e}")


if __name__ == "__main__":
    main()
