"""The studies of memories on a tiny target: what they count, and what they keep."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.conftest import build_target
from tests.lossless.test_grammars import COLORS, VOCABULARY, tokenizer
from tests.tools.conversations import save_models, save_rows
from training.benchmarking.peers import Peer
from training.studies import memories, memory_speed
from training.studies.experiment import Experiment, add_options
from transformers_resps import DraftHead, attach
from transformers_resps.generation.request import SpeculationDefaults
from transformers_resps.tools.methods import Answer
from transformers_resps.tools.results import COMPILED_PLAIN, PLAIN


__all__ = ["tokenizer"]  # the fixture


@pytest.fixture
def given(tmp_path: Path, tiny_target: PreTrainedModel, tiny_head: DraftHead) -> list[str]:
    tiny_target.generation_config.eos_token_id = tiny_target.config.eos_token_id = None
    target, head = save_models(tmp_path, tiny_target, tiny_head)
    file = save_rows(tmp_path / "mine.jsonl", [["defg", "hi"], ["defgh", "hi"], ["mnop"]])
    return [target, head, "--dataset", file, "--max-new-tokens", "24", "--output", str(tmp_path / "out")]


def test_a_growing_memory_drafts_what_earlier_turns_said(
    given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = save_rows(tmp_path / "same.jsonl", [["defg", "hi"], ["mnop"], ["nop"]])
    options = [*given, "--limit", "2", "--remember", same, "--remembered", "2"]
    assert memories.main(options) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    lookup = {row["answers remembered"]: row for row in found["rows"] if row["way"] == "lookup"}
    assert {"0", "2", "grows"} == lookup.keys() and found["texts"] == 4
    assert lookup["0"]["from the memory"] == 0
    assert lookup["grows"]["tokens per forward"] >= lookup["0"]["tokens per forward"]
    assert all(run["tokens"] == 4 * 23 for run in found["runs"])
    monkeypatch.setattr(memories, "answer", pytest.fail)
    monkeypatch.setattr(memories, "record_pools", pytest.fail)
    assert memories.main(options) == 0  # from what is kept
    assert json.loads((tmp_path / "out" / "results.json").read_text())["rows"] == found["rows"]


def test_what_a_grammar_forces_is_told_token_by_token(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text(json.dumps({"enum": COLORS}))
    grammar = memories.Grammar(tmp_path / "schema.json", tokenizer, len(VOCABULARY))
    forced = grammar.forced([*map(VOCABULARY.index, '"red"'), VOCABULARY.index("</s>")])
    assert forced == [(letter != "r",) * 2 for letter in ('"', *"red", '"', "</s>")]


def test_harmful_memories_know_nothing_of_use_and_stay_so() -> None:
    turn = memories.Turn([5, 6, 7], [8, 9, 10])
    memory = memory_speed.hostile([turn], 64)
    target: Any = attach(build_target(eos_token_id=None))
    before = len(memory)
    ids = torch.tensor([[5, 6, 7]])
    target.generate(ids, assistant_model=memory, max_new_tokens=4, do_sample=False)
    assert len(memory) == before == 3 * (4 * (2 + 8 + 1) + 8 * (1 + 8 + 1))


def test_compiled_ways_stand_beside_plain_decoding_that_is_compiled_too(given: list[str]) -> None:
    parser = argparse.ArgumentParser()
    add_options(parser, "")
    ways = memory_speed.ways_of(Experiment.load(parser.parse_args(given)), [], [], None, compile=True)
    plain, compiled_plain, *others = ways
    assert (plain.name, compiled_plain.name) == (PLAIN, COMPILED_PLAIN) and "compile" not in plain.keywords
    assert all(way.keywords["compile"] for way in (compiled_plain, *others))
    assert {"lookup, compiled", "memory, warm, compiled"} <= {way.name for way in others}


def test_every_way_and_other_engines_are_timed_and_write_the_plain_text(
    given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(names: list[str], target: Any, draft_model: None) -> list[Peer]:
        def answer(input_ids: torch.Tensor, most: int, *_: Any) -> Answer:
            with SpeculationDefaults.suspended():
                mask = torch.ones_like(input_ids)
                out = target.generate(input_ids, attention_mask=mask, max_new_tokens=most, do_sample=False)
            return Answer(out[0, input_ids.shape[1] :].tolist(), target_forwards=most)

        return [Peer(f"{name} (plain)", answer) for name in names]

    monkeypatch.setattr(memory_speed, "load_peers", load)
    same = save_rows(tmp_path / "same.jsonl", [["nop"]])
    assert memory_speed.main([*given, "--limit", "2", "--remember", same, "--peers"]) == 0
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert {"plain", "lookup", "memory, warm", "head and memory, warm", "openvino (plain)"} <= {
        row["way"] for row in rows
    }
    assert all(row["same text"] == 1.0 for row in rows)
