"""Sentences of a card that combine several facts."""

from collections.abc import Sequence
from typing import Any

from transformers_resps import TreeShape

from .artefact import Artefact


_PLOTS = {
    "costs.png": "What a target forward costs, by the number of nodes that it verifies.",
    "ratios.png": "Speed relative to plain decoding, with 95% intervals, by benchmark.",
    "sizes.png": "How many nodes each policy verified, by step of the output.",
    "tau.png": "Tokens per target forward (tau), by the mean number of nodes verified.",
    "time.png": "Milliseconds per token, and what they are spent on.",
}
_POLICIES = {
    "fixed": "It uses the same tree at every step.",
    "resps": "It reads the target's features, picks one of {shapes} tree shapes, and keeps it for {persistence} "
    "step{s} (Re-SpS).",
    "throughput": "At every step it weighs each node's expected gain against its cost on your machine.",
}


def short_name(name: str | None) -> str:
    """The last part of an id or path."""
    return name.rstrip("/").rpartition("/")[2] if name else "its target"


def joined(items: Sequence[Any]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    words = [str(item) for item in items]
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def about_policy(artefact: Artefact) -> str:
    """What a policy does, and what it was made for."""
    config = artefact.config
    guarded = " A guard stops drafting while it loses time." if config["policy_type"] == "guard" else ""
    config = config["policy"] if guarded else config
    steps = config.get("persistence", 1)
    kind = _POLICIES.get(config["policy_type"], f"A policy of type `{config['policy_type']}`.") + guarded
    what = kind.format(shapes=len(config.get("grid") or ()), persistence=steps, s="" if steps == 1 else "s")
    made = f" It was made for {short_name(artefact.target)} with the head {artefact.head}." if artefact.head else ""
    return f"A policy decides how large the draft tree of each step is. {what}{made} It never changes the output."


def use(artefact: Artefact, name: str) -> str:
    """The code that a user copies, with and without `attach`."""
    target = artefact.target or "TARGET"
    head = (artefact.head or "HEAD") if artefact.is_policy else name
    imports = "AutoPolicy, DraftHead, attach" if artefact.is_policy else "DraftHead, attach"
    policy = "policy" if artefact.is_policy else '"auto"'
    lines = [
        "## Use it",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        f"from transformers_resps import {imports}",
        "",
        f'model = attach(AutoModelForCausalLM.from_pretrained("{target}", dtype="auto"))',
        f'head = DraftHead.from_pretrained("{head}", target=model)',
        *([f'policy = AutoPolicy.from_pretrained("{name}")'] if artefact.is_policy else []),
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{target}")',
        'inputs = tokenizer("The quick brown fox", return_tensors="pt")',
        f"out = model.generate(**inputs, assistant_model=head, policy={policy}, max_new_tokens=256)",
        "```",
        "",
        f'Without `attach`, pass `custom_generate="{name}", trust_remote_code=True` to `generate` as well. '
        "transformers-resps must be installed.",
    ]
    return "\n".join(lines)


def about_trees(artefact: Artefact) -> str:
    """Which tree the code of `use` decodes with, and how trees are written."""
    written = "Trees are written total_tokens/depth/top_k, then + the nodes that prompt lookup may add. "
    written += "EAGLE-3 counts one level of depth less."
    if not (tree := artefact.config.get("default_tree")):
        return written
    shape = f"{TreeShape(*tree)}, which is `TreeShape({', '.join(map(str, tree))})`"
    return f'The code above passes `policy="auto"`. Without it, the default tree is used: {shape}. {written}'


def caption(plot: str) -> str:
    """One sentence about a plot; of one that `resps bench` does not draw, its name."""
    return _PLOTS.get(plot, plot.removesuffix(".png").replace("_", " "))


def simulated_tree(name: str) -> str:
    """A tree of `metrics.json` as it was simulated, without the lookup nodes that older files name: `8/3/4`."""
    return "/".join(name.split("/")[:3])


def training_cost(training: dict[str, Any]) -> str:
    """Size and duration of a training, as far as the run recorded them."""
    amounts = [
        f"{training[name]:,} {unit}"
        for name, unit in (("steps", "steps"), ("positions", "positions"), ("texts", "texts"))
        if name in training
    ]
    if "epochs" in training:
        amounts.append(f"{training['epochs']:.1f} epochs")
    if "minutes" in training:
        amounts.append(f"{training['minutes']:,.0f} minutes")
    if not amounts:
        return ""
    dtype = f", in {training['dtype']}" if "dtype" in training else ""
    return ", ".join(amounts) + dtype + (f" on {training['device']}." if "device" in training else ".")
