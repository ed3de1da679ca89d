r"""Time what a memory gains, and what one costs that knows nothing or misleads.

Question: how much faster is `generate` with a memory of earlier calls, and how much slower with a useless one?
Answer: over plain decoding, on a quiet Zen 4, each once (measurements/memory-*.json). Conversations with tools (Qwen,
four; most of the time reads prompts), compiled: lookup 1.39, with a warm memory 1.46; a head 1.38, with the memory
1.37. OpenVINO's prompt lookup gets 1.22 and vLLM's suffix decoding 1.26: they draft 2.8 tokens a forward, the memory
4.2. Eager, edits of code (Qwen, two conversations of 256 tokens a turn): lookup 3.30, with a warm memory 4.48; a head
3.55, with the memory 4.32. GSM8K (SmolLM2, eight): 1.63 and 1.89; a head 2.20, with the memory 1.97: the one loss. A
useless memory reaches 1.66, a hostile one 1.76, as lookup alone or better.

    python -m training.studies.memory_speed work/qwen model_cards/qwen2.5-coder-0.5b-instruct-head --pack \
        --dtype bfloat16 --dataset agents.jsonl --remember agents.jsonl --remembered 8 --limit 4 --max-new-tokens 96 \
        --compile --peers --vllm .venv/vllm/bin/python --output work/speed-agents
    python -m training.studies.memory_speed work/smollm2 model_cards/smollm2-135m-instruct-head --pack \
        --dtype bfloat16 --dataset gsm8k.jsonl --remember gsm8k_train.jsonl --remembered 20 --harm --limit 8 \
        --max-new-tokens 96 --output work/speed-gsm8k

OpenVINO reads a converted copy of the target beside it, see `training/benchmarking/peers.py`. For vLLM's suffixes:
`make .venv/vllm/.filled`, then by its Python `-m pip install nanobind==2.9.2 cmake ninja`, and with its `bin` in PATH
`-m pip install --no-deps --no-build-isolation arctic-inference==0.1.1`.

Method: every conversation is answered by all ways in an order of its own, once. Each way has an "auto" and a memory of
its own, which learn from answer to answer; a warm memory begins with answers to other conversations. A useless memory
holds a million random tokens, a hostile one the contexts of these answers and what never follows; both stay so.
"""

import argparse
import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from transformers import AutoTokenizer

from training.benchmarking.peers import VLLM_SUFFIX, VLLM_WAYS, Peer, load_peers, vllm_peers
from transformers_resps import BaselineGuard, SuffixMemory
from transformers_resps.policies.throughput import ThroughputPolicy
from transformers_resps.telemetry.report import bootstrap_interval, rate
from transformers_resps.tools.methods import Answer, Bench, Generate, compiled, plain, plain_steps
from transformers_resps.tools.results import COMPILED_PLAIN, PLAIN, Run
from transformers_resps.tools.session import Session, read_dialogues, spread

from .experiment import Experiment, add_options, execute
from .memories import Grammar, Turn, Written, add_memory_options, others


_USELESS, _WRONG = 1_000_000, 8  # tokens


class KeptAuto(BaselineGuard):
    """What "auto" stands for, of one way alone: answers share it."""

    def __init__(self) -> None:
        super().__init__(ThroughputPolicy())

    def __deepcopy__(self, memo: dict[int, Any]) -> "KeptAuto":
        return self


class Unchanged(SuffixMemory):
    """A memory that calls do not add to."""

    def remember(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> None:
        pass


@dataclass(frozen=True)
class Obedient(Generate):
    """A way whose answers obey a grammar."""

    grammar: Grammar | None = None

    def prepare(self, *call: Any) -> Callable[[], Answer]:
        assert self.grammar is not None
        return Generate(self.name, {**self.keywords, "logits_processor": self.grammar.processors()}).prepare(*call)


def useless(vocab_size: int) -> SuffixMemory:
    memory, draw = Unchanged(_USELESS), random.Random(0)
    memory.add([[draw.randrange(vocab_size) for _ in range(_USELESS - 1)]])
    return memory


def hostile(turns: Sequence[Turn], vocab_size: int) -> SuffixMemory:
    """After the last two tokens of every place, and more often after the last one, what does not follow there."""
    memory, draw, texts = Unchanged(), random.Random(0), []
    for turn in turns:
        text = [*turn.prompt[-2:], *turn.answer]
        for before, last, right in zip(text, text[1:], text[2:], strict=False):
            wrong = [(right + draw.randrange(1, vocab_size)) % vocab_size for _ in range(_WRONG)]
            texts += [[before, last, *wrong]] * 4 + [[last, *wrong]] * 8
    memory.add(texts)
    return memory


def ways_of(
    given: Experiment,
    remembered: Sequence[list[int]],
    harmed: Sequence[Turn],
    grammar: Grammar | None,
    *,
    compile: bool = False,
) -> list[Generate]:
    """All ways, with policies and memories that have learned nothing yet; ours compiled or not."""
    warm, beside = SuffixMemory(), SuffixMemory()
    for memory in (warm, beside):
        memory.add(remembered)
    drafting: dict[str, Any] = {
        "lookup": {},
        "memory, empty at first": {"assistant_model": SuffixMemory()},
        "memory, warm": {"assistant_model": warm},
        "head": {"assistant_model": given.head},
        "head and memory, warm": {"assistant_model": [given.head, beside]},
    }
    if harmed:
        vocab_size = given.target.config.vocab_size
        drafting["memory, useless"] = {"assistant_model": useless(vocab_size)}
        drafting["memory, hostile"] = {"assistant_model": hostile(harmed, vocab_size)}
    ways = [Generate(name, {**how, "policy": KeptAuto()}) for name, how in drafting.items()]
    ways = [plain(), *map(compiled, [plain_steps(), *ways])] if compile else [plain(), *ways]
    return ways if grammar is None else [Obedient(way.name, way.keywords, grammar=grammar) for way in ways]


def peers_of(given: Experiment, vllm: Path | None, running: ExitStack) -> list[Peer]:
    """Other engines that look up or remember, and plainly; vLLM keeps what it wrote, from an empty memory on."""
    found = load_peers(["openvino"], given.target, None)
    if vllm is not None:
        names = (VLLM_WAYS[0], VLLM_SUFFIX)
        found += running.enter_context(vllm_peers(vllm, given.target, given.head, names))[0]
    return found


def row_of(name: str, own: Sequence[Run], base: Sequence[Run]) -> dict[str, Any]:
    """A way against plain decoding of the same prompts in the same order."""
    pairs = [(run.timing, other.timing) for run, other in zip(own, base, strict=True)]
    conversations = dict.fromkeys(timing.prompt for timing, _ in pairs)
    grouped = [[[pair[side] for pair in pairs if pair[0].prompt == one] for one in conversations] for side in (0, 1)]
    interval = bootstrap_interval(grouped[0], grouped[1])
    later = [timing.prefill_seconds - other.prefill_seconds for timing, other in pairs]
    return {
        "way": name,
        "tokens/s": rate(timing for timing, _ in pairs),
        "to plain": rate(timing for timing, _ in pairs) / rate(other for _, other in pairs),
        "95% interval": "{:.2f} to {:.2f}".format(*interval),
        "tokens per forward": sum(timing.tokens for timing, _ in pairs)
        / sum(timing.target_forwards for timing, _ in pairs),
        "first token later, ms": 1e3 * median(later),
        "same text": sum(_is_same(run, other) for run, other in zip(own, base, strict=True)) / len(pairs),
    }


def _is_same(run: Run, other: Run) -> bool:
    return bool(run.token_ids.tolist() == other.token_ids.tolist())


def run(args: argparse.Namespace) -> int:
    given = Experiment.load(args)
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    grammar = None if args.schema is None else Grammar(args.schema, tokenizer, given.target.config.vocab_size)
    written = Written(args.output, given.target, tokenizer, 0.0, args.max_new_tokens, grammar)
    evaluated = spread(read_dialogues(str(args.dataset)), args.limit)
    remembered = [turn.answer for turn in written.turns(others(evaluated, args.remember, max(args.remembered)))]
    harmed = written.turns(evaluated) if args.harm else []
    bench = Bench(given.target, args.max_new_tokens)
    with ExitStack() as running:
        peers = peers_of(given, args.vllm, running) if args.peers else []
        new = partial(ways_of, given, remembered, harmed, grammar, compile=args.compile)
        Session(bench, tokenizer, evaluated, [*new(), *peers]).warm_up()
        ways = [*new(), *peers]
        session = Session(bench, tokenizer, evaluated, ways)
        for _ in session.run():
            pass
    base = session.runs_of(COMPILED_PLAIN if args.compile else PLAIN)
    rows = [row_of(way.name, session.runs_of(way.name), base) for way in ways]
    unexplained = [] if grammar is not None else session.judge.unexplained  # the judge knows of no grammar
    given.report(args, rows, session.timings, remembered=len(remembered), unexplained=unexplained)
    return int(bool(unexplained))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "work/memory-speed")
    add_memory_options(parser)
    parser.add_argument("--harm", action="store_true", help="also useless and hostile memories")
    parser.add_argument("--compile", action="store_true", help="compile our steps; plain decoding is both")
    parser.add_argument("--peers", action="store_true", help="also OpenVINO")
    parser.add_argument("--vllm", type=Path, help="of them, Python of an environment with vLLM and arctic-inference")
    return execute(parser, arguments, run)


if __name__ == "__main__":
    raise SystemExit(main())
