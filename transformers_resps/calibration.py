"""What steps cost on this machine: `calibrate` measures a `CostTable`.

The names of this machine that measurements carry.

What steps cost on one machine, as a table that is used only where it was measured.

A table and not a line, because costs are not even monotone: on some CPUs two nodes cost more than eight in fp32.

What a step costs on this machine: measured medians, kept apart from anything a policy has learned.
"""

import hashlib
import json
import math
import platform
import statistics
import sys
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from huggingface_hub.constants import HF_HOME
from transformers import DynamicCache, PreTrainedModel
from transformers.utils.logging import tqdm

from .compat import CACHE_KEYWORD
from .drafting.head_drafter import TreeCandidateGenerator
from .generation.attach import attach, detach
from .generation.checks import check_model
from .generation.mixin import ReSpSGenerationMixin
from .generation.state import SpeculationDefaults
from .heads import BoundHead, DraftHead
from .policies import CostModel, FixedPolicy, RunningCosts
from .tree import DraftTree, TreeShape
from .verifying.cache import crop, record_windows
from .verifying.hybrids import is_recurrent
from .verifying.prepacking import is_prepacked
from .verifying.verifier import TreeVerifier


_DETAILS = ("model name", "cpu family", "model")  # of Linux; a name alone may stand for several generations


def device_name(device: torch.device) -> str:
    """The GPU's name, or that of the CPU with its generation and vector units, as far as the system tells."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    return f"{processor_name(Path('/proc/cpuinfo'))}, {torch.backends.cpu.get_cpu_capability()}"


def processor_name(information: Path) -> str:
    """The CPU in a file like `/proc/cpuinfo`; what Python knows of it where there is no such file."""
    lines = information.read_text(encoding="utf-8").splitlines() if information.exists() else []
    found: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    name, family, model = (found.get(detail) for detail in _DETAILS)
    generation = f" (family {family}, model {model})" if family and model else ""
    return f"{name}{generation}" if name else platform.processor() or platform.machine()


Range = tuple[float, float]  # seconds: lower and upper quartile of the repeats


@dataclass(frozen=True)
class CostTable(CostModel):
    """What the steps of decoding cost on one machine: medians in seconds. `calibrate` measures one.

    Attributes:
        verify: context positions -> nodes -> seconds of a target forward; one node is a plain step.
        draft: level width -> seconds of one head level; empty without a head.
        identity: device, dtype, threads, versions, target, attention and head that the table is valid for.
        overhead: seconds of a step outside its forwards: acceptance, caches, policy.
        plain: context positions -> seconds of a forward of plain `generate`, with the attention and cache of
            Transformers; empty in tables of earlier versions.
        verify_range: context positions -> nodes -> first and third quartile of the repeats of which `verify` holds the
            median, in seconds; like the next two empty in tables of earlier versions.
        draft_range: likewise of `draft`.
        plain_range: likewise of `plain`.

    Raises:
        ValueError: no forward is in the table, a size is below 1, or a cost is no positive number of seconds.
    """

    verify: dict[int, dict[int, float]]
    draft: dict[int, float]
    identity: dict[str, Any]
    overhead: float = 0.0
    plain: dict[int, float] = field(default_factory=dict)
    verify_range: dict[int, dict[int, Range]] = field(default_factory=dict)
    draft_range: dict[int, Range] = field(default_factory=dict)
    plain_range: dict[int, Range] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rows = self.verify.values() if isinstance(self.verify, dict) else [None]
        is_measured = bool(rows) and all(row and _is_row(row) for row in rows) and all(map(_is_size, self.verify))
        has_overhead = _is_time(self.overhead) or self.overhead == 0
        are_rows = _is_row(self.draft) and _is_row(self.plain)
        ranges = [self.draft_range, self.plain_range, *self.verify_range.values()]
        are_rows = are_rows and all(
            _is_row(dict(zip(row, ends, strict=True))) for row in ranges for ends in _ends(row)
        )
        if not is_measured or not are_rows or not has_overhead or not isinstance(self.identity, dict):
            raise ValueError(
                "The cost table is empty, or holds sizes below 1 or costs that are no positive numbers of seconds. "
                "Measure again with `calibrate(model, head, refresh=True)`."
            )

    def verify_seconds(self, nodes: int, context: int) -> float:
        """Seconds of a target forward over `nodes`, interpolated in nodes and context."""
        return _interpolate({length: _interpolate(row, nodes) for length, row in self.verify.items()}, context)

    def plain_seconds(self, context: int) -> float:
        """Seconds of a forward of plain `generate`; of our own plain step if nothing else was measured."""
        return _interpolate(self.plain, context) if self.plain else self.verify_seconds(1, context)

    def draft_seconds(self, width: int, levels: int) -> float:
        return levels * _interpolate(self.draft, width) if self.draft else 0.0

    def running(self, context: int) -> RunningCosts:
        """Starting costs for a `ThroughputPolicy` at `context` positions; it corrects them while it decodes."""
        costs = RunningCosts()
        nodes = min(self.verify.values(), key=len)
        verify = {count: self.verify_seconds(count, context) for count in nodes}
        costs.expect(verify, self.draft_seconds(4, 1), self.overhead)
        return costs

    def check_here(self, target: PreTrainedModel, head: DraftHead | None) -> None:
        """Check that the table was measured on this machine, with this target and head.

        Raises:
            ValueError: it was not; the message names every difference.
        """
        here = identity_of(target, head)
        odd = [
            f"{key} {self.identity.get(key)!r} (here: {here[key]!r})"
            for key in here
            if self.identity.get(key) != here[key]
        ]
        if odd:
            raise ValueError(
                f"This cost table was measured with {', '.join(odd)}. Run `calibrate(model, head)` here, which takes "
                "less than a minute."
            )

    def save(self, path: str | Path) -> None:
        """Write the table as JSON; an existing file is replaced atomically."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        written = path.with_suffix(".tmp")
        written.write_text(json.dumps(asdict(self), indent=2), encoding="utf-8")
        written.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> "CostTable":
        """Read what `save` wrote.

        Raises:
            ValueError: the file cannot be read, is no cost table, or holds a cost that is not above zero.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, TypeError) as error:
            raise ValueError(
                f"The cost table {path} cannot be read ({error}). Check the path, or run `calibrate(model, head)`."
            ) from error
        except UnicodeDecodeError as error:  # which holds the whole file
            raise ValueError(_no_table(path, error.reason)) from error
        try:
            read = json.loads(text)
            verify = {int(c): {int(n): float(s) for n, s in row.items()} for c, row in read["verify"].items()}
            draft = {int(w): float(s) for w, s in read["draft"].items()}
            plain = {int(c): float(s) for c, s in read.get("plain", {}).items()}
            ranges = {int(c): _ranges(row) for c, row in read.get("verify_range", {}).items()}
            others = (_ranges(read.get(name, {})) for name in ("draft_range", "plain_range"))
            overhead = float(read.get("overhead", 0.0))
            table = cls(verify, draft, dict(read["identity"]), overhead, plain, ranges, *others)
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
            raise ValueError(_no_table(path, repr(error)[:200])) from error
        return table


def _no_table(path: str | Path, reason: str) -> str:
    return f"{path} is no cost table ({reason}). Delete it and run `calibrate(model, head)`."


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
        "attention": config.get_text_config()._attn_implementation,
        "packed": is_prepacked(target),
        "head": None if head is None else f"{head.num_parameters()} parameters, {head.dtype}",
    }


def _interpolate(row: dict[int, float], at: int) -> float:
    """Linear between the known points; beyond the last one along the line through the last two, if that rises."""
    known = sorted(row)
    if at <= known[0] or len(known) == 1:
        return row[known[0]]
    place = min(bisect_left(known, at), len(known) - 1)
    low, high = known[place - 1], known[place]
    slope = (row[high] - row[low]) / (high - low)
    return row[high] + (at - high) * max(slope, 0.0) if at > high else row[low] + (at - low) * slope


def _ranges(row: dict[str, Any]) -> dict[int, Range]:
    """As read from JSON, where sizes are texts and pairs are lists."""
    return {int(size): (float(low), float(high)) for size, (low, high) in row.items()}


def _ends(row: dict[int, Range]) -> Iterator[tuple[float, ...]]:
    """All first quartiles, then all third ones."""
    yield from zip(*row.values(), strict=True)


def _is_row(row: Any) -> bool:
    """Whether these are sizes from 1 with seconds."""
    return isinstance(row, dict) and all(_is_size(size) and _is_time(seconds) for size, seconds in row.items())


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_time(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


CONTEXTS = (128, 768)
NODES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
_MORE_NODES = (48, 64, 96)  # beyond a CPU, where "auto" asks for them
WIDTHS = (1, 2, 4, 8, 16, 32)
_REPEATS = 5
_SECONDS_PER_CELL = 1.0  # a slow machine gets fewer repeats, so that the whole takes less than a minute


def calibrate(
    target: PreTrainedModel,
    head: DraftHead | None = None,
    *,
    refresh: bool = False,
    folder: str | Path | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> CostTable:
    """Measure what steps cost on this machine, or load the table that was measured before.

    Args:
        target: the model, in the dtype and on the device that it decodes with.
        head: its draft head, or `None`.
        refresh: measure again even if a table is stored.
        folder: where tables are stored; `None` is a folder in the Hugging Face cache.
        clock: returns seconds.

    Returns:
        The table. It is stored in `folder` and reused until device, dtype, threads, versions, target, attention or
        head change.

    Raises:
        ValueError: the stored table is damaged or was measured elsewhere, the head belongs to another target, the
            target or its cache does not support draft trees, or the clock does not advance.
    """
    _check_pair(target, head)
    identity = identity_of(target, head)
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    path = Path(folder or Path(HF_HOME) / "transformers-resps" / "costs") / f"{name}.json"
    if path.exists() and not refresh:
        table = CostTable.load(path)
        table.check_here(target, head)
        return table
    room = getattr(target.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    sizes = NODES if target.device.type == "cpu" else NODES + _MORE_NODES
    kept = 2 * (_REPEATS + 1) * len(sizes) if is_recurrent(target) else 0  # see `_verify_row`
    contexts = sorted({max(min(context, room - max(sizes) - 1 - kept), 1) for context in CONTEXTS})
    nodes = {context: [count for count in sizes if count <= max(room - context, 1)] for context in contexts}
    total = sum(map(len, nodes.values())) + (0 if head is None else 2 * len(WIDTHS)) + len(contexts) + 1
    with tqdm(total=total, desc="Measuring what steps cost", unit="measurement") as bar:
        watch = _Stopwatch(clock, bar.update)
        verify = {context: _verify_row(target, context, counts, watch) for context, counts in nodes.items()}
        draft = {} if head is None else _draft_row(target, head, watch)
        plain = {context: _plain(target, context, watch) for context in contexts}
        overhead = _overhead(target, head, room)
        bar.update()
    verify_range = {context: _ranges_measuring(row) for context, row in verify.items()}
    medians = {context: _medians(row) for context, row in verify.items()}
    table = CostTable(
        medians,
        _medians(draft),
        identity,
        overhead,
        _medians(plain),
        verify_range,
        _ranges_measuring(draft),
        _ranges_measuring(plain),
    )
    table.save(path)
    return table


class _Measured(NamedTuple):
    """Seconds: the median of the repeats, and their first and third quartile."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, taken: Sequence[float]) -> "_Measured":
        low, median, high = statistics.quantiles(taken, n=4, method="inclusive")
        return cls(median, low, high)


def _medians(row: dict[int, _Measured]) -> dict[int, float]:
    return {size: measured.median for size, measured in row.items()}


def _ranges_measuring(row: dict[int, _Measured]) -> dict[int, Range]:
    return {size: (measured.low, measured.high) for size, measured in row.items()}


def _check_pair(target: Any, head: Any) -> None:
    if not hasattr(target, "generate") or isinstance(target, type) or not isinstance(head, DraftHead | None):
        raise ValueError(
            f"`calibrate` needs a loaded causal LM and a `DraftHead` (or None), got {type(target).__name__} and "
            f"{type(head).__name__}. Load them with `AutoModelForCausalLM.from_pretrained` and "
            "`DraftHead.from_pretrained`."
        )
    check_model(target)  # type: ignore[arg-type]  # a PEFT wrapper is no PreTrainedModel


@torch.no_grad()
def _verify_row(
    target: PreTrainedModel, context: int, counts: Sequence[int], watch: "_Stopwatch"
) -> dict[int, _Measured]:
    """Nodes, of `counts` -> seconds at one context length.

    The trees are stars: a mask's content costs nothing, its size does. Where recurrent layers read every path they are
    chains, as "auto" drafts there, and two of their nodes are kept, since those layers read them again.
    """
    vocabulary = target.config.get_text_config().vocab_size
    tokens = torch.arange(context + max(counts), device=target.device)[None].remainder(vocabulary)
    with TreeVerifier.of(target, context) as verifier:
        verifier.prefill(tokens[:, :context])
        order = torch.arange(max(counts), device=target.device)[None]
        parents = (order - 1).clamp(min=0) if verifier.reads_paths else torch.zeros_like(order)

        def verify(nodes: int) -> None:
            logits, _ = verifier.verify(DraftTree.from_parents(tokens[:, :nodes], parents[:, :nodes]))
            if verifier.reads_paths:
                verifier.keep(order[:, : min(nodes, 2)], [list(range(min(nodes, 2)))])
            else:
                verifier.undo()
            logits[0, -1, 0].item()  # wait for the device

        return {nodes: _Measured.of(watch.time(partial(verify, nodes))) for nodes in counts}


@torch.no_grad()
def _plain(target: PreTrainedModel, context: int, watch: "_Stopwatch") -> _Measured:
    """Of a forward as plain `generate` makes it."""
    cache = DynamicCache(config=target.config.get_text_config(decoder=True))
    record_windows(cache)
    places = torch.arange(context + 1, device=target.device)[None]
    tokens = places.remainder(target.config.get_text_config().vocab_size)
    options: dict[str, Any] = {CACHE_KEYWORD: cache, "use_cache": True}

    def decode() -> None:
        target(input_ids=tokens[:, -1:], position_ids=places[:, -1:], **options).logits[0, -1, 0].item()
        crop(cache, 1)

    target(input_ids=tokens[:, :-1], position_ids=places[:, :-1], **options)
    crop(cache, 0)
    return _Measured.of(watch.time(decode))


@torch.no_grad()
def _draft_row(target: PreTrainedModel, head: DraftHead, watch: "_Stopwatch") -> dict[int, _Measured]:
    """Width -> seconds of one more level: the difference between drafting three levels and one, halved."""
    bound = BoundHead(head, target)
    generator = TreeCandidateGenerator(bound, 1, None)
    features = torch.zeros(1, CONTEXTS[0], head.config.features_width, dtype=head.dtype, device=head.device)
    tokens = torch.zeros(1, CONTEXTS[0], dtype=torch.long, device=head.device)
    generator.observe(features, tokens)
    policy = FixedPolicy(TreeShape.plain())

    def draft(width: int, depth: int) -> None:
        generator.draft(TreeShape(width + 1, depth, width), policy).scores[0, -1].item()

    def of_one(several: float, one: float) -> float:
        return (several - one) / 2 if several > one else several / 3  # noise hides what a tiny head takes

    def level(width: int) -> _Measured:
        several, one = watch.time(lambda: draft(width, 3)), watch.time(lambda: draft(width, 1))
        each = [of_one(*pair) for pair in zip(several, one, strict=False)]  # a slow machine may have repeated one less
        median, found = of_one(statistics.median(several), statistics.median(one)), _Measured.of(each)
        return _Measured(median, min(median, found.low), max(median, found.high))

    return {width: level(width) for width in WIDTHS}


def _overhead(target: PreTrainedModel, head: DraftHead | None, room: int) -> float:
    """Median seconds of a step outside its forwards, over a short answer: prompt and answer fit `room` positions."""
    prompt_tokens = min(16, room // 2)
    new_tokens = min(24, room - prompt_tokens)
    was_attached = isinstance(target, ReSpSGenerationMixin)
    model: Any = attach(target)
    prompt = torch.ones(1, prompt_tokens, dtype=torch.long, device=target.device)
    shape = TreeShape(1, 0, 1, 3) if head is None else TreeShape(4, 2, 2, 3)
    try:
        with SpeculationDefaults.suspended():
            report = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                assistant_model=head,
                policy=FixedPolicy(shape),
                do_sample=False,
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                return_dict_in_generate=True,
            ).speculation
    finally:
        if not was_attached:
            detach(target)
    rests = [step.step_seconds - step.draft_seconds - step.verify_seconds for step in report.steps[1:]]
    return float(max(statistics.median(rests), 0.0))


class _Stopwatch:
    """Times what is repeated.

    Args:
        clock: returns seconds.
        done: called after each measurement, to move a progress bar.
    """

    def __init__(self, clock: Callable[[], float], done: Callable[[], Any]) -> None:
        self._clock, self._done = clock, done

    def time(self, run: Callable[[], None]) -> list[float]:
        """Seconds of each repeat of `run`, after one warm-up.

        Raises:
            ValueError: no time passes on the clock.
        """
        run()
        taken: list[float] = []
        while len(taken) < _REPEATS and (len(taken) < 3 or sum(taken) < _SECONDS_PER_CELL):
            started = self._clock()
            run()
            taken.append(self._clock() - started)
        median = statistics.median(taken)
        if not median > 0.0:
            raise ValueError(
                f"`clock` measured {median} seconds for a forward, but it must advance. Leave it out for "
                "`time.perf_counter`, or pass a clock of its resolution."
            )
        self._done()
        return taken
