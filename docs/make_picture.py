"""Draw `docs/step.svg`, one step of a real answer as its draft tree: `make docs`.

SmolLM2-135M-Instruct and its head decode in float32; the step shown is the one that keeps the most drafted tokens.
"""

from html import escape
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from examples.demo.target import load_smollm2, prepared_target
from transformers_resps import DraftHead, FixedPolicy, TreeShape, attach
from transformers_resps.telemetry.display import decoder
from transformers_resps.tools.inspect import examine, page_data


PICTURE = Path(__file__).with_name("step.svg")
HEAD = Path(__file__).parent.parent / "model_cards" / "smollm2-135m-instruct-head"
QUESTION = "Name three planets and say one thing about each."
SHAPE = TreeShape(total_tokens=12, depth=5, top_k=3)

COLUMN, ROW, WIDTH, HEIGHT, LEFT, TOP = 142, 52, 112, 34, 20, 92  # pixels
COLOURS = {  # fill, border, text; light on any background
    "root": ("#1d2126", "#1d2126", "#ffffff"),
    "accepted": ("#0b62a8", "#0b62a8", "#ffffff"),
    "rejected": ("#f1efe9", "#cfcac0", "#5b636c"),
    "bonus": ("#ffffff", "#0b62a8", "#0b62a8"),
}


def best_step() -> dict[str, Any]:
    """The step of the answer that keeps the most drafted tokens, as the page of `resps inspect` tells it."""
    model, tokenizer = load_smollm2(torch.float32)
    head = DraftHead.from_pretrained(HEAD, target=attach(model))
    tokenizer = AutoTokenizer.from_pretrained(prepared_target())
    messages = [{"role": "user", "content": QUESTION}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    found = examine(model, head, FixedPolicy(SHAPE), ids["input_ids"][0], settings={"max_new_tokens": 48})
    steps = page_data(found, decoder(tokenizer), QUESTION, {})["steps"]
    best: dict[str, Any] = max(steps[1:], key=lambda step: len(step["tokens"]))
    return best


def rows_of(nodes: list[dict[str, Any]]) -> list[float]:
    """The vertical place of each node: leaves below one another, the accepted branch first, parents beside theirs."""
    children: list[list[int]] = [[] for _ in nodes]
    for node, facts in enumerate(nodes[1:], start=1):
        children[facts["parent"]].append(node)
    rows, used = [0.0] * len(nodes), 0

    def place(node: int) -> None:
        nonlocal used
        below = sorted(children[node], key=lambda child: not nodes[child]["accepted"])
        for child in below:
            place(child)
        if below:
            rows[node] = rows[below[0]]
        else:
            rows[node], used = float(used), used + 1

    place(0)
    return rows


def box(depth: int, row: float, text: str, kind: str, note: str = "") -> str:
    """A token as a rounded rectangle, its probability beside it."""
    fill, border, ink = COLOURS[kind]
    x, y = LEFT + depth * COLUMN, TOP + row * ROW
    dash = ' stroke-dasharray="4 3"' if kind == "bonus" else ""
    label = escape(text.strip() or "\u2423")
    return (
        f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="7" fill="{fill}" stroke="{border}"{dash}/>'
        f'<text x="{x + WIDTH / 2}" y="{y + 22}" text-anchor="middle" fill="{ink}" font-size="15">{label}</text>'
        f'<text x="{x + WIDTH - 4}" y="{y - 5}" text-anchor="end" fill="#5b636c" font-size="11">{note}</text>'
    )


def line(depth: int, row: float, parent_row: float, accepted: bool) -> str:
    """From a parent to its child."""
    x, end = LEFT + (depth - 1) * COLUMN + WIDTH, LEFT + depth * COLUMN
    start_y, end_y = (TOP + place * ROW + HEIGHT / 2 for place in (parent_row, row))
    colour, width = ("#0b62a8", 2.5) if accepted else ("#cfcac0", 1.5)
    middle = (x + end) / 2
    path = f"M{x} {start_y} C{middle} {start_y} {middle} {end_y} {end} {end_y}"
    return f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="{width}"/>'


def draw(step: dict[str, Any]) -> str:
    """The step as SVG."""
    nodes, rows = step["nodes"], rows_of(step["nodes"])
    kept = sum(node["accepted"] for node in nodes) - 1
    lines, boxes = [], []
    for node, row in zip(nodes, rows, strict=True):
        kind = "root" if node["depth"] == 0 else "accepted" if node["accepted"] else "rejected"
        if node["depth"]:
            lines.append(line(node["depth"], row, rows[node["parent"]], node["accepted"]))
        note = f"{node['probability']:.2f}" if node["depth"] and node["probability"] is not None else ""
        boxes.append(box(node["depth"], row, node["text"], kind, note))
    last = max((n for n, node in enumerate(nodes) if node["accepted"]), key=lambda n: nodes[n]["depth"])
    depth = nodes[last]["depth"] + 1
    lines.append(line(depth, rows[last], rows[last], accepted=True))
    boxes.append(box(depth, rows[last], step["tokens"][-1]["text"], "bonus", "bonus token"))
    width = 2 * LEFT + max(depth, *(node["depth"] for node in nodes)) * COLUMN + WIDTH
    height = TOP + (max(rows) + 1) * ROW + 10
    told = (
        f"One step: the head drafts {len(nodes) - 1} tokens, with the probabilities that it gives them.",
        f"The model verifies all of them in one forward, keeps {kept} (blue) and adds the next token itself.",
    )
    title = "".join(
        f'<text x="{LEFT}" y="{28 + 22 * number}" fill="#1d2126" font-size="15">{words}</text>'
        for number, words in enumerate(told)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height:.0f}" '
        'font-family="system-ui, -apple-system, Segoe UI, Roboto, Helvetica, Arial, sans-serif">\n'
        f'<rect width="{width}" height="{height:.0f}" rx="10" fill="#fcfbf8"/>\n'
        + "\n".join([title, *lines, *boxes])
        + "\n</svg>\n"
    )


if __name__ == "__main__":
    PICTURE.write_text(draw(best_step()), encoding="utf-8")
