r"""Draft with a head, with what a memory holds of other answers, and with both.

Question: what does a memory of earlier answers add to prompt lookup, and to a head?
Answer: much where answers repeat a form, hardly anything beside a head elsewhere. Tool calls that obey a schema:
lookup writes 2.15 tokens per forward, 3.88 with 20 earlier calls and 3.70 with a memory that grows from nothing,
"auto" with a head 2.01 and 4.18, 2.12x and 3.47x plain decoding (Qwen, 40 calls). Conversations with tools: lookup
3.98, and 4.64 with a growing memory, "auto" 4.13 and 5.52, 3.96x and 4.45x (Qwen, 20). GSM8K: lookup 1.77, with 20,
200 and 2,000 answers to other questions 2.26, 2.55 and 2.65, the head alone 2.81; beside it "auto" gets 2.46x, 2.46x,
2.49x and 2.42x, where 2% is noise: what the head does not propose either is hardly ever right (SmolLM2 in bfloat16, 16
questions). HumanEval: lookup 2.37 and 3.07, "auto" 3.23x and 3.19x; MT-Bench: 1.77 and 1.93, 2.38x and 2.38x, with 64
answers to others (SmolLM2, 8 each). All greedy, of eight nodes or "auto" of 16. GSM8K at temperature 1: lookup 1.22,
1.37 with 20 answers and 1.48 with 200; beside the head "auto" gets 1.50x, 1.48x and 1.48x.
Of the tokens of these calls the schema forces 67% by their characters, but 0.1% as the only legal token beside the
end. The memory leaves 7% of all tokens undrafted that were forced: a grammar that drafted these would give at most
5.45 tokens per forward in place of 3.88.

    python -m training.studies.memories work/smollm2 model_cards/smollm2-135m-instruct-head \
        --dataset eval/gsm8k.jsonl --remember gsm8k_train.jsonl --limit 16 --dtype bfloat16 \
        --remembered 20 200 2000 --output work/memories
    python -m training.studies.memories work/qwen model_cards/qwen2.5-coder-0.5b-instruct-head \
        --dataset calls.jsonl --schema call.schema.json --limit 40 --output work/memories-calls

Method: the target writes every turn once; texts and the head's pools of every position are kept in the output folder,
and every way to draft is replayed on the same texts. Nothing is timed: "auto" weighs nodes by the costs of a quiet
machine. A memory is empty, holds answers to other prompts, or "grows": it holds what was written before, as one does
that serves all of these conversations. The grammar's bound is of forwards whose bonus token it forced being saved.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import xgrammar
from transformers import AutoTokenizer, LogitsProcessor
from xgrammar.contrib.hf import LogitsProcessor as Obeys

from training.prompts.batched_answers import answer
from transformers_resps import FixedPolicy, Policy, SuffixMemory, TreeShape
from transformers_resps.policies.costs import CostTable
from transformers_resps.policies.guard import BaselineGuard
from transformers_resps.policies.throughput import ThroughputPolicy
from transformers_resps.replay import RecordedText, record_pools, replay_policy
from transformers_resps.tools.cli import positive
from transformers_resps.tools.session import Dialogue, read_dialogues, spread

from .experiment import Experiment, add_options, execute
from .headroom import COSTS
from .step_costs import read_tables


DEPTH, TOP_K, NODES = 3, 3, 8
HEAD, LOOKUP = TreeShape(NODES + 1, DEPTH, TOP_K), TreeShape(1, 0, 1, NODES)
BOTH = TreeShape(NODES // 2 + 1, DEPTH, TOP_K, NODES // 2)
WAYS: dict[str, Callable[[], Policy]] = {  # at most eight nodes beside the root in each
    "head": lambda: FixedPolicy(HEAD),
    "lookup": lambda: FixedPolicy(LOOKUP),
    "head and lookup": lambda: FixedPolicy(BOTH),
    "auto": lambda: BaselineGuard(ThroughputPolicy(DEPTH, TOP_K, 2 * NODES)),
}
GROWS = "grows"
_BATCH = 64  # prompts that are answered together


class Grammar:
    """What a JSON schema lets the target write; compact, with one blank after commas and colons."""

    def __init__(self, schema: Path, tokenizer: Any, vocab_size: int) -> None:
        vocabulary = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocab_size)
        compiler = xgrammar.GrammarCompiler(vocabulary)
        self._compiled = compiler.compile_json_schema(schema.read_text("utf-8"), any_whitespace=False)
        self._tokenizer = tokenizer

    def processors(self) -> list[LogitsProcessor]:
        """Of one call of `generate`."""
        return [Obeys(self._compiled)]

    def forced(self, tokens: Sequence[int]) -> list[tuple[bool, bool]]:
        """Of each token of an answer: whether no other was legal, and whether its characters were forced."""
        matcher = xgrammar.GrammarMatcher(self._compiled)
        legal, found = xgrammar.allocate_token_bitmask(1, self._compiled.tokenizer_info.vocab_size), []
        for token in tokens:
            matcher.fill_next_token_bitmask(legal)
            is_only = sum(word.bit_count() for word in legal[0].numpy().view("uint32").tolist()) == 1
            text = self._tokenizer.decode([token])
            found.append((is_only, is_only or matcher.find_jump_forward_string().startswith(text)))
            matcher.accept_token(token)
        return found


@dataclass(frozen=True, slots=True)
class Turn:
    """A prompt and what the target wrote."""

    prompt: list[int]
    answer: list[int]


@dataclass(frozen=True, slots=True)
class Replayed:
    """One way over all texts."""

    way: str
    memory: str  # answers remembered
    forwards: int
    tokens: int
    nodes: int  # beside the roots
    by_source: dict[str, int]  # accepted tokens
    seconds: float  # as the costs have them
    undrafted: list[int]  # forwards, but each text's last, whose bonus token was forced: as the only one, by its text


def replay(
    texts: list[RecordedText],
    way: str,
    remembered: list[list[int]],
    costs: CostTable,
    *,
    grows: bool = False,
    forced: Sequence[Sequence[tuple[bool, bool]]] = (),
) -> Replayed:
    """Every text by a policy that keeps what it learns, as one memory would be used."""
    memory, policy = SuffixMemory(), WAYS[way]()
    memory.add(remembered)
    reports = []
    for text in texts:
        reports.append(replay_policy(text, policy, costs, [memory]))
        if grows:
            memory.add([text.input_ids[text.prompt_length :]])
    steps = [step for report in reports for step in report.steps]
    accepted = [report.accepted_by_source._asdict() for report in reports]
    undrafted = [
        marks[place]
        for report, marks in zip(reports, forced, strict=False)
        for place in accumulate(step.emitted_total for step in report.steps[:-1])
    ]
    return Replayed(
        way,
        GROWS if grows else str(len(remembered)),
        len(steps),
        sum(step.emitted_total for step in steps),
        sum(step.verified - 1 for step in steps),
        {source: sum(one[source] for one in accepted) for source in accepted[0]},
        sum(step.step_seconds for step in steps),
        [sum(kind) for kind in zip(*undrafted, strict=True)],
    )


class Written:
    """Answers of a target to whole conversations, of which a file keeps those that are known.

    Args:
        folder: of the file.
        target: attached.
        tokenizer: its own.
        temperature: 0 writes what plain decoding does.
        most_tokens: of one answer.
        grammar: that answers obey.
    """

    def __init__(
        self,
        folder: Path,
        target: Any,
        tokenizer: Any,
        temperature: float,
        most_tokens: int,
        grammar: Grammar | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / f"answers-{temperature:g}.json"
        self._known: dict[str, list[int]] = json.loads(self._file.read_text("utf-8")) if self._file.is_file() else {}
        self._target, self._tokenizer, self._grammar = target, tokenizer, grammar
        self._temperature, self._most_tokens = temperature, most_tokens

    def turns(self, dialogues: Sequence[Dialogue]) -> list[Turn]:
        """All turns, conversation after conversation; each follows the target's own answers."""
        written: dict[str, list[Turn]] = {dialogue.name: [] for dialogue in dialogues}
        for place in range(max((len(dialogue.turns) for dialogue in dialogues), default=0)):
            asked = [dialogue for dialogue in dialogues if place < len(dialogue.turns)]
            prompts = []
            for dialogue in asked:
                before = [
                    self._tokenizer.decode(turn.answer, skip_special_tokens=True) for turn in written[dialogue.name]
                ]
                prompts.append(dialogue.prompt(self._tokenizer, before).input_ids.tolist())
            for dialogue, prompt, own in zip(asked, prompts, self._answers(prompts), strict=True):
                written[dialogue.name].append(Turn(prompt, own))
        return [turn for turns in written.values() for turn in turns]

    def _answers(self, prompts: list[list[int]]) -> list[list[int]]:
        missing = sorted((prompt for prompt in prompts if str(prompt) not in self._known), key=len)
        for start in range(0, len(missing), _BATCH):
            batch = missing[start : start + _BATCH]
            more = {} if self._grammar is None else {"logits_processor": self._grammar.processors()}
            written = answer(self._target, None, batch, self._temperature, self._most_tokens, seed=0, **more)
            self._known |= zip(map(str, batch), written, strict=True)
            self._file.with_suffix(".part").write_text(json.dumps(self._known), "utf-8")
            self._file.with_suffix(".part").replace(self._file)
        return [self._known[str(prompt)] for prompt in prompts]


def recorded(folder: Path, target: Any, head: Any, turn: Turn, most_tokens: int) -> RecordedText:
    """What the head drafts at every position of a text, from the folder where it was recorded before."""
    ids = [*turn.prompt, *turn.answer]
    file = folder / f"{sha256(str(ids).encode()).hexdigest()[:16]}.safetensors"
    if file.is_file():
        return RecordedText.load(file)
    spare = most_tokens - len(turn.answer)
    text = record_pools(target, head, torch.tensor(ids), len(turn.prompt), depths={TOP_K: DEPTH}, spare_room=spare)
    text.save(file)
    return text


def others(evaluated: Sequence[Dialogue], sources: Sequence[Path], most: int) -> list[Dialogue]:
    """Conversations of files that are not evaluated, spread evenly over all of them."""
    taken = {dialogue.fingerprint for dialogue in evaluated}
    found = {one.fingerprint: one for source in sources for one in read_dialogues(str(source))}
    left = [one for name, one in found.items() if name not in taken]
    return spread(left, most) if left else []


def run(args: argparse.Namespace) -> int:
    experiment = Experiment.load(args)
    target, head, tokenizer = experiment.target, experiment.head, AutoTokenizer.from_pretrained(args.target)
    grammar = None if args.schema is None else Grammar(args.schema, tokenizer, target.config.vocab_size)
    written = Written(args.output, target, tokenizer, args.temperature, args.max_new_tokens, grammar)
    evaluated = spread(read_dialogues(str(args.dataset)), args.limit)
    turns = [turn for turn in written.turns(evaluated) if len(turn.answer) > 1]
    texts = [recorded(args.output, target, head, turn, args.max_new_tokens) for turn in turns]
    remembered = [turn.answer for turn in written.turns(others(evaluated, args.remember, max(args.remembered)))]
    forced = [] if grammar is None else [grammar.forced(turn.answer) for turn in turns]
    costs = next(iter(read_tables([args.costs]).values()))
    sizes = sorted({0, *(min(size, len(remembered)) for size in args.remembered)})
    settings = [(way, size, False) for way in WAYS for size in sizes] + [(way, 0, True) for way in WAYS]
    runs = [replay(texts, way, remembered[:size], costs, grows=grows, forced=forced) for way, size, grows in settings]
    plain = sum(costs.step_seconds(TreeShape.plain(), text.prompt_length) * len(text) for text in texts)
    rows = [row_of(one, plain) for one in runs]
    shares = [sum(kind) for kind in zip(*(mark for marks in forced for mark in marks[1:]), strict=True)]
    experiment.report(args, rows, runs, texts=len(texts), forced=shares)
    return 0


def row_of(one: Replayed, plain_seconds: float) -> dict[str, Any]:
    bounds = dict(zip(("one legal token", "forced characters"), one.undrafted, strict=False))
    return {
        "way": one.way,
        "answers remembered": one.memory,
        "tokens per forward": one.tokens / one.forwards,
        "nodes per forward": one.nodes / one.forwards,
        "from the memory": one.by_source["memory"] / one.tokens,
        "plain seconds over own": plain_seconds / one.seconds,
        **{f"forced and not drafted, {kind}": count / one.tokens for kind, count in bounds.items()},
        **{f"grammar bound, {kind}": one.tokens / (one.forwards - count) for kind, count in bounds.items()},
    }


def add_memory_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--remember", type=Path, nargs="+", default=[], help="files of the same kind")
    parser.add_argument("--remembered", type=positive, nargs="+", default=[20, 200], help="answers it holds")
    parser.add_argument("--schema", type=Path, help="JSON schema that answers obey, by xgrammar")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "work/memories")
    add_memory_options(parser)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--costs", type=Path, default=Path(COSTS[0]), help='of steps, for "auto"')
    return execute(parser, arguments, run)


if __name__ == "__main__":
    raise SystemExit(main())
