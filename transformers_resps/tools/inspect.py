"""`resps inspect`: record the steps of one call of `generate`, and show them as an HTML page."""

import argparse
import base64
import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils.logging import tqdm

from ..data import to_tokens
from ..drafting import DraftSource
from ..generation.attach import attach
from ..generation.keywords import SpeculationDefaults
from ..policies.auto import default_policy
from ..policies.base import Level, Observation, Policy, PolicyWrapper
from ..policies.fixed import FixedPolicy
from ..telemetry.display import Decode, decode_after, decoder, detokenize_incrementally, moving
from ..telemetry.report import SpeculationReport, StepRecord
from ..testing import Divergence, explain_divergence
from ..testing.divergence import HALF_PRECISIONS, first_difference
from ..tree import DRAFTED, LOOKED_UP, REMEMBERED, DraftTree, TreeShape
from .loading import load_policy, load_source, load_target
from .results import machine


_SOURCES = {DRAFTED: "head", LOOKED_UP: "lookup", REMEMBERED: "memory"}
_Json: TypeAlias = dict[str, Any]  # an object of the page's data


@dataclass(slots=True)
class RecordedStep:
    """One decoding step after the prefill. The first four fields are copied from the policy's `Observation`."""

    context_length: int
    step: int
    room: int
    prefix_accept_probs: list[float]
    chosen: TreeShape  # the shape that the policy chose; the tree may be smaller
    levels: int = 0  # number of levels that the head drafted
    tree: DraftTree = field(init=False)
    path: list[int] = field(init=False)  # accepted nodes, root first
    record: StepRecord = field(init=False)

    @property
    def sources(self) -> list[str]:
        """The proposer of each node: "head", "lookup", "memory", or "both" for several; "root" for the root."""
        flags = self.tree.proposers[0] if self.tree.proposers else [DRAFTED] * self.tree.node_count
        return ["root", *(_SOURCES.get(own, "both") for own in flags[1 : self.tree.node_count])]


class StepRecorder(PolicyWrapper):
    """A policy that returns the choices of `policy`, and records every step of a call with one prompt."""

    uses_lookup = True  # so that steps record how likely lookup is, even if the policy uses no lookup

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy)
        self.steps: list[RecordedStep] = []

    def __repr__(self) -> str:
        return repr(self.policy)

    def choose(self, observation: Observation) -> TreeShape:
        context, step, room = observation.context_length, observation.step, observation.room
        probs = list(observation.prefix_accept_probs())
        chosen = self.policy.choose(observation)
        self.steps.append(RecordedStep(context, step, room, probs, chosen))
        return chosen

    def grow(self, level: Level) -> bool:
        grows = self.policy.grow(level)
        self.steps[-1].levels = level.depth + bool(grows)
        return grows

    def size(self, scores: Tensor, levels: Tensor) -> int | Sequence[int]:
        self.steps[-1].levels = int(levels[-1])
        return self.policy.size(scores, levels)

    def on_verified(self, tree: DraftTree, path: Tensor, tokens: Tensor) -> None:
        self.steps[-1].tree, self.steps[-1].path = tree, path[0].tolist()
        self.policy.on_verified(tree, path, tokens)

    def observe(self, record: StepRecord) -> None:
        self.steps[-1].record = record
        self.policy.observe(record)


@dataclass(frozen=True, slots=True)
class Examination:
    """The plain and the speculative answer to one prompt, and the steps of the speculative answer."""

    prompt_ids: Tensor  # [s]
    plain_ids: Tensor  # [t]
    plain_seconds: float  # seconds of the whole plain call
    report: SpeculationReport
    seconds: float  # seconds of the whole call with draft trees
    steps: list[RecordedStep]  # one for each of `report.steps` except the prefill
    divergence: Divergence | None  # first difference and its reason; `None` if the answers are sampled or equal
    is_invariant: bool = False  # whether both answers used the invariant mode

    @property
    def parts_at(self) -> int | None:
        """Index of the first token that differs; `None` if the answers are equal."""
        return first_difference(self.plain_ids.tolist(), self.report.answers[0])


def examine(
    target: PreTrainedModel,
    head: DraftSource | None,
    policy: Policy,
    prompt_ids: Tensor,
    *,
    settings: dict[str, Any],
    seed: int = 0,
) -> Examination:
    """Answer a prompt `[s]` plainly, then with draft trees. The global random generator is restored.

    `settings` are keywords of `generate` for both answers; the default is greedy search.
    """
    settings = {"do_sample": False} | settings

    def answer(**keywords: Any) -> tuple[Any, Tensor, float]:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            started = time.perf_counter()
            ids = prompt_ids[None].to(target.device)
            call: Any = target
            output = call.generate(
                ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, **settings, **keywords
            )
            tokens = output.sequences[0, len(prompt_ids) :].cpu()  # waits for the device
            return output, tokens, time.perf_counter() - started

    recorder = StepRecorder(policy)
    with SpeculationDefaults.suspended():
        _, plain_ids, plain_seconds = answer()
        output, own_ids, seconds = answer(assistant_model=head, policy=recorder)
    is_invariant, divergence = bool(settings.get("invariant")), None
    if not settings["do_sample"]:
        divergence = explain_divergence(target, prompt_ids, plain_ids, own_ids, invariant=is_invariant)
    report, steps = output.speculation, recorder.steps
    return Examination(prompt_ids, plain_ids, plain_seconds, report, seconds, steps, divergence, is_invariant)


def facts_of(target: PreTrainedModel, head: DraftSource | None, policy: Policy, decoding: str) -> dict[str, str]:
    """Return a page's facts on models, machine and `decoding` (a text), without local paths: users share pages."""
    here = machine(target)
    threads = f", {here['threads']} threads" if target.device.type == "cpu" else ""
    facts = {"target": _name(target, target.config.name_or_path)}
    if head is not None:
        facts["head"] = f"{_name(head, head.identity()['name_or_path'])} ({type(head).__name__})"
    return facts | {
        "policy": str(policy),
        "decoding": decoding,
        "dtype": here["dtype"],
        "device": here["device"] + threads,
        "versions": ", ".join(f"{name} {number}" for name, number in here["versions"].items()),
    }


def _name(model: object, known: str | None) -> str:
    """Return a model's name to print: `known`, shortened to the last part if a local path; its class if `None`."""
    name = known or type(model).__name__
    return Path(name).resolve().name if Path(name).exists() else name


def page_data(examination: Examination, decode: Decode, prompt: str, facts: dict[str, str]) -> _Json:
    """Return the page's data as JSON values; texts in them are not escaped yet."""
    report = examination.report
    written = detokenize_incrementally(report.answers[0], decode)
    steps, start = [], 0
    for record, own in zip(report.steps, [None, *examination.steps], strict=True):
        texts = written[start : start + record.emitted[0]]
        accepted = [] if own is None else [own.sources[node] for node in own.path[1:]]
        sources = [*accepted[: len(texts) - 1], "target"]
        step: _Json = {
            "tokens": [{"text": text, "source": source} for text, source in zip(texts, sources, strict=False)],
            "drafted": record.drafted,
            "verified": record.verified,
            "seconds": {"draft": record.draft_seconds, "verify": record.verify_seconds, "rest": record.rest_seconds},
        }
        if own is not None:
            before_root = report.answers[0][start - 2] if start > 1 else int(examination.prompt_ids[-1])
            step |= _decision(own) | {"nodes": _nodes(own, decode, before_root)}
        steps.append(step)
        start += record.emitted[0]
    totals = {
        "emitted": report.emitted_total,
        "forwards": report.target_forwards,
        "tau": report.tau,
        "rate": report.emitted_total / examination.seconds if examination.seconds else 0.0,
        "plainRate": len(examination.plain_ids) / examination.plain_seconds if examination.plain_seconds else 0.0,
        "draft": sum(step.draft_seconds for step in report.steps),
        "verify": sum(step.verify_seconds for step in report.steps),
        "rest": sum(step.rest_seconds for step in report.steps),
    }
    return {
        "prompt": prompt,
        "promptTokens": len(examination.prompt_ids),
        "facts": facts,
        "totals": totals,
        "sameText": _same_text(examination, decode),
        "steps": steps,
    }


def _same_text(examination: Examination, decode: Decode) -> _Json:
    """Return the page's entry that says whether both texts are equal, or where they first differ."""
    position, divergence = examination.parts_at, examination.divergence
    if position is None:
        return {"same": True}
    told: _Json = {"same": False, "position": position}
    for name, answer in (("plain", examination.plain_ids.tolist()), ("own", examination.report.answers[0])):
        told[name] = decode([answer[position]]) if position < len(answer) else None
    if divergence is not None and math.isfinite(divergence.gap):
        told |= {name: getattr(divergence, name) for name in ("gap", "spacing", "explained")}
        told["dtype"] = str(divergence.dtype).removeprefix("torch.")
    return told


def _decision(step: RecordedStep) -> _Json:
    sources = Counter(step.sources)
    return {
        "seen": {
            "context": step.context_length,
            "decision": step.step,
            "room": step.room,
            "prefix_accept_probs": step.prefix_accept_probs,
        },
        "chosen": _shape(step.chosen),
        "cut": None if step.record.shape == step.chosen else _shape(step.record.shape),
        "levels": step.levels,
        "headNodes": sources["head"] + sources["both"],
        "lookupNodes": sources["lookup"],
        "memoryNodes": sources["memory"],
    }


def _shape(shape: TreeShape) -> _Json:
    nodes = shape.total_tokens if shape.asks_head else 1
    return {"name": str(shape), "nodes": nodes, "depth": shape.depth, "topK": shape.top_k, "lookup": shape.lookup}


def _nodes(step: RecordedStep, decode: Decode, before_root: int) -> list[_Json]:
    """Describe each node, root first: text, parent, depth, probabilities, source, and whether it was accepted."""
    tree = step.tree
    tokens, parents, depths = (field[0].tolist() for field in (tree.tokens, tree.parents, tree.depths))
    probs = tree.scores[0].exp().tolist()  # of the path from the root to each node
    return [
        {
            "text": decode_after(before_root if node == 0 else tokens[parent], token, decode),
            "parent": parent,
            "depth": depth,
            "path": probs[node],
            "probability": probs[node] / probs[parent] if probs[parent] else None,
            "source": source,
            "accepted": node in step.path,
        }
        for node, (token, parent, depth, source) in enumerate(zip(tokens, parents, depths, step.sources, strict=True))
    ]


def page(data: _Json) -> str:
    """Return an HTML page that shows `data`, made by `page_data`. The page loads no other file.

    No text in the data can run as code: the JSON is escaped so that it cannot close its script element, the script
    inserts values as text only, and a content security policy allows only this style and script, by their hashes.
    """
    style, script, html = (
        files(__package__).joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js", "page.html")
    )
    return Template(html).substitute(
        title=escape(f"{data['facts']['target']}, step by step"),
        style_hash=_hash(style),
        script_hash=_hash(script),
        style=style,
        script=script,
        data=_json(data),
        prompt=escape(data["prompt"]),
        answer=escape("".join(token["text"] for step in data["steps"] for token in step["tokens"])),
    )


def _json(value: _Json) -> str:
    """Return JSON that is safe in a script element: ASCII without HTML's special characters."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _hash(text: str) -> str:
    """Return the hash of the text in a script or style element, in the form that a content security policy needs."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def run(args: argparse.Namespace) -> int:
    """Answer the prompt twice and write the page; return 1 if the answers differ by more than rounding, else 0."""
    if not args.prompt.strip():
        raise ValueError("`--prompt` is empty. Pass a question in quotes.")
    args.output.parent.mkdir(parents=True, exist_ok=True)  # to fail now, not after minutes
    target = attach(load_target(args.target, args.dtype, args.device, quantization=args.quantization))
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    head = load_source(args.head, target)
    named = load_policy(args.policy, head)
    policy = default_policy() if isinstance(named, str) else named
    prompt_ids = to_tokens([{"role": "user", "content": args.prompt}], tokenizer)
    settings: dict[str, Any] = {"max_new_tokens": args.max_new_tokens, "invariant": args.invariant}
    if args.temperature > 0:
        settings |= {"do_sample": True, "temperature": args.temperature}
    drafting = default_policy() if head is None else FixedPolicy(head.default_shape)
    examine(target, head, drafting, prompt_ids, settings=settings | {"max_new_tokens": 4})  # allocate and compile
    both = 2 * args.max_new_tokens
    bar = tqdm(desc="Answering twice", total=both, unit="token", disable=None)
    with bar, moving(bar, target, both, both):
        examination = examine(target, head, policy, prompt_ids, settings=settings, seed=args.seed)
    decoding = f"temperature {args.temperature:g}, seed {args.seed}" if args.temperature > 0 else "greedy"
    facts = facts_of(target, head, policy, decoding + (", invariant" if args.invariant else ""))
    args.output.write_text(page(page_data(examination, decoder(tokenizer), args.prompt, facts)), encoding="utf-8")
    print(f"{examination.report}\nSame text as plain decoding: {same_text(examination)}.\nThe page: {args.output}")
    return 0 if is_explained(examination, target.dtype) else 1


def same_text(examination: Examination) -> str:
    """Return "yes" if both answers are equal, or describe their first difference."""
    if examination.parts_at is None:
        return "yes"
    why = f" ({examination.divergence})" if examination.divergence is not None else ""
    return f"no, they differ from token {examination.parts_at + 1}{why}"


def is_explained(examination: Examination, dtype: torch.dtype) -> bool:
    """Whether both texts are equal or may differ by rounding, as sampled texts in half precision always may."""
    if examination.parts_at is None or examination.is_invariant:
        return examination.parts_at is None
    divergence = examination.divergence
    return dtype in HALF_PRECISIONS if divergence is None else divergence.explained
