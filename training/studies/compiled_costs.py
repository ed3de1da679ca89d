r"""Measure what compiled steps cost, as the table that a policy trains on.

Question: what do compiled steps cost by their nodes, and drafts by their levels and width?
Answer: on a Zen 4 a tree of eight nodes costs what a plain step does, and each further one a twelfth of it. A Re-SpS
policy that is trained at these costs chooses one tree everywhere, the best fixed one. Those of `calibrate` are not
compiled, and small trees cost more in them.

    python -m training.studies.compiled_costs work/smollm2 model_cards/smollm2-135m-instruct-head \
        --dtype bfloat16 --output work/policy/costs.json
    python training/train_policy.py --config training/recipes/policy_smollm2_135m_instruct.yaml --pack false \
        --output_dir work/policy  # finds this table, and measures none

Method: `generate` continues random prompts with a fixed tree of each size, and each width and depth: medians over the
steps. Of a draft of one level and one of three, the difference tells a level's price.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers.utils.logging import tqdm

from transformers_resps import FixedPolicy, TreeShape, attach
from transformers_resps.calibration import CONTEXTS, NODES, WIDTHS, identity_of
from transformers_resps.policies.costs import CostTable
from transformers_resps.telemetry.report import StepRecord
from transformers_resps.tools.cli import dtype, model
from transformers_resps.tools.loading import load_source, load_target

from .experiment import execute


_TOKENS, _FIRST = 24, 4  # of each run; steps that only warm up
_DEPTH, _CHILDREN = 3, 8


def steps_of(target: Any, source: Any, context: int, shape: TreeShape) -> Sequence[StepRecord]:
    """The steps of a tree, warmed up, after a random prompt of `context` tokens."""
    size = target.config.get_text_config().vocab_size
    prompt = torch.randint(1, size, (1, context), generator=torch.Generator().manual_seed(0))
    return target.generate(  # type: ignore[no-any-return]
        prompt,
        attention_mask=torch.ones_like(prompt),
        assistant_model=source,
        policy=FixedPolicy(shape),
        compile=True,
        do_sample=False,
        max_new_tokens=_TOKENS,
        min_new_tokens=_TOKENS,
        return_dict_in_generate=True,
    ).speculation.steps[_FIRST:]


def tree(nodes: int) -> TreeShape:
    return TreeShape(nodes, min(nodes - 1, _DEPTH), min(nodes - 1, _CHILDREN)) if nodes > 1 else TreeShape.plain()


def run(args: argparse.Namespace) -> int:
    target = attach(load_target(args.target, args.dtype, "cpu"))
    source = load_source(args.head, target)
    steps_of(target, source, CONTEXTS[0], tree(NODES[-1]))  # compiles
    verify: dict[int, dict[int, float]] = {context: {} for context in CONTEXTS}
    rests, drafts = list[float](), dict[tuple[int, int], float]()
    sizes = [(context, nodes) for context in CONTEXTS for nodes in NODES]
    levels = [(width, depth) for width in WIDTHS for depth in (1, _DEPTH)]
    with tqdm(total=len(sizes) + len(levels), desc="Measuring what compiled steps cost") as bar:
        for context, nodes in sizes:
            own = [step for step in steps_of(target, source, context, tree(nodes)) if step.verified == nodes]
            verify[context][nodes] = median(step.verify_seconds for step in own)
            rests += [step.step_seconds - step.draft_seconds - step.verify_seconds for step in own]
            bar.update()
        for width, depth in levels:
            own = list(steps_of(target, source, CONTEXTS[0], TreeShape(width + 1, depth, width)))
            drafts[width, depth] = median(step.draft_seconds for step in own)
            bar.update()
    each = {width: max(drafts[width, _DEPTH] - drafts[width, 1], 0.0) / (_DEPTH - 1) for width in WIDTHS}
    start = {width: max(drafts[width, 1] - each[width], 0.0) for width in WIDTHS}
    table = CostTable(verify, each, identity_of(target, source), median(rests), draft_start=start)
    table.save(args.output)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=model, help="folder or Hub id of the target")
    parser.add_argument("head", type=model, help="folder or Hub id of a draft head for the target")
    parser.add_argument("--dtype", type=dtype, default="bfloat16")
    parser.add_argument("--output", type=Path, default=Path("work/policy/costs.json"))
    return execute(parser, arguments, run)


if __name__ == "__main__":
    raise SystemExit(main())
