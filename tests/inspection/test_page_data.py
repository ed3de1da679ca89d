"""The page's numbers and words, by hand."""

import json
import math

import pytest
import torch

from transformers_resps.inspection import page_data
from transformers_resps.testing import Divergence

from .examples import FACTS, decode, examination


STORY = page_data(examination(), decode, "what?", FACTS)


def test_totals_are_tokens_over_seconds() -> None:
    totals = STORY["totals"]
    assert (totals["emitted"], totals["forwards"], totals["tau"]) == (5, 3, pytest.approx(5 / 3))
    assert (totals["rate"], totals["plainRate"]) == (5.0, 2.5)
    assert totals["draft"] == pytest.approx(0.010)
    assert totals["verify"] == pytest.approx(0.550)
    assert totals["rest"] == pytest.approx(0.006)


def test_the_tokens_of_all_steps_are_the_answer_and_carry_their_source() -> None:
    steps = [[(token["text"], token["source"]) for token in step["tokens"]] for step in STORY["steps"]]
    assert steps == [[("h", "target")], [("e", "both"), ("l", "both"), ("p", "target")], [("z", "target")]]


def test_nodes_have_the_probability_after_their_parent_and_of_the_whole_path() -> None:
    nodes = {node["text"]: node for node in STORY["steps"][1]["nodes"]}
    assert [nodes[text]["source"] for text in "heali"] == ["root", "both", "head", "both", "lookup"]
    assert [nodes[text]["path"] for text in "eali"] == pytest.approx([0.5, 0.25, 0.2, 0.3])
    assert [nodes[text]["probability"] for text in "eali"] == pytest.approx([0.5, 0.25, 0.4, 0.3 / 0.6])
    assert [text for text in "healpi" if text in nodes and nodes[text]["accepted"]] == ["h", "e", "l"]
    assert [nodes[text]["depth"] for text in "heali"] == [0, 1, 1, 2, 3]


def test_a_looked_up_node_beyond_the_track_record_has_no_probability() -> None:
    found = examination()
    found.steps[0].prefix_accept_probs = [0.9]
    last = page_data(found, decode, "", FACTS)["steps"][1]["nodes"][4]
    assert last["path"] is None and last["probability"] is None


def test_a_step_says_what_the_policy_saw_and_decided() -> None:
    step = STORY["steps"][1]
    assert step["seen"] == {"context": 8, "decision": 0, "room": 20, "prefix_accept_probs": [0.9, 0.6, 0.3]}
    assert step["chosen"] == {"name": "4/2/2+3", "nodes": 4, "depth": 2, "topK": 2, "lookup": 3}
    assert (step["levels"], step["headNodes"], step["lookupNodes"]) == (2, 3, 1)
    assert (step["drafted"], step["verified"]) == (9, 5)
    assert step["seconds"] == {"draft": 0.010, "verify": 0.030, "rest": pytest.approx(0.005)}
    assert "nodes" not in STORY["steps"][0]


def test_equal_texts_and_texts_that_part_are_told_apart() -> None:
    assert STORY["sameText"] == {"same": True}
    parted = page_data(examination("hexpz"), decode, "", FACTS)["sameText"]
    assert parted == {"same": False, "position": 2, "plain": "x", "own": "l"}
    ended = page_data(examination("hel"), decode, "", FACTS)["sameText"]
    assert ended == {"same": False, "position": 3, "plain": None, "own": "p"}


def test_a_near_tie_is_told_with_its_gap() -> None:
    near = Divergence(2, 23, 11, 20.0, 19.875, 20.0, torch.bfloat16)
    told = page_data(examination("hexpz", near), decode, "", FACTS)["sameText"]
    assert (told["gap"], told["spacing"], told["dtype"], told["explained"]) == (0.125, 0.125, "bfloat16", True)
    early = Divergence(3, None, 15, -math.inf, 20.0, 20.0, torch.bfloat16)
    assert "gap" not in page_data(examination("hel", early), decode, "", FACTS)["sameText"]


def test_a_story_is_json_to_the_last_value() -> None:
    assert json.loads(json.dumps(STORY, allow_nan=False)) == STORY
