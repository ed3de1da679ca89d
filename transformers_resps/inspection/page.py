"""Writes one HTML file that needs nothing else: no network, no fonts, no other scripts.

The values travel as JSON that cannot end its own element, and the script writes them as text only. A content policy
names the page's style and script by hash, so that nothing else would run even if it got in.
"""

import base64
import hashlib
import json
from html import escape
from importlib.resources import files
from string import Template
from typing import Any


def page(data: dict[str, Any]) -> str:
    """Write the page that shows `data`, an examination as `page_data` gives it."""
    style, script = _asset("page.css"), _asset("page.js")
    return Template(_asset("page.html")).substitute(
        title=escape(f"{data['facts']['target']}, step by step"),
        style_hash=_hash(style),
        script_hash=_hash(script),
        style=style,
        script=script,
        data=_json(data),
        prompt=escape(data["prompt"]),
        answer=escape("".join(token["text"] for step in data["steps"] for token in step["tokens"])),
    )


def _asset(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _json(value: Any) -> str:
    """Write JSON that is safe inside a script element: ASCII, without a character that HTML knows."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _hash(text: str) -> str:
    """Hash the exact text between the tags, as a content policy writes it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
