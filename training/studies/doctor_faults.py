"""Plant each fault that published heads have in a good one, and run `resps doctor` on it.

Question: does `resps doctor` find and name the faults that published heads have?
Answer: yes, with 50 answers of 256 tokens: wrong layer ids, the wrong RoPE base and `norm_before_residual`. With 48
tokens a wrong RoPE base is missed, with 16 answers layer ids that are one too small (`LOG.md`).

    python -m training.studies.doctor_faults --target work/smollm2 --head model_cards/smollm2-135m-instruct-head

Method: each fault is written into the config of a copy of a good head, and the command is run on the copy, over
answers that the target writes once. Exit status: 0 when the good head passes and the doctor finds and names every
fault. One thread takes two minutes for each with 135M parameters.
"""

import argparse
import contextlib
import io
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from transformers_resps.data import to_tokens
from transformers_resps.tools import cli
from transformers_resps.tools.doctor import write_answers
from transformers_resps.tools.loading import questions_in


def faults(config: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yield name, changed fields of the config, and what the doctor must say (nothing for the good head)."""
    layers, rope, before = config["feature_layers"], config["rope_parameters"], config["norm_before_residual"]
    yield "none", {}, ""
    for shift in (1, -1):
        shifted = {"feature_layers": [layer + shift for layer in layers]}
        yield f"layer ids {shift:+}", shifted, f"feature_layers={layers}"
    other = 1e6 if rope["rope_theta"] < 1e6 else 1e4
    yield (
        f"RoPE base {other:g}",
        {"rope_parameters": {**rope, "rope_theta": other}},
        f"rope_theta={float(rope['rope_theta'])}",
    )
    yield f"norm_before_residual {not before}", {"norm_before_residual": not before}, f"norm_before_residual={before}"


def answer(target_name: str, count: int, max_new_tokens: int, file: Path) -> None:
    """Write greedy answers to the doctor's own questions, spread evenly over all fifty."""
    tokenizer = AutoTokenizer.from_pretrained(target_name)
    target = AutoModelForCausalLM.from_pretrained(target_name, dtype=torch.float32)
    questions = questions_in([], 50)[:: 50 // count][:count]
    prompts = [to_tokens(question, tokenizer) for question in questions]
    with file.open("w", encoding="utf-8") as lines:
        for question, found in zip(questions, write_answers(target, prompts, max_new_tokens), strict=True):
            text = tokenizer.decode(found.tokens[found.prompt_length :], skip_special_tokens=True)
            row = {"messages": [*question, {"role": "assistant", "content": text}]}
            lines.write(json.dumps(row) + "\n")


def examine(command: list[str], head: Path, changed: dict[str, Any], folder: Path) -> tuple[int, str]:
    """Return exit status and verdict on a copy of `head` with these fields in its config."""
    copy = shutil.copytree(head, folder / "copy", dirs_exist_ok=True)
    config = json.loads((head / "config.json").read_text(encoding="utf-8")) | changed
    (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = cli.main(["doctor", command[0], str(copy), *command[1:]])
    return status, printed.getvalue().strip().splitlines()[-1]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--head", required=True, type=Path, help="folder of a head in our own format")
    parser.add_argument("--answers", type=int, default=50, help="16 miss layer ids that are one too small")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="48 miss a RoPE base that is too large")
    args = parser.parse_args(arguments)
    config = json.loads((args.head / "config.json").read_text(encoding="utf-8"))
    missed = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = folder / "answers.jsonl"
        answer(args.target, args.answers, args.max_new_tokens, file)
        command = [args.target, "--dataset", str(file), "--answers", str(args.answers)]
        command += ["--max-new-tokens", str(args.max_new_tokens), "--dtype", "float32", "--device", "cpu"]
        for fault, changed, expected in faults(config):
            status, verdict = examine(command, args.head, changed, folder)
            is_found = status != 0 and expected in verdict if expected else status == 0
            missed += not is_found
            print(f"{fault}: {'found' if is_found else 'MISSED'}, exit status {status}. {verdict}", flush=True)
    return min(missed, 1)


if __name__ == "__main__":
    sys.exit(main())
