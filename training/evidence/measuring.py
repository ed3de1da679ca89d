"""One experiment in one fresh process: every arm answers every prompt in turn, and a results file is sealed.

What is timed begins anew in each process; texts that are compared are kept, and go on where they were stopped.
"""

import json
import random
import re
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer
from transformers.utils.logging import tqdm

from training.benchmarking.journal import Journal, JournaledBench
from training.benchmarking.peers import load_peers
from training.benchmarking.provenance import code
from transformers_resps import TreeShape, attach
from transformers_resps.data import training_prompts_of
from transformers_resps.generation.output import end_ids, left_padded, sampling, up_to_end
from transformers_resps.telemetry.report import Timing, rate
from transformers_resps.testing import explain_divergence
from transformers_resps.tools.loading import load_source, load_target
from transformers_resps.tools.methods import Bench, Generate, Method, Prompt, compiled, plain, plain_steps, policies
from transformers_resps.tools.results import Run, machine, peak_mib, plain_spread
from transformers_resps.tools.session import Dialogue, Session, check_apart, read_dialogues, spread

from .arms import Kept, LeftOut, Models, arms_of, candidates, load_quantized
from .experiments import (
    ANSWERS,
    AUTO,
    EXACT_PLAIN,
    FEW_BITS,
    FIXED,
    MEMORY,
    OPENVINO,
    PLAIN,
    REPLAY,
    SAMPLED,
    SAMPLES,
    STOCK,
    TEXTS,
    USELESS_MEMORY,
    Experiment,
)
from .prompts import EAGLE_SETS, OURS, quickest, read_prompts, read_rows
from .quiet import Watch
from .replaying import replayed
from .sealed import Measured, seal


QUICK_PROMPTS = 5
DEMO_PROMPTS = "examples/demo/prompts.jsonl"
FOREIGN_PROMPTS = "training/recipes/foreign_prompts.jsonl"
_WARM_UP_TOKENS = 12
_SEARCHED, _SEARCH_TOKENS = 8, 64  # prompts and tokens that the best fixed tree is found with
_SAMPLED_AT_ONCE = 25  # texts of stock in one call
_NUMBER = re.compile(r"-?\d[\d,]*\.?\d*")
_BURST, _PAUSE = 0.5, 0.5  # seconds of the noisy neighbour


def run(experiment: Experiment, number: int, options: Any, file: Path) -> None:
    """Measure, and write `file`.

    Raises:
        LeftOut: this machine lacks what all of it needs.
        ValueError: a head or policy was trained on one of the prompts, or a journal is of other settings.
    """
    torch.set_num_threads(options.threads or torch.get_num_threads())
    watch = Watch()
    watch.begin()
    models = Models.load(experiment, options)
    learned = training_prompts_of(models.folders["head"]) if "head" in models.folders else None
    asked = prompts_of(experiment, options, learned or set())
    with ExitStack() as running:
        best = best_fixed(experiment, models, options) if FIXED in experiment.arms and experiment.is_timed else None
        arms, left_out = arms_of(experiment, models, best, options, running)
        check_unseen(asked, models)
        facts = facts_of(experiment, models, asked, best)
        kept = options.work / f"{experiment.name}-{number}-{facts['code']['code_sha256'][:12]}"
        if experiment.is_timed:  # what an earlier process timed is not covered by this one's watch
            shutil.rmtree(kept, ignore_errors=True)
        journal = Journal(kept, begun_with(facts, left_out))
        bench = JournaledBench(models.target, experiment.tokens, journal)
        timed = {PLAIN: arms[PLAIN]} if experiment.kind in (REPLAY, MEMORY) else arms
        warm_up(bench, timed, asked[0].prompt(models.tokenizer))
        running.enter_context(noise(experiment.neighbour))
        if experiment.kind == SAMPLES:
            rows = list(sampled(bench, journal, arms, asked, models.tokenizer))
        elif experiment.kind == MEMORY:
            rows = list(held(experiment, models, arms, options))
        elif experiment.kind == REPLAY:
            rows = list(replayed(bench, experiment, models, arms, asked, searched_prompts(options)))
        else:
            right = right_answers(options.gsm8k) if experiment.kind == ANSWERS else {}
            process = Process(experiment, number, bench, journal, arms, asked, models.tokenizer, right)
            shown = tqdm(
                process.answers(), desc=f"{experiment.name}, process {number}", total=len(asked) // experiment.batch
            )
            rows = [row for told in shown for row in told]
    results = {
        "schema_version": 1,
        "date": date.today().isoformat(),
        "experiment": experiment.name,
        "process": number,
        **facts,
        "arms": list(experiment.arms),
        "left_out": left_out,
        "quick": options.quick,
        "command": ["python", "-m", "training.evidence", *sys.argv[1:]],
        "rows": rows,
    }
    watch.end(plain_spread(Measured(file, results).timings) if experiment.is_judged else None)
    seal(file, results | {"quiet": asdict(watch)})


def facts_of(
    experiment: Experiment, models: Models, asked: Sequence[Dialogue], best: TreeShape | None
) -> dict[str, Any]:
    """Return code, weights, machine and settings."""
    prompts = {one.name: one.fingerprint for one in asked}
    settings = {
        name: value for name, value in asdict(experiment).items() if name not in ("arms", "title", "processes")
    }
    settings |= {"prompts": prompts, "best": None if best is None else str(best)}
    return {"code": code(), "weights": models.identity(), "machine": machine(models.target), "settings": settings}


def begun_with(facts: Mapping[str, Any], left_out: Mapping[str, str]) -> dict[str, Any]:
    """Return what must be the same when a process that was stopped goes on; commits of other files may differ."""
    same = {name: facts["machine"][name] for name in ("device", "dtype", "threads")}
    code_hash = facts["code"]["code_sha256"]
    return {"code": code_hash, **same, "weights": facts["weights"], "left_out": dict(left_out)} | facts["settings"]


def check_unseen(asked: Sequence[Dialogue], models: Models) -> None:
    """Raises ValueError when a head or policy was trained on one of the prompts."""
    for kind, folder in models.folders.items():
        if kind != "target":
            check_apart(asked, training_prompts_of(folder) or set(), f"the training prompts of {folder}")


def prompts_of(experiment: Experiment, options: Any, learned: Container[str]) -> Sequence[Dialogue]:
    """Return the prompts that an experiment asks; of GSM8K none that the head has `learned` from."""
    if experiment.context:
        ids = torch.randint(1, 49152, (1 if options.quick else 2, experiment.context), generator=torch.Generator())
        return [Tokens(f"random/{number}", [], ("",), row) for number, row in enumerate(ids)]
    if experiment.name == "other-domain":
        return spread(read_dialogues(FOREIGN_PROMPTS), options.each or experiment.each)
    if experiment.kind == ANSWERS:
        return spread(gsm8k_of(options, learned), options.each or experiment.each)
    if experiment.kind == TEXTS and EXACT_PLAIN in experiment.arms:
        found = read_prompts(options.prompts, experiment.each)
        found += read_prompts(options.sets, experiment.each) if options.sets else []
        found += gsm8k_of(options, learned) if options.gsm8k else []
        once: dict[str, Dialogue] = {}
        for one in found:  # the sets hold questions of GSM8K, too
            once.setdefault(one.name, one)
        return list(once.values())[: options.each or experiment.each]
    found = read_prompts(options.prompts, options.each or experiment.each)
    return quickest(found, QUICK_PROMPTS) if options.quick else found


def gsm8k_of(options: Any, learned: Container[str]) -> list[Dialogue]:
    if options.gsm8k is None:
        raise LeftOut("no questions of GSM8K were given (`--gsm8k`)")
    return [one for one in read_dialogues(options.gsm8k) if one.fingerprint not in learned]


@dataclass(frozen=True)
class Tokens(Dialogue):
    """A conversation of one turn, whose tokens are given."""

    input_ids: Tensor

    def prompt(self, tokenizer: Any, answers: Sequence[str] = ()) -> Prompt:
        return Prompt(self.name, self.input_ids)

    @property
    def fingerprint(self) -> str:
        return "random"


def warm_up(bench: Bench, arms: Mapping[str, Method], prompt: Prompt) -> None:
    """Let every arm compile and allocate; afterwards policies and memories begin anew."""
    for method in arms.values():
        bench.decode(prompt, method, max_new_tokens=_WARM_UP_TOKENS)
        keywords = method.keywords if isinstance(method, Generate) else {}
        if isinstance(policy := keywords.get("policy"), Kept):
            policy.renew()
        if isinstance(sources := keywords.get("assistant_model"), list) and method.name != USELESS_MEMORY:
            sources[-1].clear()


@dataclass(frozen=True, slots=True)
class Process:
    """One process of an experiment, and what it asks.

    Attributes:
        experiment: says what is compared.
        number: of the process; also the seed.
        bench: answers single prompts, and keeps them in `journal`.
        journal: keeps groups as notes.
        arms: by name; the first of the experiment is what the texts of the others are compared with.
        asked: prompts.
        tokenizer: of the target; `None` for random prompts.
        right: the number that answers each question, of GSM8K.
    """

    experiment: Experiment
    number: int
    bench: JournaledBench
    journal: Journal
    arms: Mapping[str, Method]
    asked: Sequence[Dialogue]
    tokenizer: Any
    right: Mapping[str, float | None]

    def answers(self) -> Iterator[list[dict[str, Any]]]:
        """Yield the rows of each turn, or group: by all arms in an order drawn for prompt and process."""
        experiment, size = self.experiment, self.experiment.batch
        if size > 1:
            for start in range(0, len(self.asked) - size + 1, size):
                yield self._together([one.prompt(self.tokenizer) for one in self.asked[start : start + size]])
            return
        methods, base = list(self.arms.values()), experiment.arms[0]
        session = Session(
            self.bench, self.tokenizer, self.asked, methods, (experiment.temperature,), (self.number,), base
        )
        for prompt, runs in session.run():
            texts = {run.timing.method: run.token_ids.tolist() for run in runs}
            yield [row_of(run) | self._judged(run.timing.method, prompt, texts, base) for run in runs]

    def _together(self, group: Sequence[Prompt]) -> list[dict[str, Any]]:
        """Answer first turns in one call: a timed group is one request, a text that is judged has its own row."""
        experiment, found = self.experiment, {}
        for name in random.Random(f"{self.number} {group[0].name}").sample(list(self.arms), len(self.arms)):
            key = f"{group[0].name} {name}"
            if key not in self.journal.notes:
                told = together(self.bench, group, self.arms[name], self.number, experiment.temperature)
                self.journal.note(key, told)
            found[name] = self.journal.notes[key]
        if experiment.is_timed:
            return [row for row, _ in found.values()]
        return [
            {"arm": arm, "prompt": prompt.name, "turn": 1, "tokens": len(own[arm])}
            | self._judged(arm, prompt, own, experiment.arms[0])
            for place, prompt in enumerate(group)
            for own in [{name: texts[place] for name, (_, texts) in found.items()}]
            for arm in own
        ]

    def _judged(self, arm: str, prompt: Prompt, texts: Mapping[str, list[int]], base: str) -> dict[str, Any]:
        """Compare a text with that of the first arm, and as the experiment asks."""
        own, other = texts[arm], texts[base]
        told: dict[str, Any] = {"same": own == other}
        if self.experiment.kind == ANSWERS:
            text = self.tokenizer.decode(own, skip_special_tokens=True)
            told["right"] = last_number(text) == self.right[prompt.name]
        if self.experiment.kind == TEXTS and own != other:
            told |= difference(self.bench.target, prompt, other, own, exact="exact" in arm)
        return told


def row_of(run: Run) -> dict[str, Any]:
    """Return an answer as a row; `steps` counts those after the prefill by "nodes/accepted"."""
    timing, steps = run.timing, run.steps[1:]
    counted = Counter(f"{step.verified}/{step.accepted_total}" for step in steps)
    return {
        "arm": timing.method,
        "prompt": timing.prompt,
        "turn": timing.turn,
        "tokens": timing.tokens,
        "forwards": timing.target_forwards,
        "seconds": timing.seconds,
        "first": timing.prefill_seconds,
        "draft": sum(step.draft_seconds for step in steps),
        "verify": sum(step.verify_seconds for step in steps),
        "steps": dict(counted),
    }


def together(
    bench: Bench, group: Sequence[Prompt], method: Method, number: int, temperature: float
) -> tuple[dict[str, Any], list[list[int]]]:
    """Answer a group in one call, again after one in which something was compiled; its row, and the texts.

    Forwards are counted by row.
    """
    assert isinstance(method, Generate)
    ids, mask = left_padded([prompt.input_ids for prompt in group])
    ends = end_ids(bench.target)
    while True:
        torch.manual_seed(number)
        started = time.perf_counter()
        out = bench.target.generate(
            ids, attention_mask=mask, max_new_tokens=bench.max_new_tokens, pad_token_id=min(ends, default=0),
            return_dict_in_generate=True, **method.keywords, **sampling(temperature),
        )  # fmt: skip
        seconds, report = time.perf_counter() - started, getattr(out, "speculation", None)
        if report is None or not report.compile_seconds:
            break
    texts = [up_to_end(row, ends) for row in out.sequences[:, ids.shape[1] :].tolist()]
    tokens = sum(map(len, texts))
    forwards = tokens if report is None else sum(step.decoded_rows for step in report.steps)
    about = {"arm": method.name, "prompt": f"{group[0].name} and {len(group) - 1} more", "turn": 1}
    return about | {"tokens": tokens, "forwards": forwards, "seconds": seconds}, texts


def difference(
    target: Any, prompt: Prompt, base: Sequence[int], other: Sequence[int], *, exact: bool
) -> dict[str, Any]:
    """Return where two greedy texts differ first, the gap of the logits there, and whether rounding explains it."""
    ids = (torch.tensor(text, dtype=torch.long) for text in (base, other))
    found = explain_divergence(target, prompt.input_ids, *ids, invariant=exact)
    if found is None:
        return {}
    return {"position": found.position, "gap": found.gap, "explained": found.explained}


def sampled(
    bench: Bench, journal: Journal, arms: Mapping[str, Method], asked: Sequence[Dialogue], tokenizer: Any
) -> Iterator[dict[str, Any]]:
    """Yield samples of each arm and prompt, with seeds that no other arm has: equal seeds would give equal texts.

    Stock's are rows of a batch, which are drawn apart; ours are written one by one, because in a batch we draft less.
    """
    for one in tqdm(asked, desc="Sampling"):
        prompt = one.prompt(tokenizer)
        for place, (name, method) in enumerate(arms.items()):
            size = 1 if method.reports_steps else min(_SAMPLED_AT_ONCE, SAMPLED)
            seeds = range(place * SAMPLED, (place + 1) * SAMPLED, size)
            if (key := f"{prompt.name} {name}") not in journal.notes:
                drawn = [together(bench, [prompt] * size, method, seed, 1.0)[1] for seed in seeds]
                journal.note(key, [text for texts in drawn for text in texts])
            for ids in journal.notes[key]:
                yield {"arm": name, "prompt": prompt.name, "ids": ids + [-1] * (bench.max_new_tokens - len(ids))}


def held(experiment: Experiment, models: Models, arms: Mapping[str, Method], options: Any) -> Iterator[dict[str, Any]]:
    """Yield the most memory that a process of each arm ever held, which decodes a few prompts and nothing else."""
    given = experiment, models.folders["target"], models.folders["head"], torch.get_num_threads()
    for arm in arms:
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            peak = process.submit(decoding_mib, arm, *given).result()
        yield {"arm": arm, "prompt": "all", "turn": 1, "tokens": 1, "seconds": 1.0, "mib": peak}


def decoding_mib(arm: str, experiment: Experiment, target: str, head: str, threads: int) -> int | None:
    """Decode in this process; return the most memory that it ever held: code, weights and caches."""
    torch.set_num_threads(threads)
    tokenizer = AutoTokenizer.from_pretrained(target)
    if arm in OPENVINO:  # which needs to know the target alone
        model: Any = Namespace(name_or_path=target, device=torch.device("cpu"), dtype=torch.bfloat16)
        (method,) = (peer for peer in load_peers(["openvino"], model) if peer.name == arm)
    else:
        kind, arm = FEW_BITS.get(arm, ("", arm))
        model = load_quantized(target, kind) if kind else attach(load_target(target, "bfloat16", "cpu"))
        if arm == AUTO:
            method = compiled(*policies(load_source(head, model), {AUTO: "auto"}))
        else:
            method = plain() if arm == STOCK else compiled(plain_steps())
    for dialogue in spread(read_dialogues(str(OURS)), experiment.each):
        prompt = dialogue.prompt(tokenizer).input_ids[None]
        method.prepare(model, prompt, experiment.tokens, 0.0, [tokenizer.eos_token_id])()
    return peak_mib(torch.device("cpu"))


def best_fixed(experiment: Experiment, models: Models, options: Any) -> TreeShape:
    """Find the fixed tree that is fastest on other prompts; once for all processes, with this code."""
    about = [experiment.target, experiment.drafts, experiment.batch, experiment.temperature]
    about += [code()["code_sha256"], options.quick]
    file = options.work / "best_fixed.json"
    known = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    if (key := json.dumps(about)) not in known:
        others = searched_prompts(options)
        bench, timings = Bench(models.target, _SEARCH_TOKENS), {}
        tried = candidates(experiment, models)
        if options.quick:
            tried, others = dict(list(tried.items())[::6]), others[:2]
        asked = [one.prompt(models.tokenizer) for one in others]
        for shape, method in tqdm(tried.items(), desc="Looking for the best fixed tree"):
            timings[shape] = rate(timings_of(bench, asked, method, experiment))
        best = max(timings, key=lambda shape: timings[shape])
        known[key] = [best.total_tokens, best.depth, best.top_k, best.lookup]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(known, indent=1), "utf-8")
    return TreeShape(*known[key])


def timings_of(bench: Bench, asked: Sequence[Prompt], method: Method, experiment: Experiment) -> Iterator[Timing]:
    """Yield the timing of each prompt, or of each group where the experiment asks a batch."""
    size = experiment.batch
    if size == 1:
        found = (bench.decode(prompt, method, 0, experiment.temperature).timing for prompt in asked)
        yield from (Timing(one.tokens, one.seconds) for one in found)
    for start in range(0, len(asked), size) if size > 1 else ():
        row, _ = together(bench, asked[start : start + size], method, 0, experiment.temperature)
        yield Timing(row["tokens"], row["seconds"])


def searched_prompts(options: Any) -> list[Dialogue]:
    """Return other prompts than the protocol's: of EAGLE's sets, or of the demo."""
    if options.sets and options.sets != options.prompts:
        each = -(-_SEARCHED // len(EAGLE_SETS))
        return read_prompts(options.sets, each)[:_SEARCHED]
    return read_dialogues(DEMO_PROMPTS)


def right_answers(file: str) -> dict[str, float | None]:
    """Return the number that answers each question of a file of GSM8K, by the names that `read_dialogues` gives."""
    told = (row["answer"] if "answer" in row else row["reference"][0] for row in read_rows(Path(file)))
    return {f"{Path(file).stem}/{number}": last_number(answer) for number, answer in enumerate(told)}


def last_number(text: str) -> float | None:
    """Return the number after `####`, or the last one of a text."""
    found = _NUMBER.findall(text.rpartition("####")[2])
    return float(found[-1].replace(",", "").rstrip(".")) if found else None


@contextmanager
def noise(wanted: bool) -> Iterator[None]:
    """Keep a processor busy in bursts from another process, if wanted."""
    if not wanted:
        yield
        return
    program = (
        "import time\nwhile True:\n"
        f"    until = time.monotonic() + {_BURST}\n"
        "    while time.monotonic() < until: pass\n"
        f"    time.sleep({_PAUSE})\n"
    )
    neighbour = subprocess.Popen([sys.executable, "-c", program])
    try:
        yield
    finally:
        neighbour.kill()
        neighbour.wait()
