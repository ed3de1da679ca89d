"""`assert_lossless` checks that a drafter and a policy do not change a model's output."""

import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import cycle
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.logging import tqdm

from ..calibration import identity_of
from ..compat import text_config, unwrapped
from ..drafting import DraftSource
from ..generation.keywords import AUTO, Keywords
from ..generation.request import Assistants
from ..policies.base import Observation, Policy
from ..tree import TreeShape
from .comparison import GREEDY, PENALISED, PROCESSED, SAMPLED, ComparedCall, ModelUnderTest, TextCheck, compare
from .distribution import DistributionCheck, check_distribution
from .divergence import HALF_PRECISIONS


@dataclass(frozen=True, slots=True)
class LosslessReport:
    """Result of `assert_lossless`; `print` it to get a short text for an issue."""

    facts: dict[str, str]  # versions, device, dtype, threads, packing, target, head, policy, mode
    texts: tuple[TextCheck, ...]  # outputs compared token for token, one entry per decoding setting
    distribution: DistributionCheck | None  # the statistical test of sampled tokens; `None` if stopped before its end
    seconds: float  # duration of the check

    @property
    def checks(self) -> tuple[TextCheck | DistributionCheck, ...]:
        return self.texts if self.distribution is None else (*self.texts, self.distribution)

    @property
    def is_lossless(self) -> bool:
        """Whether every output equals plain output or diverges at a near-tie, and the statistical test passed."""
        return all(check.passed for check in self.checks)

    @property
    def has_power(self) -> bool:
        """Whether the statistical test would have found a wrong rule."""
        return self.distribution is not None and self.distribution.has_power

    @property
    def is_tested(self) -> bool:
        """Whether any drafted token of the policy was accepted; if not, nothing was tested."""
        return self.has_power or any(check.accepted for check in self.texts if check.is_of_policy)

    @property
    def verdict(self) -> str:
        if not self.is_lossless:
            return f"NOT LOSSLESS: {', '.join(check.name for check in self.checks if not check.passed)}"
        if not self.is_tested:
            beside = "" if any(check.accepted for check in self.texts) else ", nor of the built-in trees"
            return (
                f"NOTHING WAS TESTED: no drafted token of the policy was accepted{beside}, so its answers were plain "
                "decoding's own. Pass a trained head, or prompts that it can draft for"
            )
        differing = sum(len(check.differences) for check in self.texts)
        except_for = f", except for {differing} that differ at a near-tie" if differing else ""
        blind = "" if self.has_power else "; the distribution test had no power"
        if self.distribution is None:
            blind = f"; stopped after {len(self.texts)} comparisons, before the distribution test"
        idle = [check.name for check in self.texts if check.is_of_policy and not check.accepted]
        untested = f"; no draft was accepted in {len(idle)} of the comparisons" if idle else ""
        mode = " of the invariant mode" if self.facts["mode"] == "invariant" else ""
        return f"LOSSLESS: every answer is the plain one{except_for}{mode}{untested}{blind}"

    def __str__(self) -> str:
        width = max(map(len, self.facts))
        lines = [f"{name:{width}}  {value}" for name, value in self.facts.items()]
        lines.append("")
        for check in self.texts:
            lines.append(f"{check.name}: {check}")
            lines += [f"  {difference}" for difference in (*check.differences, *check.mismatches)]
        lines += [] if self.distribution is None else [f"{self.distribution.name}: {self.distribution}"]
        lines.append("")
        return "\n".join([*lines, f"{self.verdict} ({self.seconds:.0f} s)"])


class NotLosslessError(AssertionError):
    """Raised by `assert_lossless` if output differs from plain decoding; `report` is the `LosslessReport`."""

    def __init__(self, report: LosslessReport) -> None:
        super().__init__(str(report))
        self.report = report


class StoppedCheck(KeyboardInterrupt):
    """Raised by `assert_lossless` after Ctrl-C if nothing differed so far; `report` has the finished comparisons."""

    def __init__(self, report: LosslessReport) -> None:
        super().__init__(report.verdict)
        self.report = report


_DISTRIBUTION_OUTPUTS = 12  # Outputs per seed for the statistical test.
_ENDS = 8  # Number of first tokens of an output that are tried as end token, one after another.


def assert_lossless(
    model: Any,
    head: DraftSource | PreTrainedModel | str | None = None,
    policy: Policy | str | None = None,
    prompts: Sequence[Tensor | Sequence[int]] | None = None,
    *,
    seeds: int = 4,
    max_new_tokens: int = 32,
    invariant: bool = False,
) -> LosslessReport:
    """Compare `generate` with a drafter and a policy to plain `generate`; raise if output or distribution differ.

    In fp32 and fp64 all tokens, the padding after them and the random numbers must be equal. In bf16 and fp16 the
    first divergence of each output must be a near-tie that rounding explains. In every dtype a statistical test checks
    the distribution of sampled tokens, and the report says whether that test had power.

    The policy is tested with greedy decoding, for single prompts and a left-padded batch, and with sampling, with and
    without logits processors. Then built-in trees that change at every step are tested, also with a prompt in chunks,
    end tokens inside trees, and a sampled batch. With `invariant=True` (the exact mode) the reference is plain
    decoding in that mode, and any difference fails; rows of padded and chunked batches are also compared with output
    for each prompt alone.

    The model need not be attached. It and the global random generators are restored at the end; do not use the model
    during the check. Its generation settings apply to the comparisons, but not to the statistical test.

    Args:
        model: any model that `attach` takes.
        head: a drafter of any kind, or its folder or Hub id; `None` drafts only by lookup.
        policy: a policy or its name; if both `head` and `policy` are `None`, "auto".
        prompts: token ids, each `[s]` with at least 2 tokens; `None` for four built-in prompts. With real prompts
            more drafts are accepted.
        seeds: number of outputs per sampling setting; the statistical test uses twelve times as many.
        max_new_tokens: length of each compared output.
        invariant: whether to test `generate(..., invariant=True)`.

    Raises a `NotLosslessError`, with the report, if outputs differ and rounding does not explain it; a `StoppedCheck`,
    with the report so far, after Ctrl-C; a `ValueError` if an argument cannot be used, or if `generate` refuses it.
    """
    started = time.perf_counter()
    _check_kinds(model, policy)
    assistants = Assistants()  # keeps the drafters that it loads
    source = assistants.source(unwrapped(model), head)
    under_test = ModelUnderTest(model, source, AUTO if head is None and policy is None else policy, invariant)
    vocabulary = text_config(under_test.target).vocab_size
    ids = [_token_ids(prompt, vocabulary) for prompt in (built_in_prompts(vocabulary) if prompts is None else prompts)]
    if not ids or seeds < 1 or max_new_tokens < 2:
        raise ValueError(
            f"Got {len(ids)} prompts, seeds={seeds} and max_new_tokens={max_new_tokens}, but at least one prompt, one "
            "seed and two new tokens are needed. Leave them out for the defaults."
        )
    limit = {"max_new_tokens": max_new_tokens}
    total = 2 * len(ids) + 4 * seeds + 4 + len(ids) * min(_ENDS, max_new_tokens) + _DISTRIBUTION_OUTPUTS * seeds
    with under_test.undisturbed(), tqdm(total=total, desc="Comparing with plain decoding", unit="call") as bar:
        under_test = replace(under_test, done=bar.update)
        texts, distribution, stop = [], None, None
        try:
            for check in _with_the_policy(under_test, ids, seeds, limit):
                texts.append(check)
            for check in _with_changing_trees(under_test, ids, seeds, limit):
                texts.append(replace(check, is_of_policy=False))
            distribution = check_distribution(under_test, ids, _DISTRIBUTION_OUTPUTS * seeds)
        except KeyboardInterrupt as interrupt:
            if not texts:
                raise
            stop = interrupt
    report = LosslessReport(_facts(under_test), tuple(texts), distribution, time.perf_counter() - started)
    if not report.is_lossless:
        raise NotLosslessError(report) from stop
    if stop is not None:
        raise StoppedCheck(report) from stop
    return report


def _with_the_policy(
    model: ModelUnderTest, ids: list[Tensor], seeds: int, limit: dict[str, Any]
) -> Iterator[TextCheck]:
    greedy = _batch(ids, GREEDY | limit)
    processed = "sampled, temperature 0.8, top_k 50, top_p 0.9, repetition penalty 1.1"
    yield compare(model, "greedy", [[call] for call in greedy])
    yield compare(model, "greedy, in a padded batch", [greedy])
    yield compare(model, "sampled, temperature 1", _one_by_one(ids, seeds, SAMPLED | limit))
    yield compare(model, processed, _one_by_one(ids, seeds, PROCESSED | limit))
    if model.invariant:
        yield compare(model, "greedy, rows of a padded batch against each alone", [greedy], alone=True)


def _with_changing_trees(
    model: ModelUnderTest, ids: list[Tensor], seeds: int, limit: dict[str, Any]
) -> Iterator[TextCheck]:
    stressed = replace(model, policy=ChangingTrees(model.head is not None))
    longest = max(range(len(ids)), key=lambda index: len(ids[index]))
    in_chunks = GREEDY | limit | {"prefill_chunk_size": 5}
    if model.invariant or model.target.dtype not in HALF_PRECISIONS:
        yield compare(stressed, "sampled, in a padded batch", [_batch(ids, SAMPLED | limit)])
    with model.without_settings():
        yield compare(stressed, "greedy, in a padded batch, built-in trees", [_batch(ids, GREEDY | limit)])
        yield compare(stressed, "sampled, built-in trees", _one_by_one(ids, seeds, PENALISED | limit))
        yield compare(stressed, "greedy, a prompt in chunks", [[ComparedCall(longest, ids[longest], 0, in_chunks)]])
        yield compare(stressed, "greedy, ends inside trees", list(_ending_calls(model, ids, GREEDY | limit)))
        if model.invariant:
            chunked = "greedy, prompts in chunks against each at once"
            yield compare(stressed, chunked, [_batch(ids, in_chunks)], alone=True)


def _ending_calls(model: ModelUnderTest, ids: list[Tensor], settings: dict[str, Any]) -> Iterator[list[ComparedCall]]:
    """Yield batches of one call: for each prompt, a call with each of its output's first tokens as the end token."""
    for index, prompt in enumerate(ids):
        output = model.plain([prompt], **settings).outputs[0][:_ENDS].tolist()
        for position, token in enumerate(output):
            if token not in output[:position]:
                yield [ComparedCall(index, prompt, 0, settings | {"eos_token_id": [output[-1], token]})]


def _batch(prompts: list[Tensor], settings: dict[str, Any]) -> list[ComparedCall]:
    return [ComparedCall(index, prompt, 0, settings) for index, prompt in enumerate(prompts)]


def _one_by_one(prompts: list[Tensor], seeds: int, settings: dict[str, Any]) -> list[list[ComparedCall]]:
    return [[ComparedCall(seed % len(prompts), prompts[seed % len(prompts)], seed, settings)] for seed in range(seeds)]


# Wide and deep trees, lookup, chains and plain steps use different masks, positions, caches and acceptance.
_SHAPES = (
    TreeShape(24, 5, 4, lookup=4),
    TreeShape.plain(),
    TreeShape(1, 0, 1, lookup=6),
    TreeShape(6, 5, 1),
    TreeShape(9, 2, 8),
    TreeShape(1, 0, 1, lookup=2),
    TreeShape(16, 3, 3),
)


class ChangingTrees(Policy):
    """Chooses another built-in tree at every step, because the tested policy may use only a few kinds of tree."""

    needs_head = False

    def __init__(self, has_head: bool) -> None:
        self._shapes = cycle([shape for shape in _SHAPES if has_head or not shape.asks_head])

    def choose(self, observation: Observation) -> TreeShape:
        return next(self._shapes)


def built_in_prompts(vocabulary: int) -> list[Tensor]:
    """Make four prompts of random token ids: of 2, 9 and 24 ids, and of 9 ids and their repetition, for lookup."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(min(3, vocabulary - 1), vocabulary, (44,), generator=generator)
    return [ids[:2], ids[2:11], ids[11:35], ids[35:44].repeat(2)]


def _check_kinds(model: Any, policy: Any) -> None:
    is_model = isinstance(model, torch.nn.Module) and hasattr(model, "generate")
    if not is_model or model.config.is_encoder_decoder:
        got = type(model).__name__ if isinstance(model, torch.nn.Module) else repr(model)
        raise ValueError(
            f"`assert_lossless` needs a loaded causal LM, got {got}. Pass `AutoModelForCausalLM.from_pretrained(...)`."
        )
    if Keywords(policy=policy).is_plain:
        raise ValueError("`policy='plain'` drafts nothing, so there is nothing to compare. Pass another policy.")


def _token_ids(prompt: Tensor | Sequence[int], vocabulary: int) -> Tensor:
    """Convert a prompt to token ids `[s]`; raises `ValueError` if that is not possible."""
    ids = torch.empty(0) if isinstance(prompt, str) else torch.as_tensor(prompt)
    is_row = ids.dim() == 1 and len(ids) > 1 and ids.dtype in (torch.int32, torch.int64)
    if not is_row or not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise ValueError(
            f"A prompt must be one row of at least two token ids below {vocabulary}, got {prompt!r}. Pass "
            "`tokenizer(text)['input_ids']`."
        )
    return ids


def _facts(model: ModelUnderTest) -> dict[str, str]:
    known = identity_of(model.target, model.head)
    facts = {"transformers-resps": version("transformers-resps"), "python": platform.python_version()}
    facts |= {
        name: str(known[name]) for name in ("transformers", "torch", "device", "threads", "dtype", "packed", "target")
    }
    facts["head"] = "none, drafts by lookup"
    if model.head is not None:
        facts["head"] = f"{model.head.identity()['name_or_path'] or 'without a name'}, {known['head']}"
    facts["policy"] = "the head's default tree" if model.policy is None else str(model.policy)
    facts["mode"] = "invariant" if model.invariant else "normal"
    return facts
