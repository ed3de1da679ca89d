"""The study that counts equal picks, against a greedy answer, which picks itself."""

import json
from pathlib import Path

import torch
from transformers import PreTrainedModel

from training.studies.equal_picks import picks, questions


def test_a_target_picks_the_tokens_of_its_own_greedy_answer(
    tiny_target: PreTrainedModel, prompt: dict[str, torch.Tensor]
) -> None:
    text = tiny_target.generate(**prompt, do_sample=False, max_new_tokens=12, eos_token_id=None)
    start = prompt["input_ids"].shape[1]
    assert picks(tiny_target, text, start).tolist() == text[0, start:].tolist()


def test_each_category_gives_its_first_prompts(tmp_path: Path) -> None:
    rows = [{"category": name, "turns": [f"{name}{i}", "again"]} for i in range(3) for name in "ab"]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert questions(tmp_path / "prompts.jsonl", 2) == ["a0", "a1", "b0", "b1"]
