"""Count the prompts to which every way of decoding writes one text, in the invariant mode and in the normal one.

Question: in bfloat16, to how many prompts is the text the same, whatever drafts, decides, cuts the prompt or batches?
Answer, for SmolLM2 with 256 tokens: in the mode to all of 1,000 prompts in batches of 8, each decoded plainly and
in one other way, and to eight of them alone in 17 ways; to one prompt of 4,340 tokens as well, and to 200 prompts with
Qwen2.5-Coder-0.5B. In the normal mode `auto` and stock's prompt lookup wrote stock's text for none of the eight, and
the head's default tree for two.

    python -m training.studies.invariant_texts work/smollm2 model_cards/smollm2-135m-instruct-head --pack \
        --dataset eval/mt_bench.jsonl eval/gsm8k.jsonl --prompts 1000 --tokens 256 --dtype bfloat16 \
        --output work/texts.json

Method: prompts come in batches of 8, which plain decoding of the mode answers, and then one other way of decoding in
turn. The first prompt of every `--every`-th batch is also answered alone by every arm, greedily and at temperature 1
with its number as the seed. A hash of each text is kept. Arms of the mode are compared with plain decoding of the
mode, that and the arms of the normal mode with stock `generate`. The order of prompts is fixed and random, so a larger
`--prompts` goes on where a smaller one ended; so does a command that was cut off. Nothing is timed, so other work may
run at the same time.
"""

import argparse
import hashlib
import json
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils.logging import tqdm

from training.benchmarking.provenance import code
from transformers_resps import FixedPolicy, TreeShape
from transformers_resps.generation.output import end_ids, left_padded, sampling, up_to_end
from transformers_resps.heads import DraftSource
from transformers_resps.testing.divergence import first_difference
from transformers_resps.tools.arguments import device, dtype, model, positive
from transformers_resps.tools.bench import BenchConfig, BenchModels
from transformers_resps.tools.loading import default_device, load_source, short_name
from transformers_resps.tools.methods import Prompt
from transformers_resps.tools.results import machine
from transformers_resps.tools.session import Dialogue, read_dialogues

from .experiment import execute, print_table


LOOKUP = TreeShape(1, 0, 1, lookup=8)
SHAPES = (TreeShape(8, 4, 2), TreeShape(16, 5, 4, lookup=4))
CHUNKS = (7, 64)
ROWS = 8
Z = 1.959964  # of a two-sided 95% interval


@dataclass(frozen=True, slots=True)
class Arm:
    """A way to decode.

    Attributes:
        keywords: of `generate`.
        reference: the arm whose texts are compared with its own; `None` of the first.
        turn: whether prompts are answered in batches: the first of so many ways, the second, ...; 0 for all batches.
    """

    name: str
    temperature: float
    keywords: Mapping[str, Any]
    reference: "Arm | None" = None
    turn: int | None = None

    @property
    def is_invariant(self) -> bool:
        return "invariant" in self.keywords

    @property
    def is_promised(self) -> bool:
        """Whether another text than the reference's breaks the mode's promise."""
        return self.is_invariant and self.reference is not None and self.reference.is_invariant

    @property
    def key(self) -> str:
        mode, decoding = "invariant" if self.is_invariant else "normal", "sampled" if self.temperature else "greedy"
        return f"{mode}, {decoding}: {self.name}"


def arms_of(heads: Mapping[str, DraftSource]) -> list[Arm]:
    """All arms with these heads, each after the one it is compared with; with all but the first in one tree only."""
    first = {"assistant_model": next(iter(heads.values()))}
    auto = first | {"policy": "auto"}
    drafting: dict[str, dict[str, Any]] = {
        "lookup": {"policy": FixedPolicy(LOOKUP)},
        **{f"head, tree {shape}": first | {"policy": FixedPolicy(shape)} for shape in SHAPES},
        **{
            f"{name}, tree {SHAPES[0]}": {"assistant_model": head, "policy": FixedPolicy(SHAPES[0])}
            for name, head in list(heads.items())[1:]
        },
        "auto": auto,
    }
    stocks = [Arm("stock", temperature, {}) for temperature in (0.0, 1.0)]
    batches = Arm(f"plain, row of a batch of {ROWS}", 0.0, {"invariant": True}, stocks[0], 0)
    arms = [batches]
    ways = drafting | {f"auto, prompt in chunks of {size}": auto | {"prefill_chunk_size": size} for size in CHUNKS}
    for turn, (name, way) in enumerate(ways.items(), 1):
        arms.append(Arm(f"{name}, row of a batch of {ROWS}", 0.0, way | {"invariant": True}, batches, turn))
    for stock in stocks:
        reference = Arm("plain", stock.temperature, {"invariant": True}, stock if stock.temperature else batches)
        normal = {"auto": auto, "head's default tree": first}
        if not stock.temperature:  # stock's lookup draws other random numbers
            normal["stock's prompt lookup"] = {"prompt_lookup_num_tokens": 10}
        arms += [stock, *(Arm(name, stock.temperature, way, stock) for name, way in normal.items()), reference]
        alone = drafting if stock.temperature else ways
        compared = reference if stock.temperature else batches
        arms += [Arm(name, stock.temperature, way | {"invariant": True}, compared) for name, way in alone.items()]
    return arms


def write(target: Any, prompts: Sequence[Tensor], arm: Arm, tokens: int, seed: int) -> list[list[int]]:
    """The text of each prompt `[s]` of one call, up to its end."""
    ids, mask = left_padded(prompts)
    torch.manual_seed(seed)
    sequences = target.generate(
        ids.to(target.device),
        attention_mask=mask.to(target.device),
        max_new_tokens=tokens,
        pad_token_id=0,
        **arm.keywords,
        **sampling(arm.temperature),
    )
    ends = end_ids(target)
    return [up_to_end(row, ends) for row in sequences[:, ids.shape[1] :].tolist()]


def wilson(equal: int, total: int) -> tuple[float, float]:
    """The 95% interval of a share (Wilson, 1927), which has a width where all or none are equal, too."""
    share, weight = equal / total, Z * Z / total
    middle, half = share + weight / 2, Z * sqrt((share * (1 - share) + weight / 4) / total)
    return max(middle - half, 0) / (1 + weight), (middle + half) / (1 + weight)


class Record:
    """The hash of every text so far, in a file.

    Args:
        file: is read if it is there.
        facts: JSON values of what the texts depend on.

    Attributes:
        hashes: prompt -> key of an arm -> hash.
        parted: of texts that differ from their reference: prompt -> key of the arm -> the first other token, or `None`
            where the reference was written by an earlier command.

    Raises:
        ValueError: the file has other facts.
    """

    def __init__(self, file: Path, facts: dict[str, Any], arms: Sequence[Arm]) -> None:
        self._file, self._facts, self._arms = file, json.loads(json.dumps(facts)), arms
        known: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.is_file() else {}
        if known and known["facts"] != self._facts:
            odd = sorted(name for name, value in self._facts.items() if known["facts"].get(name) != value)
            raise ValueError(f"{file} was written with another {', '.join(odd)}. Pass another --output.")
        self.hashes: dict[str, dict[str, str]] = known.get("hashes", {})
        self.parted: dict[str, dict[str, int | None]] = known.get("parted", {})
        self._texts: dict[str, dict[str, list[int]]] = {}

    def lacks(self, prompt: str, arm: Arm) -> bool:
        """Whether this text is not known yet."""
        return arm.key not in self.hashes.get(prompt, {})

    def add(self, prompt: str, arm: Arm, text: list[int]) -> None:
        """Keep a text, and compare it with those that are there."""
        digest = hashlib.sha256(json.dumps(text).encode()).hexdigest()[:16]
        hashes, texts = self.hashes.setdefault(prompt, {}), self._texts.setdefault(prompt, {})
        hashes[arm.key], texts[arm.key] = digest, text
        for one in self._arms:
            pair = [one.key, one.reference.key] if one.reference is not None else []
            if arm.key in pair and len({hashes.get(key, digest) for key in pair}) > 1:
                both = [texts[key] for key in pair if key in texts]
                self.parted.setdefault(prompt, {})[one.key] = first_difference(*both) if len(both) == 2 else None

    def save(self) -> None:
        """Write the file: a kill leaves the old one or the new one."""
        found = {"facts": self._facts, "rows": self.rows(), "parted": self.parted, "hashes": self.hashes}
        self._file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self._file.with_suffix(".tmp")
        unfinished.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(self._file)

    def rows(self) -> list[dict[str, Any]]:
        """A row of the table for each arm that has a reference."""
        return [row for arm in self._arms if (row := self._row(arm)) is not None]

    def _row(self, arm: Arm) -> dict[str, Any] | None:
        if arm.reference is None:
            return None
        pairs = [(own.get(arm.key), own.get(arm.reference.key)) for own in self.hashes.values()]
        both = [text == reference for text, reference in pairs if text and reference]
        if not both:
            return None
        low, high = wilson(sum(both), len(both))
        return {
            "mode and arm": arm.key,
            "compared with": arm.reference.key,
            "texts equal": sum(both),
            "of": len(both),
            "95% Wilson interval": f"{low:.1%} to {high:.1%}",
        }

    @property
    def broken(self) -> list[str]:
        """Where the mode wrote two texts."""
        promised = {arm.key for arm in self._arms if arm.is_promised}
        return [
            f"{prompt}, {key}: parts at token {place}"
            for prompt, arms in self.parted.items()
            for key, place in arms.items()
            if key in promised
        ]


def answer_all(
    target: Any, prompts: Sequence[Prompt], arms: Sequence[Arm], record: Record, tokens: int, every: int
) -> None:
    """Write and save every text that the record lacks; one prompt of `every` so many batches is answered alone."""
    turns = max(arm.turn or 0 for arm in arms)
    with tqdm(total=len(prompts), desc="Comparing texts", unit="prompt") as bar:
        for batch, start in enumerate(range(0, len(prompts), ROWS)):
            for arm in arms:
                group = prompts[start : start + ROWS] if arm.turn in (0, batch % turns + 1) else []
                if arm.turn is None and batch % every == 0:
                    group = prompts[start : start + 1]
                if any(record.lacks(prompt.name, arm) for prompt in group):
                    texts = write(target, [prompt.input_ids for prompt in group], arm, tokens, start)
                    for prompt, text in zip(group, texts, strict=True):
                        record.add(prompt.name, arm, text)
                    record.save()
            bar.update(min(ROWS, len(prompts) - start))


def choose_prompts(args: argparse.Namespace, models: BenchModels) -> Iterator[Prompt]:
    """The first turns of all files, shuffled and joined; those that leave no room for the answer are left out."""
    dialogues = [one for source in args.dataset for one in read_dialogues(source)]
    random.Random(0).shuffle(dialogues)
    context = models.target.config.get_text_config().max_position_embeddings
    for first in range(0, len(dialogues) - args.join + 1, args.join):
        group = dialogues[first : first + args.join]
        turn = "\n\n".join(one.turns[0] for one in group)
        dialogue = Dialogue("+".join(one.name for one in group), group[0].opening, (turn,))
        prompt = dialogue.prompt(models.tokenizer)
        if len(prompt.input_ids) + args.tokens <= context:
            yield prompt


def study(args: argparse.Namespace) -> int:
    """Print the table; 1 when the mode wrote two texts to a prompt, 130 after Ctrl-C."""
    chosen = args.device or default_device()
    config = BenchConfig(args.target, args.head, args.dataset, (), dtype=args.dtype, device=chosen, pack=args.pack)
    models = BenchModels.load(config)
    assert models.head is not None
    heads: dict[str, Any] = {"head": models.head}
    heads |= {short_name(name): load_source(name, models.target) for name in args.also}
    arms = arms_of(heads)
    told = machine(models.target)
    del told["huge_page_mib"]  # differs from start to start, and changes no text
    facts = {
        **{name: getattr(args, name) for name in ("target", "head", "also", "dataset", "join", "tokens", "pack")},
        **told,
        "code_sha256": code()["code_sha256"],
    }
    record = Record(args.output, facts, arms)
    prompts = [prompt for _, prompt in zip(range(args.prompts), choose_prompts(args, models), strict=False)]
    status = 0
    try:
        answer_all(models.target, prompts, arms, record, args.tokens, args.every)
    except KeyboardInterrupt:
        status = 130
    print_table(record.rows())
    for line in record.broken:
        print(f"TWO TEXTS: {line}")
    print(f"\nWritten to {args.output}")
    return status or int(bool(record.broken))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("target", type=model, help="folder or Hub id of the target")
    add("head", type=model, help="folder or Hub id of a draft head for the target")
    add("--also", nargs="+", default=[], metavar="HEAD", help="heads, MTP layers or small models that draft, too")
    add("--dataset", nargs="+", required=True, help=".jsonl or .json with turns, messages or prompt")
    add("--prompts", type=positive, default=1000)
    add("--join", type=positive, default=1, help="first turns that make up one prompt, where it shall be long")
    add("--tokens", type=positive, default=256, help="of each text")
    add("--every", type=positive, default=4, help="batches of which one prompt is answered alone by every arm")
    add("--dtype", type=dtype, help="auto, float32 (the default on a CPU), bfloat16 or float16")
    add("--device", type=device, help="default: cuda if available, otherwise cpu")
    add("--pack", action="store_true", help="prepack the target's weights, for every arm")
    add("--output", type=Path, default=Path("results/invariant_texts.json"))
    return execute(parser, arguments, study)


if __name__ == "__main__":
    sys.exit(main())
