"""What the default policy's decisions cost: processor time of choose, grow, size and observe in a typical step.

python -m training.studies.decision_speed
"""

import time

import torch

from transformers_resps.policy import Level, Observation, default_policy
from transformers_resps.telemetry import RowCounts, StepRecord


STEPS = 2000


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    policy, spent = default_policy(), 0.0
    prefix_accept_probs = [0.6 * 0.8**place for place in range(16)]
    level = -torch.rand(1, 4).mul(3).sort().values
    pool = torch.cat([level, *(-torch.rand(1, 16).mul(4) - 1 - depth for depth in range(3))], dim=1)
    level_of = torch.tensor([1] * 4 + [2] * 16 + [3] * 16 + [4] * 16)
    for step in range(STEPS):
        observation = Observation(torch.zeros(1, 1728), 100, step, 400, lambda: prefix_accept_probs)
        started = time.process_time()
        shape = policy.choose(observation)
        nodes = 1
        if shape.asks_head:
            levels = 1
            while levels < 4 and policy.grow(Level(levels, level - levels)):
                levels += 1
            drafted = 4 + 16 * (levels - 1)
            nodes = policy.size(pool[:, :drafted], level_of[:drafted])
        counts = (RowCounts([2]), RowCounts([3]))
        record = StepRecord(shape, 52, nodes + shape.lookup, *counts, 0.002, 0.02, 0.0222, RowCounts([2]))
        policy.observe(record)
        spent += time.process_time() - started
    print(f"{1e3 * spent / STEPS:.3f} ms of processor time a step")


if __name__ == "__main__":
    main()
