"""`resps doctor`: find the settings for a head's file with which the head agrees best with its target."""

import argparse
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import logging as transformers_logging
from transformers.utils.logging import tqdm

from ..assistants import load_head
from ..compilation.kernels import machine_line
from ..data import Conversation, Example, make_example, prepare_dataset, to_tokens
from ..data.batches import TokenBudgetBatches
from ..data.conversations import load_rows
from ..data.image_texts import cast_for, image_inputs, load_processor
from ..data.preparation import shows_images
from ..drafting import FileReading, TrainableModel, TrainableSource
from ..drafting.kinds import kind_of
from ..generation.keywords import SpeculationDefaults
from ..generation.output import end_ids, left_padded, up_to_end
from ..telemetry.display import moving
from ..verifying.forward import FeatureTap
from ..verifying.lending import evaluation_mode
from .diagnosis import Diagnosis, ReadingScore, Tally
from .loading import load_target, questions_in, read_conversations, up_to


_LOOK_ANSWERS, _LOOK_TOKENS = 8, 48  # the first verdict uses up to 8 answers of 48 tokens
_ROUND = 10  # answers between two verdicts
_SECONDS = 45.0  # time limit for scoring answers without `--thorough`; the time to load models does not count
_LONG_TOKENS = 256  # tokens per answer with `--thorough`

DEPTHS = 4  # maximum number of depths to score
_BATCH_TOKENS = 1024  # maximum number of tokens in a forward, since all their logits are in memory


@dataclass(frozen=True, slots=True)
class LabelledText:
    """A prompt, and an answer that the target wrote."""

    tokens: Tensor  # [t] prompt and answer
    prompt_length: int
    shown: dict[str, Tensor] = field(default_factory=dict)  # arguments of the forward for the prompt's images

    def inputs_for(self, target: PreTrainedModel) -> dict[str, Any]:
        """Return the image arguments of a forward over `tokens`, in the target's dtype and on its device."""
        whole = cast_for(target, self.shown)
        names = {name for name in whole if name.endswith("token_type_ids")}
        return whole | {name: whole[name][:, : len(self.tokens)] for name in names}


# source(first, end, most) returns the answers number `first` to `end` - 1, of at most `most` new tokens each.
Source = Callable[[int, int, int], list[LabelledText]]


@torch.no_grad()
def write_answers(
    target: PreTrainedModel, prompts: Sequence[Tensor], max_new_tokens: int, batch: int = 10
) -> list[LabelledText]:
    """Let `target` answer prompts `[s]` by greedy search, `batch` prompts at once; return prompts and answers."""
    ends = end_ids(target)
    answers = []
    for first in range(0, len(prompts), batch):
        some = [prompt.to(target.device) for prompt in prompts[first : first + batch]]
        ids, mask = left_padded(some)
        width = ids.shape[1]
        with SpeculationDefaults.suspended():
            written = target.generate(  # type: ignore[operator]  # PreTrainedModel does not declare GenerationMixin
                ids, attention_mask=mask, do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=0
            ).cpu()
        for row, prompt in zip(written, some, strict=True):
            end = width + len(up_to_end(row[width:], ends))
            answers.append(LabelledText(row[width - len(prompt) : end], len(prompt)))
    return answers


class Probe:
    """Scores a head under several interpretations of its checkpoint ("readings"), on answers passed to `add`.

    Nothing is generated: head and target predict the tokens of existing answers. Beyond the first depth the head reads
    its own outputs in place of features, as in EAGLE-3's training-time test (arXiv 2503.01840, section 3.2). The first
    of `readings` is the configured one; `None` tests all. Raises a `ValueError` if the head is for another target.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        head: TrainableSource,
        readings: Sequence[FileReading] | None = None,
        *,
        has_images: bool = False,
    ) -> None:
        whole, unroll = head.whole(target), kind_of(head).unroll
        assert unroll is not None
        self._unroll: Callable[..., Tensor] = unroll.load()
        chosen = head.readings(target, whole, has_images=has_images) if readings is None else readings
        self._target = target
        self._trials = []
        for reading in chosen:
            own = head.read_as(reading, target, whole)
            # not prepacked: that would copy the weights for each interpretation, and saves no time in large batches
            drafter = own.bind(target, own)  # type: ignore[arg-type]  # a module, too
            self._trials.append(_TriedReading(reading, own, drafter))
        self._depths = min(DEPTHS, *(trial.drafter.most_levels or DEPTHS for trial in self._trials))
        self._seen = 0

    @property
    def is_ready(self) -> bool:
        """Whether a diagnosis is possible: at least two answers were long enough to score."""
        return len(self._trials[0].tallies) > 1

    @torch.no_grad()
    def add(self, answers: Sequence[LabelledText]) -> None:
        """Score the head's predictions against the target's on more `answers`; skip answers that are too short."""
        self._seen += len(answers)
        depths = self._depths
        long_enough = [answer for answer in answers if len(answer.tokens) - max(answer.prompt_length, 2) >= depths]
        layers = sorted({layer for trial in self._trials for layer in trial.head.feature_layers})
        with evaluation_mode(self._target):
            for batch in _batches(long_enough, depths):
                for is_before in sorted({trial.head.before_deepstack for trial in self._trials}):
                    with FeatureTap(self._target, layers, before_deepstack=is_before) as tap:
                        self._add(batch, tap)

    def _add(self, batch: "_ScoredTexts", tap: FeatureTap) -> None:
        """Run the target over a batch; score each interpretation whose head reads the features that `tap` records."""
        tokens = batch.tokens.to(self._target.device)
        given = {}
        if batch.shown is not None:
            given = {"attention_mask": torch.ones_like(tokens), **batch.shown.inputs_for(self._target)}
        with tap.record() as features:
            picks = self._target(input_ids=tokens, use_cache=False, **given).logits.argmax(-1)
        for trial in self._trials:
            if trial.head.before_deepstack is tap.before_deepstack:
                device, dtype = trial.drafter.device, trial.drafter.dtype
                caught = [features.caught[layer].to(device, dtype) for layer in trial.head.feature_layers]
                self._score(trial, torch.cat(caught, dim=-1), batch, picks.to(device))

    def _score(self, trial: "_TriedReading", features: Tensor, batch: "_ScoredTexts", picks: Tensor) -> None:
        """Score a batch with the head of `trial`, and add the scores to `trial`; `picks` are the target's argmax."""
        drafter, draft_ids, depths = trial.drafter, trial.head.draft_token_ids, self._depths
        start = int(batch.scored.any(0).int().argmax())  # the first scored position
        scored = batch.scored[:, start:].to(features.device)
        tokens = batch.tokens.to(features.device)
        slots = torch.arange(start, batch.scored.shape[1], device=features.device).expand(len(scored), -1)
        hidden = self._unroll(drafter, features, tokens, depths, slots)  # [depths, b, slots, h], normed
        hits, log_probs = [], []
        for depth in range(depths):
            logits = drafter.normed_logits(hidden[depth][scored], min(depth, drafter.depths - 1))
            wanted = F.pad(picks[:, start + 1 + depth :], (0, 1 + depth))[scored]  # the token after t + 1 + depth
            rows = torch.searchsorted(draft_ids, wanted).clamp(max=len(draft_ids) - 1)
            likely = logits.gather(1, rows[:, None])[:, 0] - logits.logsumexp(-1)
            log_probs.append(likely * (draft_ids[rows] == wanted))
            hits.append(drafter.target_ids(logits.argmax(-1)) == wanted)
        agreed, counts = torch.stack(hits).int().cpu(), scored.sum(1).tolist()  # [depths, positions of all answers]
        kept = agreed.cumprod(0).sum(0).split(counts)  # a token is accepted only if all tokens before it are
        nats = torch.stack(log_probs).sum(0).cpu().split(counts)
        answers = zip(counts, kept, nats, strict=True)
        trial.tallies += [Tally(count, int(tokens.sum()), float(sums.sum())) for count, tokens, sums in answers]
        trial.agreed = trial.agreed + agreed.sum(1)

    def follow(self, readings: Sequence[FileReading]) -> None:
        self._trials = [trial for trial in self._trials if trial.reading in readings]

    def diagnosis(self) -> Diagnosis:
        """Compare the interpretations on all answers passed to `add`; raise `ValueError` unless `is_ready`."""
        tallied = len(self._trials[0].tallies)
        if not self.is_ready:
            raise ValueError(
                f"{tallied} of {self._seen} answers have at least {self._depths} tokens of the target, but at least "
                "2 are needed. Pass about 50 answers."
            )
        return Diagnosis(tuple(trial.score() for trial in self._trials))


@dataclass(slots=True)
class _TriedReading:
    """The head under one interpretation of its checkpoint (`reading`), with the results so far."""

    reading: FileReading
    head: TrainableSource
    drafter: TrainableModel
    tallies: list[Tally] = field(default_factory=list)
    agreed: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.long))  # [depths]

    def score(self) -> ReadingScore:
        share = self.agreed / sum(tally.positions for tally in self.tallies)
        return ReadingScore(self.reading, tuple(share.tolist()), tuple(self.tallies))


@dataclass(frozen=True, slots=True)
class _ScoredTexts:
    """A right-padded batch of answers; it needs no mask, because causal attention ignores later positions."""

    tokens: Tensor  # [b, t]
    scored: Tensor  # [b, t] bool: positions to score, where the tokens to predict at all depths lie in the answer
    shown: LabelledText | None = None  # the answer, if the batch is a single answer about images


def _batches(answers: list[LabelledText], depths: int) -> Iterator[_ScoredTexts]:
    """Group answers into padded batches of at most `_BATCH_TOKENS` tokens; an answer about images stays alone."""
    yield from (replace(_pad([answer], depths), shown=answer) for answer in answers if answer.shown)
    others = [answer for answer in answers if not answer.shown]
    for rows in TokenBudgetBatches([len(answer.tokens) for answer in others], _BATCH_TOKENS, shuffle=False):
        yield _pad([others[row] for row in rows], depths)


def _pad(answers: list[LabelledText], depths: int) -> _ScoredTexts:
    tokens = pad_sequence([answer.tokens.cpu() for answer in answers], batch_first=True)
    first = torch.tensor([max(answer.prompt_length, 2) - 2 for answer in answers])[:, None]
    end = torch.tensor([len(answer.tokens) - depths for answer in answers])[:, None]
    slots = torch.arange(tokens.shape[1])
    return _ScoredTexts(tokens, (slots >= first) & (slots < end))


def refined(
    target: PreTrainedModel,
    head: TrainableSource,
    source: Source,
    count: int,
    max_new_tokens: int,
    *,
    has_images: bool = False,
    seconds: float = math.inf,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Diagnosis]:
    """Diagnose `head` on a few short answers from `source`, then on more and longer ones; yield each diagnosis.

    After the first diagnosis, interpretations of the checkpoint that score far worse are dropped. If later answers are
    longer, the first are discarded. Stops when the result is settled, after `count` answers, or after `seconds`.
    """
    probe, found, deadline = Probe(target, head, has_images=has_images), None, clock() + seconds
    start, end, most, is_look = 0, min(count, _LOOK_ANSWERS), min(max_new_tokens, _LOOK_TOKENS), True
    while start < count:
        began = clock()
        probe.add(source(start, end, most))
        per_answer = (clock() - began) / (end - start) * max_new_tokens / most
        start = end
        if probe.is_ready or (start == count and most == max_new_tokens):
            found = probe.diagnosis()
            yield found
            if found.is_settled:
                return
        if is_look:
            followed, is_look = None if found is None else found.worth_following, False
            if most < max_new_tokens:
                probe, start, most = Probe(target, head, followed, has_images=has_images), 0, max_new_tokens
            elif followed is not None:
                probe.follow(followed)
        left = max(deadline - clock(), 0.0)
        fitting = _ROUND if per_answer * _ROUND <= left else int(left / per_answer)
        if found is not None and not fitting:
            return
        end = min(start + max(fitting, 1), count)


def run(args: argparse.Namespace) -> int:
    """Print how well the head agrees with its target under each interpretation of its checkpoint.

    Returns 1 if another interpretation is better than the configured one, 130 after Ctrl-C or SIGTERM, else 0.
    """
    if not sys.stderr.isatty():  # do not write bars into a log: each round's verdict shows the progress
        transformers_logging.disable_progress_bar()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: schedulers send SIGTERM before a kill
    target = load_target(args.target, args.dtype, args.device, quantization=args.quantization)
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    given = {"revision": args.revision, **corrections(args.set)}
    head = load_head(args.head, target, **given)
    most = args.max_new_tokens or (_LONG_TOKENS if args.thorough else _LOOK_TOKENS)
    answers = about_images(args, target, tokenizer, most)
    has_images = bool(answers)
    conversations = [] if has_images else read_conversations(args, args.answers)
    answers = answers or answered(conversations, tokenizer, args.max_length, most)
    questions = [] if answers else questions_in(conversations, args.answers)
    prompts = [to_tokens(question, tokenizer)[-args.max_length :] for question in questions]
    count, tried, found, status = len(answers or prompts), 0, None, 0
    how_long = "to the end" if args.thorough else "within a minute"
    promise = f"A first verdict comes from a few answers, better ones from up to {count}, {how_long}; Ctrl-C ends it."
    print(promise, file=sys.stderr, flush=True)
    with tqdm(desc="Answers", total=count, unit="answer") as bar:
        source, seconds = source_of(target, answers, prompts, bar), math.inf if args.thorough else _SECONDS
        try:
            for found in refined(target, head, source, count, most, has_images=has_images, seconds=seconds):
                tried = max(tried, len(found.scores))
                bar.clear()
                print(f"{found.answers}/{count} answers: {found.verdict}", file=sys.stderr, flush=True)
        except KeyboardInterrupt as interrupt:
            if found is None:
                raise KeyboardInterrupt("before the first verdict") from interrupt
            status = 130
    assert found is not None
    if args.json:
        print(json.dumps(told(found)))
    else:
        print_diagnosis(found, tried)
        if not args.thorough:
            print("`--thorough` reads all answers, and long ones: a wrong RoPE base shows on these alone.")
    return status or int(not found.is_healthy)


def told(diagnosis: Diagnosis) -> dict[str, Any]:
    """Convert a diagnosis to JSON values; interpretations with the most accepted tokens come first."""
    scores = sorted(diagnosis.scores, key=lambda score: -score.accepted)
    return {
        "verdict": diagnosis.verdict,
        "is_healthy": diagnosis.is_healthy,
        "has_evidence": diagnosis.has_evidence,
        "answers": diagnosis.answers,
        "overrides": diagnosis.overrides,
        "machine": machine_line(),
        "readings": [
            asdict(score.reading)
            | {
                "is_configured": score is diagnosis.configured,
                "is_best": score is diagnosis.best,
                "agreement": score.agreement,
                "accepted": score.accepted,
                "log_likelihood": score.log_prob,
            }
            for score in scores
        ],
    }


def source_of(target: PreTrainedModel, answers: list[LabelledText], prompts: list[Tensor], bar: Any) -> Source:
    """Return a `Source` of `answers` or, if there are none, of the target's answers to `prompts`; it updates `bar`."""
    place = 0

    def source(first: int, end: int, most: int) -> list[LabelledText]:
        nonlocal place
        bar.update(first - place)
        place = first
        if answers:
            return [replace(text, tokens=text.tokens[: text.prompt_length + most]) for text in answers[first:end]]
        with moving(bar, target, end - first, most):
            place = end
            return write_answers(target, prompts[first:end], most)

    return source


def corrections(settings: Sequence[str]) -> dict[str, Any]:
    """Parse each `FIELD=VALUE` (a JSON value) as an override of the head's config; raise `ValueError` if invalid."""
    found = {}
    for setting in settings:
        field, separator, value = setting.partition("=")
        try:
            found[field.replace("-", "_")] = json.loads(value.lower() if value in ("True", "False") else value)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"`--set {setting}` cannot be read. Write FIELD=VALUE with a JSON value, for example "
                "rope_theta=1e4, norm_before_residual=true or feature_layers=[2,16,29]."
            ) from error
    return found


def answered(
    conversations: list[Conversation], tokenizer: PreTrainedTokenizerBase, max_length: int, max_new_tokens: int
) -> list[LabelledText]:
    """Tokenize each conversation up to the end of its first assistant turn; drop conversations without such a turn."""
    cut = [turns for conversation in conversations if len(turns := up_to(conversation, "assistant")) > 1]
    examples = [make_example(turns, tokenizer, max_length) for turns in cut]
    return [first_answer(example, max_new_tokens) for example in examples if example.loss_mask.any()]


def about_images(
    args: argparse.Namespace, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, most: int
) -> list[LabelledText]:
    """Read the first answers of `--dataset`, each up to `most` tokens, if its rows have images; else return `[]`."""
    if not args.dataset or "image" not in target.input_modalities or find_spec("datasets") is None:
        return []
    file = Path(args.dataset)
    if file.is_file() and '"image' not in file.read_text(encoding="utf-8", errors="ignore"):
        return []
    rows = load_rows(args.dataset, args.split)
    if not shows_images(rows):
        return []
    processor = load_processor(target)
    how = {"max_length": args.max_length, "vocab_size": target.config.get_text_config().vocab_size}
    few = rows.select(range(min(len(rows), args.answers)))
    prepared = prepare_dataset(few, args.dataset, tokenizer, processor=processor, **how)
    return [first_answer(Example.of_row(row), most, processor) for row in prepared]


def first_answer(example: Example, max_new_tokens: int, processor: ProcessorMixin | None = None) -> LabelledText:
    """Cut an example after `max_new_tokens` tokens of its first answer; `processor` makes inputs for its images."""
    start = int(example.loss_mask.int().argmax())
    end = start + min(int(example.loss_mask[start:].int().cumprod(0).sum()), max_new_tokens)
    shown = None if example.pictures is None else example.pictures.before(start)
    inputs = {} if processor is None else image_inputs([shown], processor, end)
    return LabelledText(example.input_ids[:end], start, inputs)


def print_diagnosis(diagnosis: Diagnosis, tried: int) -> None:
    """Print the verdict and a table of scores, best first; `tried` counts all interpretations, dropped ones, too."""
    configured = diagnosis.configured
    print(f"{diagnosis.verdict}\n\nRead on {machine_line()}.")
    print(f"\nAgreement with the target, at {configured.positions} positions of {diagnosis.answers} answers:\n")
    columns = "".join(f"  depth {depth}" for depth in range(1, len(configured.agreement) + 1))
    widths = {
        name: max(len(name), *(len(one.reading.told[name]) for one in diagnosis.scores))
        for name in configured.reading.told
    }
    names = "  ".join(f"{name:{width}}" for name, width in widths.items())
    print(f"  {names}{columns}  accepted  log likelihood")
    for score in sorted(diagnosis.scores, key=lambda score: -score.accepted):
        marks = (">" if score is configured else " ") + ("*" if score is diagnosis.best else " ")
        settings = "  ".join(f"{score.reading.told[name]:{width}}" for name, width in widths.items())
        numbers = "".join(f"{share:9.3f}" for share in score.agreement)
        print(f"{marks}{settings}{numbers}{score.accepted:10.2f}{score.log_prob:16.3f}")
    dropped = tried - len(diagnosis.scores)
    left_out = f"   {dropped} readings were far worse on the first answers" if dropped else ""
    print(f"\n  > as configured   * best{left_out}")
