"""The page as a file: it needs nothing else, and no text becomes markup."""

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from typing import Any

import pytest
import torch

from transformers_resps.testing import Divergence
from transformers_resps.tools.inspect import page, page_data

from .examples import FACTS, decode, examination


SPITE = "</script></noscript><img src=x onerror=\"document.title='owned'\">&lt;b&gt;\u2028 $style ${title} <!-- ]]>"


class Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.content: dict[str, str] = {}
        self._open = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        named = dict(attrs)
        self._open = f"{tag}#{named['id']}" if named.get("id") else tag

    def handle_data(self, data: str) -> None:
        self.content[self._open] = self.content.get(self._open, "") + data


def parsed(text: str) -> Elements:
    elements = Elements()
    elements.feed(text)
    return elements


def spiteful_data() -> dict[str, Any]:
    """Spite wherever a text can stand."""
    return page_data(examination(), lambda token_ids: SPITE * len(token_ids), SPITE, FACTS | {"target": SPITE})


def test_the_story_arrives_whole() -> None:
    data = spiteful_data()
    assert json.loads(parsed(page(data)).content["script#page-data"]) == data


def test_no_text_becomes_an_element() -> None:
    assert parsed(page(spiteful_data())).tags == parsed(page(page_data(examination(), decode, "", FACTS))).tags
    assert "img" not in parsed(page(spiteful_data())).tags


def test_nothing_is_fetched() -> None:
    text = page(page_data(examination(), decode, "what?", FACTS))
    assert not re.findall(r"https?:|//[a-z]|@import|url\(|fetch\(|XMLHttp|WebSocket|import\(", text)
    assert {name for name, _ in parsed(text).attributes} & {"src", "srcset", "action", "onload"} == set()
    assert [value for name, value in parsed(text).attributes if name == "href"] == ["data:,"]


def test_the_content_policy_allows_this_style_and_script_and_no_other() -> None:
    text = page(page_data(examination(), decode, "what?", FACTS))
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    style = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    script = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)

    def hashed(source: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"

    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert f"style-src {hashed(style[0])};" in policy and len(style) == 1
    assert f"script-src {hashed(script[0])};" in policy and len(script) == 1


def test_without_scripts_prompt_and_answer_can_still_be_read() -> None:
    text = page(page_data(examination(), decode, "a < b?", FACTS))
    assert "<pre>a &lt; b?</pre>" in text and "<pre>helpz</pre>" in text


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
    assert [nodes[text]["path"] for text in "eali"] == pytest.approx([0.9, 0.25, 0.6, 0.3])
    assert [nodes[text]["probability"] for text in "eali"] == pytest.approx([0.9, 0.25, 0.6 / 0.9, 0.3 / 0.6])
    assert [text for text in "healpi" if text in nodes and nodes[text]["accepted"]] == ["h", "e", "l"]
    assert [nodes[text]["depth"] for text in "heali"] == [0, 1, 1, 2, 3]


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
