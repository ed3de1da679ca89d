"""Do two versions of the code decide the same? Written with one, checked with the other, on the same machine.

    python -m tests.decisions write decisions.json --smollm2 FOLDER --qwen FOLDER
    python -m tests.decisions check decisions.json --smollm2 FOLDER --qwen FOLDER

Seconds are planted, so nothing depends on the clock. Matrix products of real models round differently on other
processors, where near-ties may part: write anew there. Minutes with both models; without them, the tiny targets alone.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from tests.decisions import real
from tests.decisions.cases import decided, tiny_calls


CARDS = {"smollm2": "smollm2-135m-instruct", "qwen": "qwen2.5-coder-0.5b-instruct"}


def decisions(folders: dict[str, str]) -> dict[str, Any]:
    """All of them, by name."""
    made = {f"tiny: {name}": decided(call()) for name, call in tiny_calls()}
    for name, folder in folders.items():
        target, head, prompts = real.load(folder, CARDS[name])
        if name == "smollm2":
            made |= {f"{name}, live: {one}": steps for one, steps in real.live(target, head, prompts)}
        texts = real.recordings(target, head, prompts[: 10 if name == "smollm2" else 4])
        made |= {f"{name}, replayed: {one}": steps for one, steps in real.replays(texts, CARDS[name])}
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["write", "check"])
    parser.add_argument("file", type=Path)
    for name in CARDS:
        parser.add_argument(f"--{name}", help="folder of the target")
    args = parser.parse_args()
    made = decisions({name: getattr(args, name) for name in CARDS if getattr(args, name)})
    if args.action == "write":
        lines = ",\n".join(
            f"{json.dumps(name)}: {json.dumps(one, separators=(',', ':'))}" for name, one in made.items()
        )
        args.file.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
        print(f"{len(made)} written to {args.file}.")
        return 0
    known = json.loads(args.file.read_text(encoding="utf-8"))
    odd = [name for name in made if known.get(name) != made[name]]
    for name in odd:
        print(f"differs: {name}")
    print(f"{len(made) - len(odd)} of {len(made)} the same.")
    return 1 if odd else 0


if __name__ == "__main__":
    sys.exit(main())
