"""The page as a file: it needs nothing else, and no text becomes markup."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from typing import Any

from transformers_resps.inspection import page, page_data

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
