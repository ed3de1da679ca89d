"""The same of real models: seeded calls of SmolLM2, and what any policy does on recordings under planted costs."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from tests.decisions.cases import decided
from tests.decisions.planted import PlantedClock, decision
from transformers_resps import AutoPolicy, DraftHead, FixedPolicy, Policy, TreeShape, attach
from transformers_resps.policies.action_grid import ActionGrid
from transformers_resps.policies.costs import CostTable
from transformers_resps.policies.guard import BaselineGuard
from transformers_resps.policies.throughput import ThroughputPolicy
from transformers_resps.replay import (
    OutcomeTable,
    RankedText,
    RecordedText,
    fitted_policy,
    record_pools,
    replay_policy,
)


PROMPTS = Path(__file__).with_name("prompts.jsonl")
COSTS = Path("training/studies/measurements/headroom")
CARDS = Path("model_cards")
DEPTHS = {1: 6, 2: 6, 3: 6, 4: 6}
NEW_TOKENS = 64
GRID = ActionGrid.from_bins((2, 3, 4, 6, 8, 12), (1, 2, 3, 4, 6), (1, 2, 4))


def load(folder: str, card: str) -> tuple[Any, DraftHead, list[torch.Tensor]]:
    """Target and head in fp32, and ten prompts."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    target: Any = attach(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    head = DraftHead.from_pretrained(CARDS / f"{card}-head", target=target)
    lines = PROMPTS.read_text(encoding="utf-8").splitlines()
    asked = [json.loads(line)["messages"] for line in lines]
    texts = [tokenizer.apply_chat_template(one, add_generation_prompt=True, tokenize=False) for one in asked]
    return target, head, [tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids for text in texts]


def live(target: Any, head: DraftHead, prompts: list[torch.Tensor]) -> Iterator[tuple[str, Any]]:
    """What every step decides while answers are written, greedily and sampled."""
    policies: dict[str, Policy] = {
        "tree": FixedPolicy(TreeShape(8, 3, 2, 4)),
        "auto": PlantedClock(BaselineGuard(ThroughputPolicy(5, 4, 16))),
        "re-sps": PlantedClock(AutoPolicy.from_pretrained(CARDS / "smollm2-135m-instruct-policy")),
    }
    for do_sample in (False, True):
        for name, policy in policies.items():
            for place, prompt in enumerate(prompts):
                set_seed(place)
                options = {"do_sample": do_sample, "max_new_tokens": NEW_TOKENS, "return_dict_in_generate": True}
                mask = torch.ones_like(prompt)
                out = target.generate(prompt, attention_mask=mask, assistant_model=head, policy=policy, **options)
                yield f"{name}, prompt {place}, sampled {do_sample}", decided(out)


def recordings(target: Any, head: DraftHead, prompts: list[torch.Tensor]) -> list[RecordedText]:
    """Plain answers, greedy and sampled, with all that the head would have drafted."""
    texts = []
    for do_sample in (False, True):
        for place, prompt in enumerate(prompts):
            set_seed(place)
            options = {"do_sample": do_sample, "max_new_tokens": NEW_TOKENS, "attention_mask": torch.ones_like(prompt)}
            text = target.generate(prompt, **options)[0]
            if len(text) > prompt.shape[1] + 2:
                texts.append(record_pools(target, head, text, prompt.shape[1], depths=DEPTHS))
    return texts


def replays(texts: list[RecordedText], card: str) -> Iterator[tuple[str, Any]]:
    """What policies decide on recordings, in the seconds of a cost table, and what every shape would have taken."""
    table = cost_table(card)
    policies: dict[str, Policy] = {
        "auto": BaselineGuard(ThroughputPolicy(5, 4, 16)),
        "fitted": BaselineGuard(fitted_policy(texts[::2], depth=5, most_nodes=16)),
        "re-sps": AutoPolicy.from_pretrained(CARDS / f"{card}-policy"),
        "guarded tree": BaselineGuard(FixedPolicy(TreeShape(12, 6, 4, 6))),
        "saved": AutoPolicy.from_pretrained(CARDS / f"{card}-throughput"),
    }
    for name, policy in policies.items():
        for place, text in enumerate(texts):
            steps = replay_policy(text, policy, table).steps
            made = [[*decision(step), step.step_seconds.hex()] for step in steps]
            yield f"{name}, text {place}", {"steps": len(made), "decisions": digest(made)}
    oracle = OutcomeTable([RankedText.from_recording(text).outcomes(GRID, table) for text in texts])
    seconds = [oracle.fixed_seconds.tolist(), oracle.best_seconds.tolist()]
    yield "every shape", {"best fixed": str(GRID[oracle.best_fixed]), "seconds": digest(seconds)}


def cost_table(card: str) -> CostTable:
    read = json.loads((COSTS / f"{card}-head" / "costs.json").read_text(encoding="utf-8"))["costs"]
    verify = {int(c): {int(n): s for n, s in row.items()} for c, row in read["verify"].items()}
    return CostTable(verify, {int(width): s for width, s in read["draft"].items()}, {}, read["overhead"])


def digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]
