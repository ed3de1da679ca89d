"""Write `docs/api.md` from the docstrings of the public names: `make docs`."""

import re
from pathlib import Path

import griffe
from griffe2md import ConfigDict, render_object_docs

import transformers_resps


PAGE = Path(__file__).with_name("api.md")
OPENING = """# API reference

Every public name, from its docstring; written by `make docs`, so edit the docstrings. Shapes: `b` rows, `t` positions,
`h` hidden size, `n` nodes, `d` draft vocabulary; the whole legend is in `transformers_resps/tree.py`.
"""


def render() -> str:
    """The page."""
    package = griffe.load("transformers_resps", docstring_parser="google", resolve_aliases=True)
    config = ConfigDict(
        show_root_full_path=False,
        show_root_members_full_path=False,
        show_object_full_path=False,
        show_if_no_docstring=False,
        show_signature_annotations=True,
        inherited_members=False,
        members_order="source",
        summary=False,
        line_length=100,
    )
    parts = [render_object_docs(package[name].final_target, config) for name in transformers_resps.__all__]
    text = "\n\n".join([OPENING.strip(), *(part.strip() for part in parts)])
    return "\n".join(without_links(line).rstrip() for line in text.splitlines()) + "\n"


def without_links(line: str) -> str:
    """Types as code: griffe2md links them to anchors that a page of ours does not have."""
    line = re.sub(r"\[([^][]*(?:\[\])?[^][]*)\]\(#[^)]*\)", r"\1", line)
    return re.sub(r"</?code>", "`", line)


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
