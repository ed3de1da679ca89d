"""Measure how long decoding steps take on this machine, and store the seconds in a `CostTable`."""

import hashlib
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.constants import HF_HOME
from transformers import DynamicCache, PreTrainedModel
from transformers.utils.logging import tqdm

from .compat import CACHE_KEYWORD, text_config
from .drafting import Committed, DraftCall, DraftRequest, DraftSource, LevelSource
from .generation.attach import attached
from .generation.checks import check_model, setting_of
from .generation.keywords import SpeculationDefaults
from .generation.request import Assistants
from .policies.costs import CostTable, Range
from .policies.fixed import FixedPolicy
from .tree import DraftTree, TreeShape
from .verifying.cache import crop, record_windows
from .verifying.forward import TargetForward
from .verifying.growing import GrowingMode
from .verifying.hybrids import is_recurrent
from .verifying.invariant.calls import InvariantCalls
from .verifying.prepacking import is_prepacked
from .verifying.slots.engine import SlotEngine
from .verifying.verifier import Verifier, VerifyingMode


FORMAT = 2  # part of a stored table's file name, so that tables of older formats are not read
CONTEXTS = (128, 768)  # context lengths, in tokens
NODES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
_MORE_NODES = (48, 64, 96)  # also measured on a GPU, where "auto" asks for trees of this size
WIDTHS = (1, 2, 4, 8, 16, 32)
_REPEATS = 5
_SECONDS_PER_CELL = 1.0  # after these seconds no repeat of a measurement begins, so that all take less than a minute


def calibrate(
    target: PreTrainedModel,
    head: DraftSource | PreTrainedModel | str | None = None,
    *,
    invariant: bool = False,
    refresh: bool = False,
    folder: str | Path | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> CostTable:
    """Measure how long steps take on this machine, or load the table of an earlier measurement.

    The target is measured in its dtype and on its device. `head` is a draft head, MTP layers, an assistant, a small
    model, a folder or Hub id of one of these, or `None`. With `invariant`, the exact mode is measured, for a separate
    table without times of plain decoding. `refresh` measures even if a table is stored. `clock` returns seconds.

    The table is stored in `folder`, by default in the Hugging Face cache, and reused until device, dtype, threads,
    versions, target, attention, mode or head change. Raises a `ValueError` if the stored table is damaged or was
    measured elsewhere, if the head belongs to another target, if the target does not support draft trees or the mode,
    or if the clock does not advance.
    """
    _check_target(target, has_head=head is not None)
    mode: VerifyingMode = GrowingMode()
    if invariant:
        calls = InvariantCalls(SlotEngine())
        calls.admit(target, partial(setting_of, arguments={}, configs=(target.generation_config,)), {})
        mode = calls.mode(target)
    assistants = Assistants()  # must live as long as the loaded source
    source = assistants.source(target, head)
    identity = identity_of(target, source, mode.attention)
    name = hashlib.sha256(json.dumps([FORMAT, identity], sort_keys=True).encode()).hexdigest()[:16]
    path = Path(folder or Path(HF_HOME) / "transformers-resps" / "costs") / f"{name}.json"
    if path.exists() and not refresh:
        table = CostTable.load(path)
        table.check_here(identity)
        return table

    room = getattr(text_config(target), "max_position_embeddings", None) or sys.maxsize
    sizes = NODES if target.device.type == "cpu" else NODES + _MORE_NODES
    kept = 2 * (_REPEATS + 1) * len(sizes) if is_recurrent(target) else 0  # each repeat keeps two nodes
    contexts = sorted({max(min(context, room - max(sizes) - 1 - kept), 1) for context in CONTEXTS})
    nodes = {context: [count for count in sizes if count <= max(room - context, 1)] for context in contexts}
    stock = contexts if mode.is_stock else []
    total = sum(map(len, nodes.values())) + (0 if source is None else 2 * len(WIDTHS)) + len(stock) + 1
    with tqdm(total=total, desc="Measuring what steps cost", unit="measurement") as bar:
        measure = partial(_measure, clock, bar.update)
        verify = dict[int, dict[int, Quartiles]]()
        for context, counts in nodes.items():
            positions = torch.arange(context, device=target.device)[None]
            with mode.verifier(TargetForward.of(target), positions) as verifier:
                verify[context] = _time_verifying(target, verifier, context, counts, measure)
        start, draft = ({}, {}) if source is None else _time_drafting(target, source, contexts[0], measure)
        plain = {context: _time_plain(target, context, measure) for context in stock}
        overhead = _time_overhead(target, source, room, mode.keywords)
        bar.update()
    table = CostTable(
        verify={context: _medians(row) for context, row in verify.items()},
        draft=_medians(draft),
        identity=identity,
        overhead=overhead,
        plain=_medians(plain),
        verify_range={context: _ranges(row) for context, row in verify.items()},
        draft_range=_ranges(draft),
        plain_range=_ranges(plain),
        draft_start=start,
    )
    table.save(path)
    return table


def _check_target(target: Any, *, has_head: bool) -> None:
    if not hasattr(target, "generate") or isinstance(target, type):
        raise ValueError(
            f"`calibrate` needs a loaded causal LM, got {type(target).__name__}. Load it with "
            "`AutoModelForCausalLM.from_pretrained`."
        )
    if target.config.is_encoder_decoder:
        raise ValueError(
            f"`calibrate` measures decoder-only models, and {type(target).__name__} is an encoder-decoder. Leave it "
            "out: `policy='auto'` measures while it decodes."
        )
    check_model(target, has_head=has_head)  # type: ignore[arg-type]  # a PEFT wrapper is no PreTrainedModel


def identity_of(target: PreTrainedModel, source: DraftSource | None, attention: str | None = None) -> dict[str, Any]:
    """Describe all that measured times depend on: hardware, versions, models, `attention` (`None`: the target's)."""
    config = target.config
    quantized = {type(weight).__name__ for weight in target.parameters() if type(weight) is not torch.nn.Parameter}
    return {
        "device": device_name(target.device),
        "dtype": ", ".join([str(target.dtype), *sorted(quantized)]),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "target": f"{config.name_or_path or type(target).__name__}, {target.num_parameters()} parameters",
        "attention": attention or text_config(target)._attn_implementation,
        "packed": is_prepacked(target),
        "head": None if source is None else _size_of(source, target),
    }


def _size_of(source: DraftSource, target: PreTrainedModel) -> str:
    """Describe a source by its class, its number of parameters, its dtype, and how many tokens it can propose."""
    if not isinstance(source, LevelSource):
        return type(source).__name__
    model, modules = source.bind(target), source.own_modules
    count = sum(parameter.numel() for module in modules for parameter in module.parameters())
    return f"{type(source).__name__} of {count} parameters, {model.dtype}, {model.proposable_tokens} tokens"


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or of the CPU with its generation and vector instructions."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    return f"{processor_name(Path('/proc/cpuinfo'))}, {torch.backends.cpu.get_cpu_capability()}"


def processor_name(information: Path) -> str:
    """Read the CPU's name from a file like `/proc/cpuinfo`; if it has none, ask Python's `platform`."""
    lines = information.read_text(encoding="utf-8").splitlines() if information.exists() else []
    fields: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    name, family, model = (fields.get(detail) for detail in ("model name", "cpu family", "model"))
    # several generations may share a name
    generation = f" (family {family}, model {model})" if family and model else ""
    return f"{name}{generation}" if name else platform.processor() or platform.machine()


Quartiles = list[float]  # first quartile, median and third quartile of the repeats, in seconds
Measure = Callable[[Callable[[], None]], list[float]]  # returns the seconds of repeated calls
_quartiles = partial(statistics.quantiles, n=4, method="inclusive")


def _medians(row: dict[int, Quartiles]) -> dict[int, float]:
    return {size: median for size, (_, median, _) in row.items()}


def _ranges(row: dict[int, Quartiles]) -> dict[int, Range]:
    return {size: (low, high) for size, (low, _, high) in row.items()}


@torch.no_grad()
def _time_verifying(
    target: PreTrainedModel, verifier: Verifier, context: int, counts: Sequence[int], measure: Measure
) -> dict[int, Quartiles]:
    """Measure the seconds of verifying a tree after `context` tokens; map each number of nodes to the quartiles."""
    vocabulary = text_config(target).vocab_size
    tokens = torch.arange(context + max(counts), device=target.device)[None].remainder(vocabulary)
    verifier.prefill(tokens[:, :context])
    order = torch.arange(max(counts), device=target.device)[None]
    # a tree's shape affects the time only if each path costs time: in that case three of eight nodes are leaves
    parents = order * 5 // 8 if verifier.pricing.paths_cost else torch.zeros_like(order)

    def verify(nodes: int) -> None:
        logits, _ = verifier.verify(DraftTree.from_parents(tokens[:, :nodes], parents[:, :nodes]))
        if verifier.reads_paths:  # keep two nodes: advancing the states takes time too
            verifier.keep(order[:, : min(nodes, 2)], [list(range(min(nodes, 2)))])
        else:
            verifier.undo()
        logits[0, -1, 0].item()  # wait for the device

    return {nodes: _quartiles(measure(partial(verify, nodes))) for nodes in counts}


@torch.no_grad()
def _time_plain(target: PreTrainedModel, context: int, measure: Measure) -> Quartiles:
    cache = DynamicCache(config=target.config.get_text_config(decoder=True))
    record_windows(cache)
    positions = torch.arange(context + 1, device=target.device)[None]
    tokens = positions.remainder(text_config(target).vocab_size)
    options: dict[str, Any] = {CACHE_KEYWORD: cache, "use_cache": True}

    def decode() -> None:
        target(input_ids=tokens[:, -1:], position_ids=positions[:, -1:], **options).logits[0, -1, 0].item()
        crop(cache, 1)

    target(input_ids=tokens[:, :-1], position_ids=positions[:, :-1], **options)
    crop(cache, 0)
    return _quartiles(measure(decode))


@torch.no_grad()
def _time_drafting(
    target: PreTrainedModel, source: DraftSource, context: int, measure: Measure
) -> tuple[dict[int, float], dict[int, Quartiles]]:
    """For each width (nodes per level), measure the fixed seconds of a draft, and quartiles of seconds per level."""
    tokens = torch.zeros(1, context + 1, dtype=torch.long, device=target.device)
    starts, levels = dict[int, float](), dict[int, Quartiles]()
    forward = TargetForward.of(target, source.feature_layers, before_deepstack=source.before_deepstack)
    positions = torch.arange(context, device=target.device)[None]
    with GrowingMode().verifier(forward, positions) as verifier:
        drafter = source.drafter(DraftCall(target, verifier))
        _, (read,) = verifier.prefill(tokens[:, 1:])
        features = read.concatenated() if source.feature_layers else None
        drafter.observe(Committed(tokens, features))
        most = min(drafter.most_levels or 3, 3)

        def draft(width: int, depth: int) -> None:
            # every draft first reads at least one committed token
            drafter.observe(Committed(tokens[:, :1], None if features is None else features[:, :1]))
            drafter.draft(tokens, DraftRequest(TreeShape(width + 1, depth, width))).scores[0, -1].item()

        for width in WIDTHS:
            several, one = measure(partial(draft, width, most)), measure(partial(draft, width, 1))
            # seconds of one level; on a slow machine the numbers of repeats may differ
            each = [max(long - short, 0.0) / max(most - 1, 1) for long, short in zip(several, one, strict=False)]
            low, _, high = _quartiles(each)
            shortest = statistics.median(one)
            median = max(statistics.median(several) - shortest, 0.0) / max(most - 1, 1)
            levels[width] = [min(median, low), median, max(median, high)]
            starts[width] = max(shortest - median, 0.0)
    return starts, levels


def _time_overhead(
    target: PreTrainedModel, source: DraftSource | None, room: int, keywords: Mapping[str, Any]
) -> float:
    """Generate a text of at most `room` tokens; return a step's median seconds outside drafting and verifying."""
    prompt_tokens = min(16, room // 2)
    new_tokens = min(24, room - prompt_tokens)
    prompt = torch.ones(1, prompt_tokens, dtype=torch.long, device=target.device)
    shape = TreeShape(1, 0, 1, 3) if source is None else TreeShape(4, 2, 2, 3)
    model: Any = target
    with attached(target), SpeculationDefaults.suspended():
        report = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            assistant_model=source,
            policy=FixedPolicy(shape),
            **keywords,
            do_sample=False,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            return_dict_in_generate=True,
        ).speculation
    rests = [step.step_seconds - step.draft_seconds - step.verify_seconds for step in report.steps[1:]]
    return float(max(statistics.median(rests), 0.0))


def _measure(clock: Callable[[], float], done: Callable[[], Any], run: Callable[[], None]) -> list[float]:
    """Call `run` repeatedly after a warm-up, then `done`; return the seconds of each run. Raises if `clock` stops."""
    run()
    taken: list[float] = []
    while len(taken) < _REPEATS and (len(taken) < 3 or sum(taken) < _SECONDS_PER_CELL):
        started = clock()
        run()
        taken.append(clock() - started)
    median = statistics.median(taken)
    if not median > 0.0:
        raise ValueError(
            f"`clock` measured {median} seconds for a forward, but it must advance. Leave it out for "
            "`time.perf_counter`, or pass a clock of its resolution."
        )
    done()
    return taken
