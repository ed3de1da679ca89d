"""Render the card of a head or a policy from its files alone."""

from collections.abc import Callable
from typing import Any

from transformers_resps.hub import GENERAL_TAGS, METRICS, RESULTS, front_matter

from .artefact import RECIPE, Artefact
from .card_text import about_policy, about_trees, caption, joined, short_name, simulated_tree, training_cost, use
from .citations import CITATIONS
from .results_table import circumstances, dataset_table, overall_table, sampling


def render_card(artefact: Artefact, name: str) -> str:
    """Render the card; a section without facts is left out.

    Args:
        artefact: the folder.
        name: what a user passes to `from_pretrained`: a Hub id or a folder.
    """
    said = artefact.said
    sections: list[Callable[[], str]] = [
        lambda: use(artefact, name),
        lambda: _results(artefact),
        lambda: _held_out(artefact.metrics),
        lambda: _training(artefact),
        lambda: _limits(artefact),
        lambda: _licences(artefact),
        lambda: CITATIONS,
    ]
    head = front_matter(
        artefact.target_id,
        ["eagle3", *(["draft-policy"] if artefact.is_policy else ["draft-head"]), *GENERAL_TAGS],
        license=said.get("license"),
        languages=said.get("languages") or (),
        datasets=[data["hub_id"] for data in said.get("data") or () if "hub_id" in data],
    )
    body = "\n\n".join(filter(None, (section() for section in sections)))
    return f"{head}\n{_title(artefact)}\n\n{body}\n"


def _title(artefact: Artefact) -> str:
    target = short_name(artefact.target)
    if artefact.is_policy:
        return f"# A policy for {target}\n\n{about_policy(artefact)}"
    return (
        f"# A draft head for {target}\n\n"
        f"An EAGLE-3 draft head: it proposes the next tokens of {target}, and the target verifies a whole tree of "
        "them in one forward. In float32 the output is the target's own, token for token. In bfloat16 and float16 a "
        "forward over several tokens rounds differently, so a near-tie between two tokens can go the other way."
    )


def _results(artefact: Artefact) -> str:
    results = artefact.results
    if not results:
        unmeasured = "Not measured yet. Run `resps bench TARGET HEAD --dataset PROMPTS` on your machine."
        return "\n\n".join(["## How fast", unmeasured, *([] if artefact.is_policy else [about_trees(artefact)])])
    parts = [
        "## How fast",
        results["advice"],
        overall_table(results),
        about_trees(artefact),
        f"{circumstances(results)} `{RESULTS}` has every measurement. The speed depends on the machine: measure on "
        "yours with `resps bench`.",
    ]
    if by_dataset := dataset_table(results):
        parts += ["By dataset, ratio to plain, with tau in brackets:", by_dataset]
    parts += [f"![{caption(plot)}]({plot})" for plot in artefact.plots]
    return "\n\n".join(parts)


def _held_out(metrics: dict[str, Any]) -> str:
    """What training measured on held-out data."""
    parts = []
    if agreement := metrics.get("agreement"):
        parts += [
            f"Top-1 agreement with the target by draft level, teacher-forced on {metrics['held_out_texts']} held-out "
            "sequences:",
            f"| {' | '.join(agreement)} |\n|{'---:|' * len(agreement)}\n"
            f"| {' | '.join(f'{value:.3f}' for value in agreement.values())} |",
        ]
    if tau := metrics.get("simulated_tau"):
        trees = joined([f"{value:.2f} with the tree {simulated_tree(tree)}" for tree, value in tau.items()])
        parts.append(
            f"Simulated mean acceptance length (tau) on {metrics['tau_texts']} of them: {trees}, "
            "without prompt lookup."
        )
    if (coverage := metrics.get("coverage")) is not None:
        parts.append(
            f"The draft vocabulary of {metrics['draft_vocab_size']:,} tokens covers {coverage:.2%} of the assistant "
            "tokens in the training data."
        )
    if gain := metrics.get("gain_over_best_fixed"):
        parts.append(
            f"On {metrics['held_out_texts']} recorded held-out sequences, with the costs of the training machine: "
            f"{metrics['tokens_per_second']:.1f} tokens/s, {gain:.3f} times the best fixed tree "
            f"({metrics['best_fixed_tokens_per_second']:.1f}). The oracle, the fastest sequence of shapes in "
            f"hindsight, takes {metrics['oracle_regret'] / (1 + metrics['oracle_regret']):.1%} less time."
        )
    if (picked := metrics.get("distinct_actions")) is not None:
        parts.append(f"On these sequences it picked {picked} of its shapes.")
    return "\n\n".join([f"## Evaluation on held-out data (`{METRICS}`)", *parts]) if parts else ""


def _training(artefact: Artefact) -> str:
    said, parts = artefact.said, []
    if cost := training_cost(artefact.metrics.get("training") or {}):
        parts.append(cost)
    if said.get("method"):
        parts.append(str(said["method"]))
    if artefact.recipe:
        parts.append(f"`{RECIPE}` has all settings.")
    data = [f"- {item['name']} ({item['license']}): {item['what']}" for item in said.get("data") or ()]
    if data:
        parts.append("Data:\n\n" + "\n".join(data))
    return "\n\n".join(["## How it was made", *parts]) if parts else ""


def _limits(artefact: Artefact) -> str:
    said, results = artefact.said, artefact.results
    lines = []
    if said.get("languages"):
        lines.append(f"Languages: {joined(said['languages'])}. In others fewer drafts are accepted.")
    if results:
        lines.append(f"Measured in `{RESULTS}`: {sampling(results)}. Other temperatures are not in this file.")
    if results or artefact.config.get("dtype"):
        kept = f"Stored in {artefact.config['dtype']}" if artefact.config.get("dtype") else ""
        lines.append("; ".join(filter(None, [kept, f"measured in {results['dtype']}" if results else ""])) + ".")
    lines += said.get("limits") or ()
    lines.append(f"For {artefact.target or 'its target'} only. Other models, also fine-tunes of it, need their own.")
    lines.append("It changes the speed, not the output. The output has the limits and biases of the target.")
    return "## Limits\n\n" + "\n".join(f"- {line[0].upper()}{line[1:]}" for line in lines)


def _licences(artefact: Artefact) -> str:
    said = artefact.said
    if not said.get("license"):
        return ""
    kind = "Policy" if artefact.is_policy else "Head"
    data = [f"{item['name']}: {item['license']}" for item in said.get("data") or ()]
    parts = [f"{kind}: {said['license']}", f"{artefact.target}: {said.get('target_license', 'unknown')}", *data]
    return f"## Licences\n\n{'; '.join(parts)}."
