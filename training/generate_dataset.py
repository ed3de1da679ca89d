r"""Let the target answer prompts, to get the training data of a draft head.

    python training/generate_dataset.py --target work/smollm2 --prompts sharegpt.json --prompts gsm8k.jsonl \
        --output work/answers.jsonl --limit 4000 --temperatures 0 0 0.8

Writes one conversation per line (`messages`, `temperature`, `finished`, `prompt_id`) and `OUTPUT.provenance.json`.
Answers that repeat themselves without end go to `OUTPUT.repeats.jsonl`. If it is interrupted, the same command
continues. So does a command with more prompts, but not one with other settings.

Prompts of similar length are decoded together. Greedy batches decode with `policy="auto"`: every row advances on its
own, rows that ended leave the batch, and drafts are verified where they cost less than they give, which is in small
batches; a draft head of the target (`--head`) makes these faster still. Sampled batches decode plain: their rows would
have to advance in lockstep, which leaves drafts little to gain, and so a seed gives the same answers in every dtype.
"""

from runs.announcement import announce


if __name__ == "__main__":
    announce(__doc__)

import argparse
import hashlib
import json
import random
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from transformers import AutoTokenizer
from transformers.utils.logging import tqdm

from runs.command_line import run
from runs.hours import AnsweringTicks
from transformers_resps import DraftHead, FixedPolicy, TreeShape, attach
from transformers_resps.data import Conversation, load_conversations
from transformers_resps.generation.output import end_ids, left_padded, sampling, up_to_end
from transformers_resps.telemetry.display import moving
from transformers_resps.tools.cli import COMPILE
from transformers_resps.tools.loading import load_target
from transformers_resps.trainers.loading import context_of


_LONGEST_PIECE = 32  # tokens that a repeating answer repeats
DECIDES_ANSWERS = ("target", "temperatures", "max_new_tokens", "dtype", "seed")
Asked = TypeVar("Asked")


@dataclass(frozen=True)
class Prompt:
    prompt_id: str
    messages: Conversation
    token_ids: list[int]


def read_prompts(
    paths: list[Path], tokenizer: Any, max_prompt_tokens: int, limit: int, seed: int, matching: str = ""
) -> list[Prompt]:
    """At most `limit` shuffled prompts: the turns of a conversation up to its first answer, if the last matches."""
    prompts: dict[str, Prompt] = {}
    opened: list[Conversation] = []
    for path in paths:
        opened.extend(conversation for conversation in load_conversations(path) if conversation)
    random.Random(seed).shuffle(opened)
    for conversation in opened:
        ends = [i for i, message in enumerate(conversation) if message["role"] == "assistant"]
        messages = conversation[: ends[0]] if ends else conversation
        if not messages or messages[-1]["role"] != "user" or len(messages[-1]["content"]) > 8 * max_prompt_tokens:
            continue
        if not re.search(matching, messages[-1]["content"], re.IGNORECASE):
            continue
        token_ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        prompt_id = hashlib.sha256(json.dumps(messages).encode()).hexdigest()[:16]
        if len(token_ids) <= max_prompt_tokens:
            prompts.setdefault(prompt_id, Prompt(prompt_id, messages, token_ids))
        if len(prompts) == limit:
            break
    return list(prompts.values())


def finished_ids(output: Path) -> set[str]:
    """List the prompts that are answered already, in either file; removes an incomplete last line."""
    found = set[str]()
    for file in (output, repeats_of(output)):
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            file.write_text(whole, encoding="utf-8")
        found |= {json.loads(line)["prompt_id"] for line in whole.split("\n") if line}  # texts have other separators
    return found


def repeats_of(output: Path) -> Path:
    """The file of the answers that repeat themselves."""
    return output.with_suffix(".repeats.jsonl")


def repeats_itself(tokens: Sequence[int]) -> bool:
    """Whether an answer ends with the same piece of up to 32 tokens four times or more, at least 24 tokens in all."""
    for size in range(1, _LONGEST_PIECE + 1):
        end = max(4 * size, 24)
        if len(tokens) >= end and tokens[-end + size :] == tokens[-end:-size]:
            return True
    return False


def batches(
    prompts: Sequence[Asked], length: Callable[[Asked], int], temperatures: Sequence[float], batch_size: int, seed: int
) -> list[tuple[float, list[Asked]]]:
    """Group prompts by temperature and length, in random order: a run that stops early has seen every length.

    Each prompt gets the next of `temperatures`, so the shares do not depend on the batches.
    """
    found = []
    for temperature in dict.fromkeys(temperatures):
        own = [
            prompt for place, prompt in enumerate(prompts) if temperatures[place % len(temperatures)] == temperature
        ]
        own.sort(key=length)
        count = -(-len(own) // batch_size)
        ends = [len(own) * number // count for number in range(count + 1)] if own else []
        found += [(temperature, own[start:end]) for start, end in zip(ends, ends[1:], strict=False)]
    random.Random(seed).shuffle(found)
    return found


def answer(
    model: Any,
    head: DraftHead | None,
    prompts: Sequence[list[int]],
    temperature: float,
    max_new_tokens: int,
    seed: int,
) -> list[list[int]]:
    """Answer prompts of any lengths with an attached model, each up to its first end token.

    At temperature 0 each answer is the one that plain `generate` gives to its prompt alone, exactly in float32.
    """
    ids, mask = left_padded([torch.tensor(prompt, device=model.device) for prompt in prompts])
    drafting = (
        {"policy": "auto", "assistant_model": head} if temperature == 0 else {"policy": FixedPolicy(TreeShape.plain())}
    )
    ends = end_ids(model)
    torch.manual_seed(seed)
    written = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        pad_token_id=min(ends, default=0),
        **sampling(temperature),
        **drafting,
    )
    return [up_to_end(row, ends) for row in written[:, ids.shape[1] :].tolist()]


def rows_of(
    model: Any,
    head: DraftHead | None,
    tokenizer: Any,
    group: list[Prompt],
    temperature: float,
    max_new_tokens: int,
    seed: int,
) -> Iterator[dict[str, Any]]:
    """Answer the prompts of one batch, and yield the lines of `--output`."""
    eos_ids = end_ids(model)
    answers = answer(model, head, [prompt.token_ids for prompt in group], temperature, max_new_tokens, seed)
    for prompt, token_ids in zip(group, answers, strict=True):
        text = tokenizer.decode(token_ids, skip_special_tokens=True)
        yield {
            "prompt_id": prompt.prompt_id,
            "temperature": temperature,
            "finished": token_ids[-1] in eos_ids,
            "tokens": len(token_ids),
            "repeats": repeats_itself(token_ids),
            "messages": [*prompt.messages, {"role": "assistant", "content": text}],
        }


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True, help="model id or folder")
    parser.add_argument(
        "--prompts", required=True, action="append", type=Path, help=".json or .jsonl; may be repeated"
    )
    parser.add_argument("--output", required=True, type=Path, help="a .jsonl file; continued if it exists")
    parser.add_argument("--limit", type=int, default=4000, help="maximum number of prompts")
    parser.add_argument("--matching", default="", metavar="REGEX", help="use only prompts that match, ignoring case")
    parser.add_argument(
        "--temperatures", type=float, nargs="+", default=[0.0, 0.0, 0.8], help="used in turn, one for each prompt"
    )
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--max-prompt-tokens", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=64, help="maximum number of prompts decoded together")
    parser.add_argument("--head", help="folder or Hub id of a draft head; pays with batches of a few prompts")
    parser.add_argument("--dtype", default="auto", help="a torch dtype name, or auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--compile",
        choices=COMPILE,
        default="auto",
        help="auto: run compiled code once another process has made it",
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser


def check_provenance(args: argparse.Namespace) -> None:
    """Check that a file to continue was made with the same settings."""
    file = provenance_of(args.output)
    if not (args.output.exists() and file.exists()):
        return
    before = json.loads(file.read_text(encoding="utf-8"))["arguments"]
    names = [name for name in DECIDES_ANSWERS if before[name] != str(getattr(args, name))]
    if names:
        made, asked = (", ".join(f"{name} {of[name]}" for name in names) for of in (before, vars(args)))
        raise ValueError(
            f"{args.output} was made with {made}, but this command has {asked}. Pass the same settings, or another "
            "`--output`."
        )


def provenance_of(output: Path) -> Path:
    return output.with_suffix(".provenance.json")


def write_provenance(args: argparse.Namespace, prompts: list[Prompt]) -> None:
    facts = {
        "command": sys.argv,
        "arguments": {key: str(value) for key, value in vars(args).items()},
        "prompts_selected": len(prompts),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    provenance_of(args.output).write_text(json.dumps(facts, indent=2), encoding="utf-8")


def selected(args: argparse.Namespace, tokenizer: Any) -> list[Prompt]:
    """Load the prompts that the command asks for."""
    print(f"Reading at most {args.limit} prompts ...", flush=True)
    prompts = read_prompts(args.prompts, tokenizer, args.max_prompt_tokens, args.limit, args.seed, args.matching)
    if not prompts:
        raise ValueError(
            f"No conversation in {', '.join(map(str, args.prompts))} begins with a user turn of at most "
            f"{args.max_prompt_tokens} tokens that matches {args.matching!r}. Pass other prompts, raise "
            "`--max-prompt-tokens`, or change `--matching`."
        )
    return prompts


class PromptProgress:
    """A bar over prompts with the time left and tokens/s; where there is no terminal, a line for each batch.

    Args:
        total: prompts.
        before: prompts that an earlier run answered.
        is_terminal: show the bar.
        clock: in seconds.
    """

    def __init__(
        self, total: int, before: int, *, is_terminal: bool, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._total, self._before, self._answered, self._tokens = total, before, before, 0
        self._clock, self._started, self._is_terminal = clock, clock(), is_terminal
        self._bar: Any = tqdm(
            desc="Answering", total=total, initial=before, unit="prompt", disable=not is_terminal, file=sys.stderr
        )

    def __enter__(self) -> "PromptProgress":
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    @property
    def is_over(self) -> bool:
        """Whether no further batch shall be answered."""
        return False

    def watch(self, model: torch.nn.Module, prompts: int, most_steps: int) -> AbstractContextManager[None]:
        """Return a context in which the bar moves by a batch's prompts, evenly over its most steps."""
        return moving(self._bar, model, prompts, most_steps)

    def add(self, prompts: int, tokens: int) -> None:
        """Count a batch that is written: its prompts, and the tokens of its answers."""
        self._answered, self._tokens = self._answered + prompts, self._tokens + tokens
        seconds = self._clock() - self._started
        rate = f"{self._tokens / seconds:.0f} tokens/s"
        self._bar.set_postfix_str(rate)
        if not self._is_terminal:
            left = seconds / (self._answered - self._before) * (self._total - self._answered)
            print(f"{self._answered}/{self._total} prompts, {rate}, {timedelta(seconds=round(left))} left", flush=True)


# Makes the progress of a number of prompts, of which an earlier run has answered so many.
MakeProgress = Callable[[int, int], PromptProgress | AnsweringTicks]


def write_answers(
    args: argparse.Namespace,
    model: Any,
    head: DraftHead | None,
    tokenizer: Any,
    prompts: list[Prompt],
    make_progress: MakeProgress,
) -> None:
    """Answer the prompts that `--output` lacks."""
    done = finished_ids(args.output)
    groups = batches(prompts, lambda prompt: len(prompt.token_ids), args.temperatures, args.batch_size, args.seed)
    before = sum(prompt.prompt_id in done for prompt in prompts)
    print(f"Answering {len(prompts)} prompts in {len(groups)} batches; {before} are answered already.", flush=True)
    with (
        args.output.open("a", encoding="utf-8") as output,
        repeats_of(args.output).open("a", encoding="utf-8") as repeats,
        make_progress(len(prompts), before) as progress,
    ):
        for number, (temperature, group) in enumerate(groups):
            todo = [prompt for prompt in group if prompt.prompt_id not in done]
            if not todo:
                continue
            if progress.is_over:
                break
            with progress.watch(model, len(todo), args.max_new_tokens):
                made = rows_of(model, head, tokenizer, todo, temperature, args.max_new_tokens, args.seed + number)
                rows = list(made)
            for row in rows:
                (repeats if row.pop("repeats") else output).write(json.dumps(row, ensure_ascii=False) + "\n")
            output.flush()
            repeats.flush()
            progress.add(len(rows), sum(row["tokens"] for row in rows))


def answer_prompts(args: argparse.Namespace, make_progress: MakeProgress) -> None:
    """Load the target, and answer the prompts of the command line `args`."""
    check_provenance(args)
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    model = attach(load_target(args.target, args.dtype, args.device, packed=True), compile=COMPILE[args.compile])
    head = DraftHead.from_pretrained(args.head, target=model) if args.head else None
    asked, answered, context = args.max_prompt_tokens, args.max_new_tokens, context_of(model)
    if asked + answered > context:
        raise ValueError(
            f"`--max-prompt-tokens {asked}` and `--max-new-tokens {answered}` allow {asked + answered} tokens, but "
            f"the target reads at most {context} tokens. Lower one of them."
        )
    prompts = selected(args, tokenizer)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_provenance(args, prompts)
    write_answers(args, model, head, tokenizer, prompts, make_progress)


def main() -> None:
    answer_prompts(make_parser().parse_args(), partial(PromptProgress, is_terminal=sys.stderr.isatty()))


if __name__ == "__main__":
    run(main)
