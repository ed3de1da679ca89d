"""Render the card of a head or a policy from its files. What no file says is not in a card."""

from collections.abc import Callable
from typing import Any

from ..hub import GENERAL_TAGS, METRICS, RESULTS, front_matter
from .artefact import RECIPE, Artefact
from .citations import CITATIONS
from .results_table import circumstances, dataset_table, overall_table, sampling
from .wording import about_policy, joined, short_name, training_cost, use


def render_card(artefact: Artefact, name: str) -> str:
    """The whole card.

    Args:
        artefact: its facts; a section without facts is left out.
        name: what a user passes to `from_pretrained`: the repository's id, or a folder.
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
        f"An EAGLE-3 head: it proposes the tokens that {target} is about to write, and the target checks a whole tree "
        "of them in one forward. The text is the target's own: token for token in float32; in bfloat16 and float16 a "
        "tree's forward rounds differently, and a near-tie between two tokens may fall the other way."
    )


def _results(artefact: Artefact) -> str:
    results = artefact.results
    if not results:
        return (
            "## How fast\n\nNot measured yet. `resps bench TARGET HEAD --dataset PROMPTS` measures it on your machine."
        )
    parts = [
        "## How fast",
        results["advice"],
        overall_table(results),
        f"{circumstances(results)} Every single measurement is in `{RESULTS}`. Whether a tree pays depends on the "
        "machine: measure on yours.",
    ]
    if by_dataset := dataset_table(results):
        parts += ["Ratio to plain, and tau in brackets:", by_dataset]
    parts += [f"![{plot.removesuffix('.png').replace('_', ' ')}]({plot})" for plot in artefact.plots]
    return "\n\n".join(parts)


def _held_out(metrics: dict[str, Any]) -> str:
    """What training measured on texts that it did not see."""
    parts = []
    if agreement := metrics.get("agreement"):
        parts += [
            f"Top-1 agreement with the target's own pick, teacher-forced on {metrics['held_out_texts']} texts that "
            "were not trained on, by draft level:",
            f"| {' | '.join(agreement)} |\n|{'---:|' * len(agreement)}\n"
            f"| {' | '.join(f'{value:.3f}' for value in agreement.values())} |",
        ]
    if tau := metrics.get("simulated_tau"):
        trees = joined([f"{value:.2f} with the tree {tree}" for tree, value in tau.items()])
        parts.append(
            f"Simulated tokens per target forward on {metrics['tau_texts']} of them: {trees} "
            "(total_tokens/depth/top_k, and where there is a fourth number, nodes looked up)."
        )
    if (coverage := metrics.get("coverage")) is not None:
        parts.append(
            f"The {metrics['draft_vocab_size']:,} tokens that the head can propose cover {coverage:.2%} of the "
            "answers."
        )
    if gain := metrics.get("gain_over_best_fixed"):
        parts.append(
            f"On {metrics['held_out_texts']} recorded answers that were not trained on, at the costs measured on the "
            f"training machine: {metrics['tokens_per_second']:.1f} tokens/s, {gain:.3f} times the best fixed tree "
            f"({metrics['best_fixed_tokens_per_second']:.1f}). The fastest possible sequence of shapes would save "
            f"{metrics['oracle_regret'] / (1 + metrics['oracle_regret']):.1%} of its time."
        )
    if (picked := metrics.get("distinct_actions")) is not None:
        parts.append(f"On them it picked {picked} of its shapes.")
    return "\n\n".join([f"## On held-out texts (`{METRICS}`)", *parts]) if parts else ""


def _training(artefact: Artefact) -> str:
    said, parts = artefact.said, []
    if cost := training_cost(artefact.metrics.get("training") or {}):
        parts.append(cost)
    if said.get("method"):
        parts.append(str(said["method"]))
    if artefact.recipe:
        parts.append(f"The exact settings are in `{RECIPE}`.")
    data = [f"- {item['name']} ({item['license']}): {item['what']}" for item in said.get("data") or ()]
    if data:
        parts.append("Data:\n\n" + "\n".join(data))
    return "\n\n".join(["## How it was made", *parts]) if parts else ""


def _limits(artefact: Artefact) -> str:
    said, results = artefact.said, artefact.results
    lines = []
    if said.get("languages"):
        lines.append(f"Languages: {joined(said['languages'])}. In others fewer drafts will be accepted.")
    if results:
        lines.append(f"Measured {sampling(results)}; other temperatures were not measured.")
    if results or artefact.config.get("dtype"):
        kept = f"Stored in {artefact.config['dtype']}" if artefact.config.get("dtype") else ""
        lines.append("; ".join(filter(None, [kept, f"measured in {results['dtype']}" if results else ""])) + ".")
    lines += said.get("limits") or ()
    lines.append(f"For {artefact.target or 'its target'} only: another target, a fine-tune too, is another artefact.")
    lines.append("It decides how fast the target writes, not what: limits and biases of the text are the target's.")
    return "## Limits\n\n" + "\n".join(f"- {line[0].upper()}{line[1:]}" for line in lines)


def _licences(artefact: Artefact) -> str:
    said = artefact.said
    if not said.get("license"):
        return ""
    kind = "Policy" if artefact.is_policy else "Head"
    data = [f"{item['name']}: {item['license']}" for item in said.get("data") or ()]
    parts = [f"{kind}: {said['license']}", f"{artefact.target}: {said.get('target_license', 'unknown')}", *data]
    return f"## Licences\n\n{'; '.join(parts)}."
