"""The sentences of a card that take more than one fact."""

from collections.abc import Sequence
from typing import Any

from .artefact import Artefact


_POLICIES = {
    "fixed": "The same draft tree at every step.",
    "resps": "At a decision it reads the target's features and picks one of {shapes} tree shapes, which it keeps for "
    "{persistence} step{s} (Re-SpS).",
    "throughput": "At every step it weighs each node against what it costs on your machine, and decodes plainly where "
    "a tree does not pay.",
}


def short_name(name: str | None) -> str:
    """The last part of an id or path."""
    return name.rstrip("/").rpartition("/")[2] if name else "its target"


def joined(items: Sequence[Any]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    words = [str(item) for item in items]
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def about_policy(artefact: Artefact) -> str:
    """What a policy does, and whose text it leaves as it is."""
    config = artefact.config
    guarded = " A guard decodes plainly while drafting does not pay." if config["policy_type"] == "guard" else ""
    config = config["policy"] if guarded else config
    steps = config.get("persistence", 1)
    kind = _POLICIES.get(config["policy_type"], f"A policy of type `{config['policy_type']}`.") + guarded
    what = kind.format(shapes=len(config.get("grid") or ()), persistence=steps, s="" if steps == 1 else "s")
    made = f" It was made for {short_name(artefact.target)} with the head {artefact.head}." if artefact.head else ""
    return f"It decides how large a draft tree each step verifies. {what}{made} It never changes the text."


def use(artefact: Artefact, name: str) -> str:
    """The lines that a user copies: with our package, and on a model that is not attached."""
    target = artefact.target or "TARGET"
    head = (artefact.head or "HEAD") if artefact.is_policy else name
    imports = "AutoPolicy, DraftHead, attach" if artefact.is_policy else "DraftHead, attach"
    policy = ", policy=policy" if artefact.is_policy else ""
    lines = [
        "## Use it",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM",
        f"from transformers_resps import {imports}",
        "",
        f'model = attach(AutoModelForCausalLM.from_pretrained("{target}", dtype="auto"))',
        f'head = DraftHead.from_pretrained("{head}", target=model)',
        *([f'policy = AutoPolicy.from_pretrained("{name}")'] if artefact.is_policy else []),
        f"out = model.generate(**inputs, assistant_model=head{policy}, max_new_tokens=256)",
        "```",
        "",
        "A model that is not attached takes the same arguments with "
        f'`custom_generate="{name}", trust_remote_code=True`, where transformers-resps is installed.',
    ]
    if tree := artefact.config.get("default_tree"):
        lines[-1] += f" Without a policy the tree is `TreeShape({', '.join(map(str, tree))})`."
    return "\n".join(lines)


def training_cost(training: dict[str, Any]) -> str:
    """What a training took; only what the run wrote down."""
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
