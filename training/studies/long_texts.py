"""Count how far a draft head's trees are followed in texts of up to 8k tokens, when it sees less of them.

Question: a head is trained on short texts. What does it lose in long ones, and does it draft better there if it sees
only the newest tokens, with or without the first ones (attention sinks), at true or at near positions?
Answer: SmolLM2's head, trained on up to 1,344 tokens, has a tau of 2.25 in the first 1,024 tokens of chats and of 2.09
from 4,096 tokens on. With the newest 1,024 alone it has 2.40 there (ratio 1.15, from 2,048 tokens on 1.07), and the
same before. In documents it makes no difference. The first tokens add nothing (LOG.md).

    python -m training.studies.long_texts work/smollm2 model_cards/smollm2-135m-instruct-head --chats 8 --documents 8 \
        --dataset eval/*.jsonl --dtype bfloat16 --output work/long_texts.json

Method: a chat's turns are held-out prompts of all files in a random order, which the target answers greedily in up to
`--tokens` tokens, until its context is full. Other texts are several long prompts in one turn with the request to sum
them up, one text for each of four lengths. At every position of every answer the head drafts one
tree for each arm, and the nodes that the text follows are counted. A head of one layer keeps the same keys however far
it looks, so they are computed once. Near positions are those that the first tokens would have if those that are hidden
had never been there (StreamingLLM, arXiv 2309.17453, section 3.2); the positions of the newest make no difference,
because RoPE is relative. Tau is of decoding each answer again by these trees. A command that was cut off goes on where
it ended. Nothing is timed, so other work may run at the same time.
"""

import argparse
import json
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache
from transformers.utils.logging import tqdm

from training.benchmarking.provenance import code
from transformers_resps import TreeShape
from transformers_resps.drafting.levels import LevelForward
from transformers_resps.drafting.pool_growth import grow_pool, sprout
from transformers_resps.generation.output import end_ids, sampling
from transformers_resps.heads import DraftCache, StepModel
from transformers_resps.tools.arguments import device, dtype, model, positive, shape
from transformers_resps.tools.bench import BenchConfig, BenchModels
from transformers_resps.tools.loading import default_device
from transformers_resps.tools.results import machine
from transformers_resps.tools.session import read_dialogues
from transformers_resps.tree import DraftTree
from transformers_resps.verifying.forward import FeatureTap

from .experiment import execute, print_table


WINDOWS = (256, 512, 1024, 2048)
WITH_SINKS = (1024,)
SINKS = 4
ROOTS = 16  # drafted from at once
BOUNDS = (0, 1024, 2048, 4096, 8192)  # of contexts that are counted together
DOCUMENTS = (1000, 2000, 4000, 7500)  # words and signs of a turn of documents, about
LONG = 2000  # characters of a prompt that is a document
RESAMPLES = 2000
_ANSWER = "\N{SECTION SIGN}"


@dataclass(frozen=True, slots=True)
class Arm:
    """What the head sees of a text.

    Attributes:
        window: of the newest tokens; `None` for all.
        sinks: of the first ones, in addition.
        near: whether these get near positions.
    """

    window: int | None = None
    sinks: int = 0
    near: bool = False

    def __str__(self) -> str:
        if self.window is None:
            return "all"
        if not self.sinks:
            return f"newest {self.window}"
        return f"newest {self.window}, first {self.sinks} at {'near' if self.near else 'true'} positions"


ARMS = (
    Arm(),
    *(Arm(window) for window in WINDOWS),
    *(Arm(window, SINKS, near) for window in WITH_SINKS for near in (False, True)),
)


@dataclass(frozen=True, slots=True)
class Text:
    """A chat as the target read it.

    Attributes:
        tokens: `[s + 1]`; the target has not read the last one.
        features: `[1, s, F]`.
        answers: the first place of each answer, and the place after its last.
    """

    tokens: Tensor
    features: Tensor
    answers: list[tuple[int, int]]


def write(models: BenchModels, turns: Iterator[str], most: int) -> Text:
    """Let the target answer the turns, up to `most` tokens each, until its context is full."""
    target, tokenizer = models.target, models.tokenizer
    assert models.head is not None
    room = target.config.get_text_config().max_position_embeddings
    tokens, cache, ends = torch.zeros(1, 0, dtype=torch.long), DynamicCache(config=target.config), end_ids(target)
    answers, features = [], []
    for turn in turns:
        asked = tokenizer(_asked(turn, tokenizer, is_first=not answers), return_tensors="pt", add_special_tokens=False)
        ids = asked.input_ids
        if answers and int(tokens[0, -1]) in ends:  # the end of the answer
            ids = ids[:, 1:]
        if tokens.shape[1] + ids.shape[1] + most > room:
            break
        tokens = torch.cat([tokens, ids], dim=1)
        start = tokens.shape[1]
        with FeatureTap(target, models.head.feature_layers) as tap, tap.record() as caught:
            tokens = target.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                past_key_values=cache,
                max_new_tokens=most,
                pad_token_id=0,
                **sampling(0.0),
            )
        features.append(caught.concatenated())
        answers.append((start, tokens.shape[1]))
    return Text(tokens[0], torch.cat(features, dim=1), answers)


def _asked(turn: str, tokenizer: Any, *, is_first: bool) -> str:
    """What stands before an answer, from the end of the answer before it on."""
    before = [] if is_first else [{"role": "user", "content": ""}, {"role": "assistant", "content": _ANSWER}]
    messages = [*before, {"role": "user", "content": turn}]
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text if is_first else text.partition(_ANSWER)[2]


class Drafts:
    """Trees of a head from any position of a text, which it sees as an arm says."""

    def __init__(self, model: StepModel, text: Text) -> None:
        if model.needs_all_queries or model.depths > 1:
            raise ValueError("The keys of this head depend on how far it looks. Pass a head with one layer.")
        self._model, self._tokens = model, text.tokens[None, 1:]
        self._hidden = model.fuse(text.features.to(model.dtype))
        count = self._tokens.shape[1]
        cache = DraftCache.empty(model, 1)
        cache.reserve(count)
        entries = cache.attend_from(0, None, is_causal=True)
        places = model.places(torch.arange(count)[None])
        model.run(0, self._tokens, self._hidden, places, entries, wanted=slice(-1, None))
        self._buffers = [part[0, :, cache.tree_room :] for part in cache.buffers]  # [kv heads, s, hd]

    def pools(self, roots: Tensor, arm: Arm, tree: TreeShape) -> DraftTree:
        """Trees below the `roots` `[r]`, places of tokens."""
        model, prefixes = self._model, roots[:, None]
        newest = min(int(roots.max()), arm.window or int(roots.max()))
        window = prefixes - newest + torch.arange(newest)
        seen = torch.cat([torch.arange(arm.sinks).expand(len(roots), -1), window], dim=1)
        visible = torch.cat([seen[:, : arm.sinks] < window[:, :1], window >= 0], dim=1)
        cache = self._cache(seen.clamp(min=0), (tree.depth - 1) * tree.top_k)
        if arm.near:
            first = (window[:, :1] - arm.sinks).clamp(min=0) + torch.arange(arm.sinks)
            rows = (len(roots), -1)
            hidden = self._hidden[:, : arm.sinks].expand(*rows, -1)
            entries = cache.attend_from(0, None, is_causal=True)
            model.run(0, self._tokens[:, : arm.sinks].expand(*rows), hidden, model.places(first), entries)
        end = seen.shape[1]
        output = model.run(
            0,
            self._tokens[0, roots - 1][:, None],
            self._hidden[0, roots - 1][:, None],
            model.places(prefixes - 1),
            cache.attend_from(end - 1, visible[:, None, None]),
        )
        places = model.places(prefixes + torch.arange(tree.depth - 1))
        levels = LevelForward(model, cache, places, end, visible)
        pool = grow_pool(sprout(model, output, tree.top_k, False), tree.depth, levels)
        return DraftTree.from_pool(self._tokens[0, roots - 1], pool, tree.total_tokens)

    def _cache(self, seen: Tensor, room: int) -> DraftCache:
        """A row for each root, with the entries `[r, n]` it sees."""
        rows = [part[:, seen].transpose(0, 1) for part in self._buffers]
        return DraftCache([F.pad(part, (0, 0, room, 0)) for part in rows], room)


def followed(drafts: Drafts, text: Text, answer: tuple[int, int], arm: Arm, tree: TreeShape) -> list[int]:
    """At each position of an answer but the last, how many nodes of the tree below it the text follows."""
    start, stop = answer
    tokens, counts = text.tokens.tolist(), list[int]()
    for roots in torch.arange(start, stop - 1).split(ROOTS):
        ahead = [tokens[root + 1 : stop] + [-1] * tree.depth for root in roots.tolist()]
        counts += drafts.pools(roots, arm, tree).drafted_match([row[: tree.depth] for row in ahead])
    return counts


def counted(drafts: Drafts, text: Text, answer: tuple[int, int], tree: TreeShape) -> dict[str, Any]:
    """The context of an answer and, as digits of base 36, what `followed` counts of each arm."""
    digits = "0123456789abcdefghijklmnopqrstuvwxyz"
    counts = {str(arm): followed(drafts, text, answer, arm, tree) for arm in ARMS}
    return {"context": answer[0]} | {arm: "".join(digits[one] for one in found) for arm, found in counts.items()}


def walked(counts: Sequence[int]) -> tuple[int, int]:
    """Tokens and steps of decoding an answer again, by the nodes that it follows at each position."""
    place = steps = 0
    while place < len(counts):
        place, steps = place + min(counts[place], len(counts) - place - 1) + 1, steps + 1
    return place, steps


def chat(prompts: Sequence[str], number: int) -> Iterator[str]:
    order = list(prompts)
    random.Random(number).shuffle(order)
    return iter(order)


def documents(prompts: Sequence[str], number: int) -> Iterator[str]:
    """One turn, of one of the lengths."""
    longest = DOCUMENTS[number % len(DOCUMENTS)] * 4  # characters
    joined = "\n\n".join(prompt for prompt in chat(prompts, number) if len(prompt) > LONG)
    yield f"{joined[:longest]}\n\nSummarize all of the texts above."


KINDS = {"chat": chat, "documents": documents}


def rows_of(texts: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of each kind of texts."""
    kinds = {kind: [turns for name, turns in texts.items() if name.startswith(kind)] for kind in KINDS}
    return [{"texts": kind} | row for kind, found in kinds.items() if found for row in _rows(found)]


def _rows(texts: Sequence[Any]) -> list[dict[str, Any]]:
    """Tau of each arm in each range of contexts, and its ratio to that of seeing all with a 95% bootstrap interval."""
    rows = []
    for arm in map(str, ARMS):
        row: dict[str, Any] = {"sees": arm}
        for low, high in zip(BOUNDS, BOUNDS[1:], strict=False):
            answers = [[_both(turn, arm) for turn in turns if low <= turn["context"] < high] for turns in texts]
            totals = torch.tensor([[*map(sum, zip(*one, strict=True))] for one in answers if one]).double()
            if len(totals):
                tokens, steps = totals[:, :2].sum(0).tolist()
                row[f"tau, {low} to {high}"] = tokens / steps
                if arm != str(ARMS[0]):
                    row[f"ratio, {low} to {high}"] = _interval(totals)
        rows.append(row)
    return rows


def _both(turn: dict[str, Any], arm: str) -> tuple[int, int, int, int]:
    return *walked(_digits(turn[arm])), *walked(_digits(turn[str(ARMS[0])]))


def _digits(counts: str) -> list[int]:
    return [int(one, 36) for one in counts]


def _interval(totals: Tensor) -> str:
    """Of `[texts, 4]` tokens and steps of an arm and of seeing all: the ratio of tau, texts drawn with replacement."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(totals), (RESAMPLES, len(totals)), generator=generator)
    sums = torch.cat([totals.sum(0)[None], totals[drawn].sum(1)])
    ratios = sums[:, 0] / sums[:, 1] / (sums[:, 2] / sums[:, 3])
    low, high = ratios[1:].quantile(torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
    return f"{float(ratios[0]):.3f} ({low:.3f} to {high:.3f})"


@torch.inference_mode()
def study(args: argparse.Namespace) -> int:
    """Print the table."""
    config = BenchConfig(
        args.target, args.head, args.dataset, (), dtype=args.dtype, device=args.device or default_device(), pack=True
    )
    models = BenchModels.load(config)
    assert models.head is not None
    names = ("target", "head", "dataset", "tokens", "shape")
    facts = {**{name: str(getattr(args, name)) for name in names}, **machine(models.target)}
    known = json.loads(args.output.read_text("utf-8")) if args.output.is_file() else {"facts": facts, "texts": {}}
    if known["facts"] != json.loads(json.dumps(facts, default=str)):
        raise ValueError(f"{args.output} was written with other options or elsewhere. Pass another --output.")
    texts: dict[str, Any] = known["texts"]
    prompts = [turn for file in args.dataset for dialogue in read_dialogues(file) for turn in dialogue.turns]
    asked = [("chat", number) for number in range(args.chats)]
    asked += [("documents", number) for number in range(args.documents)]
    for kind, number in tqdm(asked, desc="Texts", unit="text"):
        name = f"{kind} {number}"
        if name in texts:
            continue
        text = write(models, KINDS[kind](prompts, number), args.tokens)
        drafts = Drafts(models.head.bind(models.target), text)
        texts[name] = [counted(drafts, text, answer, args.shape) for answer in text.answers]
        found = {"facts": facts, "code_sha256": code()["code_sha256"], "rows": rows_of(texts), "texts": texts}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        unfinished = args.output.with_suffix(".tmp")
        unfinished.write_text(json.dumps(found, indent=1, default=str) + "\n", encoding="utf-8")
        unfinished.replace(args.output)
    print_table(rows_of(texts))
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("target", type=model, help="folder or Hub id of the target")
    add("head", type=model, help="folder or Hub id of a draft head of one layer for the target")
    add("--dataset", nargs="+", required=True, help=".jsonl or .json with turns, messages or prompt")
    add("--chats", type=int, default=8)
    add("--documents", type=int, default=8)
    add("--tokens", type=positive, default=48, help="of each answer, at most")
    add("--shape", type=shape, default=TreeShape(16, 5, 4), help="total_tokens,depth,top_k of every tree")
    add("--dtype", type=dtype, help="auto, float32 (the default on a CPU), bfloat16 or float16")
    add("--device", type=device, help="default: cuda if available, otherwise cpu")
    add("--output", type=Path, default=Path("results/long_texts.json"))
    return execute(parser, arguments, study)


if __name__ == "__main__":
    sys.exit(main())
