"""What a step costs on this machine: measured medians, kept apart from anything a policy has learned.

A table and not a line, because costs are not even monotone: here in fp32 two nodes cost more than eight.
"""

import hashlib
import json
import math
import statistics
import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.constants import HF_HOME
from transformers import DynamicCache, PreTrainedModel

from .attaching import attach, detach
from .attention import tree_attention_mask, tree_positions
from .cache import check_cache
from .candidate_generator import TreeCandidateGenerator
from .forward import TargetForward
from .generation import ReSpSGenerationMixin
from .head import BoundHead, DraftHead
from .machine import device_name
from .packing import is_packed
from .policy import FixedPolicy, RunningCosts
from .roomy_cache import make_room, settle
from .tree import DraftTree, TreeShape


CONTEXTS = (128, 768)
NODES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
WIDTHS = (1, 2, 4, 8)
_REPEATS = 5
_SECONDS_PER_CELL = 1.0  # a slow machine gets fewer repeats, so that the whole takes less than a minute


@dataclass(frozen=True)
class CostTable:
    """Medians in seconds, and where they hold.

    Attributes:
        verify: context positions -> nodes -> seconds of a target forward; one node is a plain step.
        draft: level width -> seconds of one head level; empty without a head.
        identity: device, dtype, threads, versions, target and head. A table is used nowhere else.
        overhead: seconds of a step beside its forwards: the walk, the caches, the policy.

    Raises:
        ValueError: there is no forward, or a cost is not a time.
    """

    verify: dict[int, dict[int, float]]
    draft: dict[int, float]
    identity: dict[str, Any]
    overhead: float = 0.0

    def __post_init__(self) -> None:
        costs = [seconds for row in self.verify.values() for seconds in row.values()] + list(self.draft.values())
        measured = bool(self.verify) and all(self.verify.values())
        if not measured or not all(math.isfinite(cost) and cost > 0 for cost in costs) or not self.overhead >= 0:
            raise ValueError(
                "A cost table holds costs of zero seconds, impossible ones or none at all, but every measured forward "
                "takes time. Measure with `calibrate(model, head, refresh=True)`."
            )

    def verify_seconds(self, nodes: int, context: int) -> float:
        """Seconds of a target forward over `nodes`, interpolated in nodes and context."""
        return _interpolate({length: _interpolate(row, nodes) for length, row in self.verify.items()}, context)

    def draft_seconds(self, width: int, levels: int) -> float:
        """Seconds of drafting `levels` levels of `width` nodes."""
        return levels * _interpolate(self.draft, width) if self.draft else 0.0

    def step_seconds(self, shape: TreeShape, context: int) -> float:
        """Seconds of a whole step: drafting, the target's forward over all nodes, and what surrounds both."""
        verify = self.verify_seconds(shape.total_tokens + shape.lookup, context)
        return self.draft_seconds(shape.top_k, shape.depth) + verify + self.overhead

    def running(self, context: int) -> RunningCosts:
        """What a `ThroughputPolicy` should expect at `context` positions, to be corrected while it decodes."""
        costs = RunningCosts()
        nodes = min(self.verify.values(), key=len)
        verify = {count: self.verify_seconds(count, context) for count in nodes}
        costs.expect(verify, self.draft_seconds(4, 1), self.overhead)
        return costs

    def check_here(self, target: PreTrainedModel, head: DraftHead | None) -> None:
        """Refuse to speak for another machine, dtype, target or head.

        Raises:
            ValueError: names every fact that differs, there and here.
        """
        here = identity_of(target, head)
        odd = [
            f"{key} {self.identity.get(key)!r} (here: {here[key]!r})"
            for key in here
            if self.identity.get(key) != here[key]
        ]
        if odd:
            raise ValueError(
                f"This cost table was measured with {', '.join(odd)}. Costs hold only where they were measured: "
                "run `calibrate(model, head)` here, it takes less than a minute."
            )

    def save(self, path: Path) -> None:
        """Write as JSON; a table that is there is replaced in one go."""
        path.parent.mkdir(parents=True, exist_ok=True)
        written = path.with_suffix(".tmp")
        written.write_text(json.dumps(asdict(self), indent=2), encoding="utf-8")
        written.replace(path)

    @classmethod
    def load(cls, path: Path) -> "CostTable":
        """Read what `save` wrote.

        Raises:
            ValueError: the file is no cost table, or holds a cost that is not above zero.
        """
        try:
            read = json.loads(path.read_text(encoding="utf-8"))
            verify = {int(c): {int(n): float(s) for n, s in row.items()} for c, row in read["verify"].items()}
            draft = {int(w): float(s) for w, s in read["draft"].items()}
            table = cls(verify, draft, dict(read["identity"]), float(read.get("overhead", 0.0)))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{path} is no cost table ({error!r}). Delete it and run `calibrate(model, head)`."
            ) from error
        return table


def identity_of(target: PreTrainedModel, head: DraftHead | None) -> dict[str, Any]:
    """Where a measurement holds."""
    config = target.config
    return {
        "device": device_name(target.device),
        "dtype": str(target.dtype),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "target": f"{config.name_or_path or type(target).__name__}, {target.num_parameters()} parameters",
        "packed": is_packed(target),
        "head": None if head is None else f"{head.num_parameters()} parameters, {head.dtype}",
    }


def calibrate(
    target: PreTrainedModel,
    head: DraftHead | None = None,
    *,
    refresh: bool = False,
    folder: Path | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> CostTable:
    """Measure what steps cost here, or read what was measured here before.

    Args:
        target: in the dtype and on the device it will decode on.
        head: its draft head, if there is one.
        refresh: measure again.
        folder: where tables are kept; the Hugging Face cache when `None`.
        clock: seconds; tests pass a fake one.

    Returns:
        The table, kept in `folder` until device, dtype, threads, versions, target or head are others.

    Raises:
        ValueError: the kept table is damaged or was measured elsewhere, the head is another target's, or the target or
            its cache is of a kind that holds no tree.
    """
    identity = identity_of(target, head)
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    path = (folder or Path(HF_HOME) / "transformers-resps" / "costs") / f"{name}.json"
    if path.exists() and not refresh:
        table = CostTable.load(path)
        table.check_here(target, head)
        return table
    longest = target.config.get_text_config().max_position_embeddings - max(NODES) - 1
    contexts = sorted({min(context, longest) for context in CONTEXTS})
    verify = {context: _verify_row(target, context, clock) for context in contexts}
    draft = {} if head is None else _draft_row(target, head, clock)
    table = CostTable(verify, draft, identity, _overhead(target, head))
    table.save(path)
    return table


@torch.no_grad()
def _verify_row(target: PreTrainedModel, context: int, clock: Callable[[], float]) -> dict[int, float]:
    """Nodes -> seconds at one context length. The trees are stars: a mask's content costs nothing, its size does."""
    vocabulary = target.config.get_text_config().vocab_size
    cache = DynamicCache(config=target.config.get_text_config(decoder=True))
    cache.activate_past_recording()
    places = torch.arange(context + max(NODES), device=target.device)[None]
    tokens, root = places.remainder(vocabulary), places[0, context : context + 1]

    def verify(forward: TargetForward, nodes: int) -> None:
        tree = DraftTree.from_parents(tokens[:, :nodes], torch.zeros_like(tokens[:, :nodes]))
        mask = None if nodes == 1 else tree_attention_mask(target.config, cache, None, tree, target.dtype)
        outputs, _ = forward.verify(tree.tokens, mask, tree_positions(tree, root))
        outputs.logits[0, -1, 0].item()  # wait for the device
        forward.undo(tree)

    with TargetForward(target, None, cache) as forward:
        forward.read(tokens[:, :context], None, places[:, :context])
        check_cache(cache)
        make_room(cache)
        row = {nodes: _median(lambda nodes=nodes: verify(forward, nodes), clock) for nodes in NODES}  # type: ignore[misc]
        settle(cache)
        return row


@torch.no_grad()
def _draft_row(target: PreTrainedModel, head: DraftHead, clock: Callable[[], float]) -> dict[int, float]:
    """Width -> seconds of one more level: the difference between drafting three levels and one, halved."""
    bound = BoundHead(head, target)
    generator = TreeCandidateGenerator(bound, 1, None)
    features = torch.zeros(1, CONTEXTS[0], head.config.features_width, dtype=head.dtype, device=head.device)
    tokens = torch.zeros(1, CONTEXTS[0], dtype=torch.long, device=head.device)
    generator.observe(features, tokens)
    policy = FixedPolicy(TreeShape.plain())

    def draft(width: int, depth: int) -> None:
        generator.draft(TreeShape(width + 1, depth, width), policy).scores[0, -1].item()

    def level(width: int) -> float:
        several, one = _median(lambda: draft(width, 3), clock), _median(lambda: draft(width, 1), clock)
        return max(several - one, 1e-9) / 2

    return {width: level(width) for width in WIDTHS}


def _overhead(target: PreTrainedModel, head: DraftHead | None) -> float:
    """Median seconds of a step beside its forwards, over a short answer."""
    was_attached = isinstance(target, ReSpSGenerationMixin)
    model: Any = attach(target)
    prompt = torch.ones(1, 16, dtype=torch.long, device=target.device)
    shape = TreeShape(1, 0, 1, 3) if head is None else TreeShape(4, 2, 2, 3)
    try:
        report = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            assistant_model=head,
            policy=FixedPolicy(shape),
            do_sample=False,
            max_new_tokens=24,
            min_new_tokens=24,
            return_dict_in_generate=True,
        ).speculation
    finally:
        if not was_attached:
            detach(target)
    rests = [step.step_seconds - step.draft_seconds - step.verify_seconds for step in report.steps[1:]]
    return float(max(statistics.median(rests), 0.0))


def _median(run: Callable[[], None], clock: Callable[[], float]) -> float:
    """Median seconds of `run`, after one warm-up."""
    run()
    taken: list[float] = []
    while len(taken) < _REPEATS and (len(taken) < 3 or sum(taken) < _SECONDS_PER_CELL):
        started = clock()
        run()
        taken.append(clock() - started)
    return max(statistics.median(taken), 1e-9)


def _interpolate(row: dict[int, float], at: int) -> float:
    """Linear between the known points, and beyond the last one along the line through the last two."""
    known = sorted(row)
    if at <= known[0] or len(known) == 1:
        return row[known[0]]
    place = min(bisect_left(known, at), len(known) - 1)
    low, high = known[place - 1], known[place]
    return row[low] + (at - low) / (high - low) * (row[high] - row[low])
