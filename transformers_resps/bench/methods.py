"""The methods that are compared, and what each adds to the keywords of `generate`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch import Tensor
from transformers import PreTrainedModel

from ..heads import DraftHead
from ..policies import FixedPolicy, Policy
from ..telemetry import SpeculationReport
from ..tree import TreeShape
from .timing import COMPILED, PLAIN


ORACLE = "oracle (ceiling)"
EAGLE_TREES = ((60, 5, 10), (60, 7, 10))  # total_token, depth and top_k as EAGLE counts them


class Answer(NamedTuple):
    """What a method wrote, and what it tells of it; forwards are counted at the target's layers where it tells none.

    Attributes:
        token_ids: of the answer.
        report: of `generate` with a policy.
        target_forwards: of a library that runs layers of its own.
        prefill_seconds: of the same.
    """

    token_ids: list[int]
    report: SpeculationReport | None = None
    target_forwards: int | None = None
    prefill_seconds: float = 0.0


# Of a library with its own loop: prompt `[1, s]`, most new tokens, temperature, end tokens -> its answer.
AnswerFn = Callable[[Tensor, int, float, Sequence[int]], Answer]


@dataclass(frozen=True, slots=True)
class Method:
    """One way to decode: a name, and what it adds to the keywords of `generate`.

    Attributes:
        name: in the table.
        keywords: of `generate`.
        effort: what a user must have for it; of methods that are equally fast the one with the least is advised.
        seed_exact: whether sampled texts must be those of plain decoding with the same seed. Transformers' own
            assistants draw other random numbers, so only their distribution is right.
        answer: instead of `generate`.
    """

    name: str
    keywords: dict[str, Any] = field(default_factory=dict)
    effort: int = 0
    seed_exact: bool = True
    answer: AnswerFn | None = None

    @property
    def reports_steps(self) -> bool:
        """Whether the steps of an answer are told, as `generate` tells them with a policy."""
        return "policy" in self.keywords


def plain() -> Method:
    """Return plain decoding, with which all others are compared."""
    return Method(PLAIN)


def compiled(method: Method) -> Method:
    """Return one of our methods with its forwards compiled."""
    return replace(method, name=method.name + COMPILED, keywords={**method.keywords, "compile": True})


def compiled_plain() -> Method:
    """Return plain decoding with the compilation and the caches of `compiled` trees."""
    return compiled(Method(PLAIN, {"policy": FixedPolicy(TreeShape.plain())}))


def prompt_lookup() -> Method:
    """Return Transformers' own prompt lookup, with the ten tokens of its documentation."""
    return Method("prompt lookup", {"prompt_lookup_num_tokens": 10}, effort=1, seed_exact=False)


def draft_model(model: PreTrainedModel) -> Method:
    """Return Transformers' own assisted generation with a small model."""
    return Method("draft model", {"assistant_model": model}, effort=2, seed_exact=False)


def peers(answers: Mapping[str, AnswerFn]) -> list[Method]:
    """Return a method for each other library; to use it a user must leave `generate`."""
    return [Method(name, effort=6, seed_exact=False, answer=answer) for name, answer in answers.items()]


def fixed_tree(head: DraftHead, shape: TreeShape, name: str | None = None) -> Method:
    """Return the method that drafts one shape at every step; a shape of lookups alone needs no head."""
    assistant = {"assistant_model": head} if shape.asks_head else {}
    return Method(name or shape_name(shape), {**assistant, "policy": FixedPolicy(shape)}, effort=3)


def eagle_trees(head: DraftHead) -> list[Method]:
    """Return the trees that EAGLE-3 publishes."""
    return [
        fixed_tree(head, TreeShape.from_eagle(*numbers), f"EAGLE-3 {'/'.join(map(str, numbers))}")
        for numbers in EAGLE_TREES
    ]


def policies(head: DraftHead, loaded: Mapping[str, Policy | str]) -> list[Method]:
    """Return a method for each policy, by its name."""
    return [
        Method(name, {"assistant_model": head, "policy": policy}, effort=4 if policy == "auto" else 5)
        for name, policy in loaded.items()
    ]


def shape_name(shape: TreeShape) -> str:
    """Return `tree 8/4/2`, and `+6` for nodes that lookup may add."""
    name = f"tree {shape.total_tokens}/{shape.depth}/{shape.top_k}"
    return f"{name}+{shape.lookup}" if shape.lookup else name


def check_distinct(methods: Sequence[Method]) -> None:
    """Raises ValueError when two methods have one name."""
    names = [method.name for method in methods]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"Several methods have the name {', '.join(twice)}. Pass each policy and shape once, and give policy "
            "folders different names."
        )
