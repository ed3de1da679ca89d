r"""Conversations that repeat themselves across requests, from templates: an agent's, edits of code, structured calls.

    python -m training.prompts.repeating work/repeating --count 40

One file of each kind, the same on any machine, and the schema of a call for a grammar. The target writes all answers.
"""

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers_resps.tools.cli import positive
from transformers_resps.tools.session import Dialogue


def _tool(name: str, description: str, **properties: dict[str, Any]) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
    return {"name": name, "description": description, "parameters": parameters}


_TEXT, _COUNT = {"type": "string"}, {"type": "integer"}
_REASONS = ["damaged", "late", "wrong_item", "changed_mind"]
TOOLS = [
    _tool("get_order", "Look up an order.", order_id=_TEXT, include_items={"type": "boolean"}),
    _tool("search_products", "Search the shop.", query=_TEXT, max_price=_COUNT, in_stock_only={"type": "boolean"}),
    _tool("refund_order", "Pay back.", order_id=_TEXT, amount=_COUNT, reason={"type": "string", "enum": _REASONS}),
    _tool(
        "create_ticket",
        "Hand over to a colleague.",
        customer_id=_TEXT,
        subject=_TEXT,
        priority={"type": "string", "enum": ["low", "normal", "high"]},
    ),
    _tool("run_query", "Run SQL on the tables orders(id, customer, total, day) and items(id, product).", sql=_TEXT),
]
CALL_SCHEMA = {  # of one call, for a grammar
    "anyOf": [
        {
            "type": "object",
            "properties": {"name": {"const": tool["name"]}, "arguments": tool["parameters"]},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in TOOLS
    ]
}
_DESK = (
    "You are the help desk of a web shop. Reply to every customer with one tool call and nothing else. Reply to every "
    "tool response with one or two sentences that tell the customer what it says."
)
_EXAMPLE = """<tool_call>
{"name": "get_order", "arguments": {"order_id": "A00000", "include_items": true}}
</tool_call>"""
_CALLS = 'Answer with one call of a tool: a JSON object {"name": <function-name>, "arguments": <args-json-object>}.'
_NAMES = ("Ana Silva", "Ben Okafor", "Chen Wei", "Dora Novak", "Emil Berg", "Fatima Haddad", "Goran Ilic", "Hana Sato")
_PRODUCTS = ("kettle", "desk lamp", "rain jacket", "headphones", "backpack", "toaster", "yoga mat", "bicycle pump")
_CARRIERS = ("DHL", "UPS", "GLS")


def _opening(task: str) -> list[dict[str, str]]:
    listed = "\n".join(map(json.dumps, TOOLS))
    example = f"\n\nTo call a tool, write for example:\n\n{_EXAMPLE}" if task == _DESK else ""
    return [{"role": "system", "content": f"{task}\n\n# Tools\n\n<tools>\n{listed}\n</tools>{example}"}]


def _result(**values: Any) -> str:
    return f"<tool_response>\n{json.dumps(values)}\n</tool_response>"


class _Shop:
    """One customer with an order."""

    def __init__(self, draw: random.Random) -> None:
        self.name, self.product = draw.choice(_NAMES), draw.choice(_PRODUCTS)
        self.other = draw.choice([product for product in _PRODUCTS if product != self.product])
        self.customer, self.order = f"C-{draw.randint(1000, 9999)}", f"A{draw.randint(10000, 99999)}"
        self.price, self.month = draw.randint(15, 180), draw.randint(1, 12)
        self.carrier, self.day = draw.choice(_CARRIERS), f"2026-{self.month:02d}-{draw.randint(1, 28):02d}"
        self.reason, self.priority = draw.choice(_REASONS), draw.choice(("low", "normal", "high"))

    @property
    def found(self) -> str:
        item = {"product": self.product, "price": self.price, "quantity": 1}
        sent = {"status": "shipped", "carrier": self.carrier, "expected": self.day}
        return _result(order_id=self.order, customer_id=self.customer, items=[item], total=self.price, **sent)

    def requests(self) -> list[tuple[str, str]]:
        """What the customer or a colleague asks for, and what the right tool returns."""
        hits = [{"product": self.other, "price": self.price // 2, "stock": 4}]
        return [
            (f"Hello, this is {self.name}. Where is my order {self.order}?", self.found),
            (
                f"Please refund {self.price} euros for order {self.order}. The reason is: {self.reason}.",
                _result(order_id=self.order, refunded=self.price, status="done"),
            ),
            (f"Do you have a {self.other} below {self.price} euros in stock?", _result(results=hits, count=1)),
            (
                f"Open a ticket of {self.priority} priority for {self.customer}: the {self.product} is broken.",
                _result(ticket=f"T-{self.price}", status="open", priority=self.priority),
            ),
            (
                f"How much did customer {self.customer} spend since {self.day}?",
                _result(rows=[[self.price * 3]], columns=["sum"]),
            ),
        ]


def agents(count: int) -> list[Dialogue]:
    """A customer asks for two things; each time the target calls a tool and tells what came back."""
    found = []
    for number in range(count):
        draw = random.Random(f"agents {number}")
        asked = draw.sample(_Shop(draw).requests(), 2)
        turns = tuple(turn for request, result in asked for turn in (f"{request} Call the right tool.", result))
        found.append(Dialogue(f"agents/{number}", _opening(_DESK), turns))
    return found


def calls(count: int) -> list[Dialogue]:
    """One request, one call of a tool, as `CALL_SCHEMA` has it."""
    found = []
    for number in range(count):
        draw = random.Random(f"calls {number}")
        found.append(Dialogue(f"calls/{number}", _opening(_CALLS), (draw.choice(_Shop(draw).requests())[0],)))
    return found


_FILES = (  # NAME, ITEM and FIELD are filled in
    """def load_NAMEs(path):
    NAMEs = []
    with open(path) as file:
        for line in file:
            parts = line.strip().split(",")
            if len(parts) != 3:
                continue
            NAMEs.append({"id": parts[0], "FIELD": parts[1], "ITEM": parts[2]})
    return NAMEs


def total_FIELD(NAMEs):
    total = 0
    for NAME in NAMEs:
        total += float(NAME["FIELD"])
    return total
""",
    """class NAMEStore:
    def __init__(self):
        self.NAMEs = {}

    def add(self, key, ITEM, FIELD):
        self.NAMEs[key] = {"ITEM": ITEM, "FIELD": FIELD}

    def remove(self, key):
        if key in self.NAMEs:
            del self.NAMEs[key]

    def find(self, ITEM):
        return [key for key, NAME in self.NAMEs.items() if NAME["ITEM"] == ITEM]
""",
    """import json


def save_NAME(NAME, path):
    with open(path, "w") as file:
        json.dump(NAME, file)


def best_NAME(NAMEs):
    best = None
    for NAME in NAMEs:
        if best is None or NAME["FIELD"] > best["FIELD"]:
            best = NAME
    return best


def by_ITEM(NAMEs):
    groups = {}
    for NAME in NAMEs:
        groups.setdefault(NAME["ITEM"], []).append(NAME)
    return groups
""",
)
_CHANGES = (
    "Add type hints to every function.",
    "Add a one-line docstring to every function.",
    'Rename "FIELD" to "FIELD_value" everywhere.',
    "Raise a ValueError if an argument is None.",
    "Log a message at the start of each function with the logging module.",
)


def edits(count: int) -> list[Dialogue]:
    """A file of Python, and two small changes one after the other; the target writes the whole file."""
    found = []
    for number in range(count):
        draw = random.Random(f"edits {number}")
        names = {
            "NAME": draw.choice(("invoice", "player", "sensor", "recipe", "ticket")),
            "ITEM": draw.choice(("label", "owner", "unit", "team")),
            "FIELD": draw.choice(("score", "price", "weight", "age")),
        }
        file, changes = draw.choice(_FILES), draw.sample(_CHANGES, 2)
        asked = [f"Here is a file:\n\n```python\n{file}```\n\n{changes[0]} Write the whole file.", changes[1]]
        for key, word in names.items():
            asked = [turn.replace(key, word) for turn in asked]
        found.append(Dialogue(f"edits/{number}", [], (asked[0], f"{asked[1]} Write the whole file.")))
    return found


SETS: dict[str, Callable[[int], list[Dialogue]]] = {"agents": agents, "edits": edits, "calls": calls}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder")
    parser.add_argument("--count", type=positive, default=40, help="conversations of each kind")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    for name, make in SETS.items():
        rows = (
            {"messages": [*one.opening, *({"role": "user", "content": turn} for turn in one.turns)]}
            for one in make(args.count)
        )
        (args.output / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")
    (args.output / "call.schema.json").write_text(json.dumps(CALL_SCHEMA), "utf-8")


if __name__ == "__main__":
    main()
