"""`resps doctor`: checks that a head is read with the settings it was trained with."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import tqdm

from ..bench.models import load_target
from ..bench.options import model, positive
from ..data import Conversation, load_conversations, make_example, to_tokens
from ..doctor import Cell, Diagnosis, LabelledText, Source, refined, write_answers
from ..heads import DraftHead
from ..telemetry.display import moving
from .options import add_target_options
from .questions import default_questions, up_to


def add_command(commands: Any) -> None:
    """Add `resps doctor TARGET HEAD`."""
    parser = commands.add_parser("doctor", help="check that a head is read with the settings it was trained with")
    parser.set_defaults(run=doctor)
    add_target_options(parser)
    parser.add_argument(
        "head", type=model, help="folder or Hub id of a draft head for the target, in any published format"
    )
    parser.add_argument(
        "--dataset",
        help=".json, .jsonl or Hub id of conversations; without assistant turns the target writes the answers",
    )
    parser.add_argument("--split", default="train", help="of a dataset from the Hub")
    parser.add_argument("--answers", type=positive, default=50, help="number of answers to check (default: 50)")
    parser.add_argument(
        "--max-new-tokens",
        type=positive,
        default=256,
        help="tokens to check per answer; a wrong RoPE base shows on long answers only (default: 256)",
    )
    parser.add_argument(
        "--max-length", type=positive, default=320, help="tokens per conversation; longer ones are cut (default: 320)"
    )
    parser.add_argument("--revision", help="of the head")
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="FIELD=VALUE",
        help="read the head with these settings, for example rope_theta=1e4 feature_layers=[2,16,29]",
    )


def doctor(args: argparse.Namespace) -> int:
    """Print how well the head agrees with its target under each reading; 1 when another reading is better.

    The first verdict comes soon, from few and short answers; 130 when Ctrl-C ends what follows.
    """
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    target = load_target(args.target, args.dtype, args.device)
    head = DraftHead.from_pretrained(args.head, target=target, revision=args.revision, **corrections(args.set))
    conversations = list(islice(load_conversations(args.dataset, args.split), args.answers)) if args.dataset else []
    answers = answered(conversations, tokenizer, args.max_length, args.max_new_tokens)
    questions = [asked for row in conversations if (asked := up_to(row, "user"))] or default_questions(args.answers)
    prompts = [to_tokens(question, tokenizer)[-args.max_length :] for question in questions]
    count, tried, found = len(answers or prompts), 0, None
    print(
        f"A few short answers give a first verdict, up to {count} long ones better ones; Ctrl-C ends it.", flush=True
    )
    with tqdm(desc="Answers", total=count, unit="answer", disable=None) as bar:
        source = written(target, prompts, bar) if not answers else given(answers, bar)
        try:
            for found in refined(target, head, source, count, args.max_new_tokens):
                tried = max(tried, len(found.cells))
                bar.clear()
                print(f"{found.answers}/{count} answers: {found.verdict}", flush=True)
        except KeyboardInterrupt:
            if found is None:
                raise
            bar.close()
            print_diagnosis(found, tried)
            return 130
    assert found is not None
    print_diagnosis(found, tried)
    return int(not found.is_healthy)


def written(target: PreTrainedModel, prompts: list[Tensor], bar: Any) -> Source:
    """Let the target write answers when they are asked for; the bar moves with them, and back after the first look."""
    place = 0

    def source(first: int, end: int, most: int) -> list[LabelledText]:
        nonlocal place
        bar.update(first - place)
        with moving(bar, target, end - first, most):
            found = write_answers(target, prompts[first:end], most)
        place = end
        return found

    return source


def given(answers: list[LabelledText], bar: Any) -> Source:
    """Cut answers of a dataset where they are asked for."""
    place = 0

    def source(first: int, end: int, most: int) -> list[LabelledText]:
        nonlocal place
        bar.update(first - place)
        place = first
        return [replace(text, tokens=text.tokens[: text.prompt_length + most]) for text in answers[first:end]]

    return source


def corrections(settings: Sequence[str]) -> dict[str, Any]:
    """Read `FIELD=VALUE` strings, values in JSON, as overrides of the head's config.

    Raises:
        ValueError: a setting has no `=`, or its value is not JSON.
    """
    found = {}
    for setting in settings:
        field, separator, value = setting.partition("=")
        try:
            found[field.replace("-", "_")] = json.loads(value.lower() if value in ("True", "False") else value)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"`--set {setting}` cannot be read. Write FIELD=VALUE with a JSON value, for example "
                "rope_theta=1e4, norm_before_residual=true or feature_layers=[2,16,29]."
            ) from error
    return found


def answered(
    conversations: list[Conversation], tokenizer: PreTrainedTokenizerBase, max_length: int, max_new_tokens: int
) -> list[LabelledText]:
    """Cut every conversation after its first assistant turn; those without one are left out."""
    found = []
    for conversation in conversations:
        turns = up_to(conversation, "assistant")
        if len(turns) < 2:
            continue
        example = make_example(turns, tokenizer, max_length)
        if example.loss_mask.any():
            prompt_length = int(example.loss_mask.int().argmax())
            found.append(LabelledText(example.input_ids[: prompt_length + max_new_tokens], prompt_length))
    return found


def print_diagnosis(diagnosis: Diagnosis, tried: int) -> None:
    """Print a table, best reading first, and the verdict; `tried` readings had the first answers."""
    depths = range(1, len(diagnosis.configured.agreement) + 1)
    columns = "".join(f"  depth {depth}" for depth in depths)
    configured = diagnosis.configured
    print(f"\nAgreement with the target, at {configured.positions} positions of {len(configured.tallies)} answers:\n")
    print(f"  {'feature layers':24}{'RoPE base':>10}  {'norm before residual':20}{columns}  accepted  log likelihood")
    for cell in sorted(diagnosis.cells, key=lambda cell: -cell.accepted):
        print(row(cell, diagnosis))
    dropped = tried - len(diagnosis.cells)
    left_out = f"   {dropped} readings were far worse on the first answers" if dropped else ""
    print(f"\n  > as configured   * best{left_out}\n\n{diagnosis.verdict}")


def row(cell: Cell, diagnosis: Diagnosis) -> str:
    """Return one line of the table."""
    reading = cell.reading
    marks = (">" if cell is diagnosis.configured else " ") + ("*" if cell is diagnosis.best else " ")
    numbers = "".join(f"{share:9.3f}" for share in cell.agreement)
    layers = ", ".join(map(str, reading.feature_layers))
    before = "yes" if reading.norm_before_residual else "no"
    return (
        f"{marks}{layers:24}{reading.rope_theta:>10g}  {before:20}{numbers}{cell.accepted:10.2f}{cell.log_prob:16.3f}"
    )
