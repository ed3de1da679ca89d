"""Turns an examination into JSON values: all that the page shows, texts not yet escaped."""

import math
from typing import Any

from ..telemetry.display import Decode, decode_after, detokenize_incrementally
from ..telemetry.report import StepRecord
from ..tree import TreeShape
from .examination import Examination
from .recorder import RecordedStep


def page_data(examination: Examination, decode: Decode, prompt: str, facts: dict[str, str]) -> dict[str, Any]:
    """Return what happened, in the words and numbers of the page.

    Args:
        examination: both answers.
        decode: writes tokens as text.
        prompt: as the user wrote it.
        facts: about models and machine, in the order of the page; `target` heads it.
    """
    report = examination.report
    written = detokenize_incrementally(report.answers[0], decode)
    previous = [int(examination.prompt_ids[-1]), *report.answers[0]]
    steps, start = [], 0
    for number, record in enumerate(report.steps):
        tokens = written[start : start + record.emitted[0]]
        step = _step(record, tokens)
        if number > 0:
            step |= _decision(examination.steps[number - 1])
            step["nodes"] = _nodes(examination.steps[number - 1], decode, previous[start - 1])
            _mark_sources(step)
        steps.append(step)
        start += record.emitted[0]
    return {
        "prompt": prompt,
        "promptTokens": len(examination.prompt_ids),
        "facts": facts,
        "totals": _totals(examination),
        "sameText": _same_text(examination, decode),
        "steps": steps,
    }


def _totals(examination: Examination) -> dict[str, float]:
    report = examination.report
    return {
        "emitted": report.emitted,
        "forwards": report.target_forwards,
        "tau": report.tau,
        "rate": report.emitted / examination.seconds if examination.seconds else 0.0,
        "plainRate": len(examination.plain_ids) / examination.plain_seconds if examination.plain_seconds else 0.0,
        "draft": sum(step.draft_seconds for step in report.steps),
        "verify": sum(step.verify_seconds for step in report.steps),
        "rest": sum(step.rest_seconds for step in report.steps),
    }


def _same_text(examination: Examination, decode: Decode) -> dict[str, Any]:
    """Say whether both texts are the same, and where they differ first."""
    position, found = examination.parts_at, examination.divergence
    if position is None:
        return {"same": True}

    def token_of(answer: list[int]) -> str | None:
        return decode([answer[position]]) if position < len(answer) else None

    told: dict[str, Any] = {
        "same": False,
        "position": position,
        "plain": token_of(examination.plain_ids.tolist()),
        "own": token_of(examination.report.answers[0]),
    }
    if found is not None and math.isfinite(found.gap):
        dtype = str(found.dtype).removeprefix("torch.")
        told |= {"gap": found.gap, "spacing": found.spacing, "dtype": dtype, "explained": found.explained}
    return told


def _step(record: StepRecord, tokens: list[str]) -> dict[str, Any]:
    return {
        "tokens": [{"text": text, "source": "head"} for text in tokens[:-1]]
        + [{"text": text, "source": "target"} for text in tokens[-1:]],
        "drafted": record.drafted,
        "verified": record.verified,
        "seconds": {"draft": record.draft_seconds, "verify": record.verify_seconds, "rest": record.rest_seconds},
    }


def _decision(step: RecordedStep) -> dict[str, Any]:
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
        "headNodes": step.head_nodes - 1,
        "lookupNodes": len(step.lookup_nodes),
    }


def _shape(shape: TreeShape) -> dict[str, Any]:
    return {
        "name": str(shape),
        "nodes": shape.total_tokens if shape.asks_head else 1,
        "depth": shape.depth,
        "topK": shape.top_k,
        "lookup": shape.lookup,
    }


def _nodes(step: RecordedStep, decode: Decode, before_root: int) -> list[dict[str, Any]]:
    """Return the nodes, root first: text, parent, probability after the parent and of the path, source, fate."""
    tree = step.tree
    tokens, parents, depths = (field[0].tolist() for field in (tree.tokens, tree.parents, tree.depths))
    paths = [math.exp(score) for score in tree.scores[0].tolist()]
    looked_up, shared, accepted = set(step.lookup_nodes), set(step.shared_nodes), set(step.path)
    probs = step.prefix_accept_probs
    for node in sorted(looked_up):  # the chain's own chance, as far as the track record reaches
        paths[node] = probs[depths[node] - 1] if depths[node] <= len(probs) else math.nan
    nodes = []
    for node, (token, parent, depth) in enumerate(zip(tokens, parents, depths, strict=True)):
        is_chance = node in looked_up and 1 < depth <= len(probs)
        before = 1.0 if depth <= 1 else probs[depth - 2] if is_chance else paths[parent]
        nodes.append(
            {
                "text": decode_after(before_root if node == 0 else tokens[parent], token, decode),
                "parent": parent,
                "depth": depth,
                "path": _finite(paths[node]),
                "probability": _finite(paths[node] / before if before else math.nan),
                "source": "lookup" if node in looked_up else "both" if node in shared else "head",
                "accepted": node in accepted,
            }
        )
    nodes[0]["source"] = "root"
    return nodes


def _mark_sources(step: dict[str, Any]) -> None:
    """Give accepted tokens the source of their node: the path's nodes come in the order of the tokens."""
    path = [node for node in step["nodes"][1:] if node["accepted"]]
    for token, node in zip(step["tokens"], path, strict=False):
        if token["source"] == "head":
            token["source"] = node["source"]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
