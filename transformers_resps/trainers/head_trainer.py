"""Mean acceptance length of a head on existing texts: the engine's own drafting, without a target forward.

A table of what the head drafts on some texts while it is trained, like TRL's table of completions.

What is logged while a head is trained: agreement per draft level, speed, time left.

Warn before a run that is too small.

Write a trained head as it is served.

Check what a `DraftHeadTrainer` is given, before it loads or reads anything.

Everything that the training of a head starts from, loaded, checked and prepared.

Train a draft head on a target's own distribution; the maths is in `training_time_test` and `soft_cross_entropy`.
"""

import copy
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, set_seed
from transformers.utils.logging import tqdm

from ..compat import unwrapped
from ..data import DraftVocabulary, training_prompts_of, vocabulary_of, write_training_prompts
from ..data.batches import IGNORED, PreparedTexts, StreamedBatches, collate
from ..drafting.head_drafter import TreeCandidateGenerator
from ..heads import BoundHead, DraftHead, DraftHeadConfig
from ..policies import FixedPolicy
from ..replay import RecordedText, ReplayedStep, decode_again
from ..tree import TreeShape
from ..verifying.prepacking import prepack
from .base import ArtefactTrainer, check_dataset, check_kinds
from .features import FrozenTarget, TargetFeatures
from .head_config import MUON, DraftHeadTrainingConfig
from .head_texts import HeadTexts, counted_examples, positions_seen, questions_in, some_texts, token_budget_loader
from .loading import default_folder, load_head, load_target, new_head
from .losses import pack, soft_cross_entropy, unroll
from .muon import muon_for


@torch.no_grad()
def simulated_tau(bound: BoundHead, texts: Iterable[dict[str, Tensor]], shape: TreeShape) -> float:
    """Simulate tau, the mean acceptance length: tokens per target forward when `shape` is drafted at every step.

    Exact for texts that the target itself wrote, greedily or sampled.

    Args:
        bound: the head with what it borrows from its target.
        texts: each with `input_ids` and `loss_mask` `[t]`, and `features` `[t, F]`. The last run of true `loss_mask`
            is the output, and its first token comes from prefill.
        shape: nodes, depth and width of every tree; its `lookup` is not simulated.

    Returns:
        Tau, at least 1; 1 without texts.
    """
    policy, emitted = FixedPolicy(replace(shape, lookup=0)), []
    for text in texts:
        known, generator = after_prompt(bound, text, spare_room=shape.depth)
        emitted += [step.accepted + 1 for step in decode_again(known, policy, generator)]
    return sum(emitted) / len(emitted) if emitted else 1.0


def output_start(text: dict[str, Tensor]) -> int:
    """Where the output of a text begins, see `simulated_tau`."""
    mask = text["loss_mask"]
    return 1 if mask.all() else int((~mask).nonzero()[-1]) + 1


def after_prompt(
    bound: BoundHead, text: dict[str, Tensor], spare_room: int
) -> tuple[RecordedText, TreeCandidateGenerator]:
    """A text whose prompt the head has observed, but for the last position; `spare_room` lets no tree be cut."""
    tokens, features, begins = text["input_ids"], text["features"], output_start(text)
    generator = TreeCandidateGenerator(bound, 1, None)
    if begins > 1:
        generator.observe(features[None, : begins - 1], tokens[None, 1:begins])
    return RecordedText(tokens, begins, features[begins - 1 : len(tokens) - 2], {}, spare_room), generator


_TOKENS = 32  # of the answer that are drafted
_PROMPT_TOKENS = 24  # of the prompt that are shown


@dataclass(frozen=True, slots=True)
class DraftedStep:
    """What the head drafted in one step, along the text and one token further.

    Attributes:
        accepted: tokens that the text follows.
        rejected: the token that the head thought likeliest after them; `None` if it drafted none.
    """

    accepted: list[int]
    rejected: int | None


@torch.no_grad()
def drafted_steps(bound: BoundHead, text: dict[str, Tensor], shape: TreeShape) -> list[DraftedStep]:
    """Decode the beginning of a text's answer again with trees of `shape`.

    Args:
        bound: the head with what it borrows from its target.
        text: see `simulated_tau`.
        shape: of every tree; its `lookup` is not used.
    """
    begin = {name: tensor[: output_start(text) + _TOKENS + 1] for name, tensor in text.items()}
    known, generator = after_prompt(bound, begin, spare_room=shape.depth)
    policy = FixedPolicy(replace(shape, lookup=0))
    return [_drafted(step, known.input_ids) for step in decode_again(known, policy, generator)]


def _drafted(step: ReplayedStep, text: Tensor) -> DraftedStep:
    tree = step.proposal.tree
    accepted: list[int] = text[step.root + 1 :][: step.accepted].tolist()
    (children,), node = tree.children(), 0
    for token in accepted:
        node = children[node, token]
    next_ones = [
        (float(tree.scores[0, child]), token) for (parent, token), child in children.items() if parent == node
    ]
    missed = int(text[step.root + step.accepted + 1])
    rejected = [token for _, token in sorted(next_ones, reverse=True) if token != missed]
    return DraftedStep(accepted, rejected[0] if rejected else None)


class DraftTable:
    """Prints what a head drafts on the same few texts.

    Args:
        texts: see `simulated_tau`.
        tokenizer: the target's.
    """

    def __init__(self, texts: Sequence[dict[str, Tensor]], tokenizer: PreTrainedTokenizerBase) -> None:
        self._texts, self._tokenizer = texts, tokenizer

    def print(self, bound: BoundHead, step: int) -> None:
        """Print prompts, answers, drafts and tau of each text.

        Args:
            bound: the head with what it borrows from its target.
            step: of the training.
        """
        from rich.console import Console
        from rich.panel import Panel
        from rich.table import Table

        table = Table("Prompt", "Answer", "Head drafted", "Tau", header_style="bold", expand=True)
        table.columns[-1].justify = "right"
        for text in self._texts:
            table.add_row(*self._row(bound, text))
            table.add_section()
        title = f"Step {step}: [green]accepted[/] and [red strike]rejected[/] tokens; | separates steps"
        Console().print(Panel(table, title=title))

    def _row(self, bound: BoundHead, text: dict[str, Tensor]) -> tuple[Any, ...]:
        from rich.text import Text

        begins, tokens = output_start(text), text["input_ids"].tolist()
        steps = drafted_steps(bound, text, bound.head.default_shape)
        drafts = Text()
        for one in steps:
            drafts.append("|" if drafts else "", "dim")
            drafts.append(self._words(one.accepted), "green")
            if one.rejected is not None:
                drafts.append(self._words([one.rejected]), "red strike")
        emitted = sum(len(one.accepted) + 1 for one in steps)
        return (
            Text(self._words(tokens[max(begins - _PROMPT_TOKENS, 0) : begins]), "yellow"),
            Text(self._words(tokens[begins : begins + _TOKENS])),
            drafts,
            f"{emitted / max(len(steps), 1):.2f}",
        )

    def _words(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens)).replace("\n", "⏎")


class LevelMeter:
    """Loss and top-1 agreement with the target's pick, by level, since the last reset.

    Tokens whose pick is outside the draft vocabulary count as misses: they are misses when decoding.
    """

    def __init__(self, levels: int) -> None:
        self._levels = levels
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._sums = torch.zeros(3, self._levels, dtype=torch.float64)  # losses, hits, predicted tokens
        self._tokens = 0

    def add(self, losses: Tensor, hits: Tensor, predicted: Tensor, tokens: int) -> None:
        """Add a batch: per level `[k]` the summed loss, hits and predicted tokens; and the tokens of the batch."""
        self._sums += torch.stack([losses, hits, predicted]).detach().to("cpu", torch.float64)
        self._tokens += tokens

    def read(self, over_processes: Callable[[Tensor], Tensor] = lambda sums: sums) -> tuple[dict[str, float], int]:
        """`loss_1`, `accuracy_1`, `accuracy_2`, ... for levels counted from 1, and the tokens of all batches.

        Args:
            over_processes: adds up a tensor over all processes.
        """
        everything = over_processes(torch.cat([self._sums.flatten(), torch.tensor([float(self._tokens)])]))
        losses, hits, predicted = everything[:-1].view_as(self._sums)
        agreement = (hits / predicted.clamp(min=1)).tolist()
        first_loss = float(losses[0] / predicted[0].clamp(min=1))
        return {"loss_1": round(first_loss, 4)} | {
            f"accuracy_{level}": round(share, 4) for level, share in enumerate(agreement, start=1)
        }, int(everything[-1])


class Pace:
    """The speed of a run since the last line of metrics, and when it will end."""

    def __init__(self) -> None:
        self._since: tuple[float, int] | None = None  # seconds and step

    def start(self, step: int) -> None:
        """Note when the first step that is measured begins; later calls do nothing."""
        self._since = self._since or (time.monotonic(), step)

    def pause(self, seconds: float) -> None:
        """Leave out seconds in which nothing was trained."""
        if self._since is not None:
            self._since = self._since[0] + seconds, self._since[1]

    def read(self, tokens: int, step: int, max_steps: int) -> dict[str, float]:
        """`tokens_per_second` and `minutes_left` after the `tokens` since the last line; empty after no step."""
        now = time.monotonic()
        (before, first), self._since = self._since or (now, step), (now, step)
        if step <= first:
            return {}
        left = (max_steps - step) * (now - before) / (step - first)
        return {"tokens_per_second": round(tokens / (now - before), 1), "minutes_left": round(left / 60, 1)}


logger = logging.getLogger(f"transformers.{__name__}")

MIN_USEFUL_TOKENS = 1_000_000

# Positions trained on -> tau of an 8-node tree, SmolLM2-135M-Instruct, its own outputs, Muon.
_MEASURED = ((150_000, 1.6), (390_000, 1.8), (560_000, 1.9))


def warn_if_small(tokens: int) -> bool:
    """Warn if a run over `tokens` positions, epochs included, is too small for a useful head; return whether it is."""
    if tokens >= MIN_USEFUL_TOKENS:
        return False
    measured = ", ".join(f"{tau} after {seen:,}" for seen, tau in _MEASURED)
    logger.warning(
        "This run sees %s positions, but a useful head needs about %s (tau of an 8-node tree on a 135M chat model was "
        "%s; plain decoding is 1). Use more conversations, best of all the target's own outputs, "
        "rather than more epochs, which overfit.",
        f"{tokens:,}",
        f"{MIN_USEFUL_TOKENS:,}",
        measured,
    )
    return True


def save_head(model: Any, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write a head to `folder` in `dtype`, with adapters merged; the model in memory stays unchanged."""
    head = copy.deepcopy(model)
    if hasattr(head, "merge_and_unload"):
        head = head.merge_and_unload()
    head.to(dtype).save_pretrained(folder)


def freeze_output_head(head: DraftHead, is_frozen: bool) -> None:
    """Freeze the output rows of a head, or leave them to be trained.

    Raises:
        ValueError: they cannot be frozen, or not be trained.
    """
    config: DraftHeadConfig = head.config
    if not (config.owns_output_head or is_frozen):
        raise ValueError(
            "`freeze_output_head` is false, but the head borrows its output head from the target, which is never "
            "trained. Leave it true, or start from a head with a draft vocabulary of its own."
        )
    if not (config.owns_output_head and is_frozen):
        return
    if config.hidden_size != config.target_hidden_size and config.source is None:
        raise ValueError(
            f"`freeze_output_head` is true, but this head's output rows are {config.hidden_size} wide, the target's "
            f"{config.target_hidden_size}, so they cannot be copied and must be trained. "
            "Pass `freeze_output_head=False`."
        )
    head.lm_head.requires_grad_(False)


def check_arguments(model: Any, args: Any, train_dataset: Any, peft_config: Any) -> None:
    """Check what `DraftHeadTrainer` is given before anything is loaded.

    Raises:
        ValueError: an argument has the wrong type, or two of them contradict each other.
    """
    check_kinds("DraftHeadTrainer", args=(args, DraftHeadTrainingConfig))
    if model is not None and not isinstance(model, str):
        if isinstance(unwrapped(model), PreTrainedModel) and not isinstance(unwrapped(model), DraftHead):
            raise ValueError(
                f"`model` is a {type(unwrapped(model)).__name__}, but must be the draft head to train. Pass this "
                "model as `target`, and `None` as `model` for a new head."
            )
        check_kinds("DraftHeadTrainer", model=(unwrapped(model), DraftHead))
        if args.model_init_kwargs:
            raise ValueError("`model_init_kwargs` is set, but `model` is a loaded head. Leave one of them out.")
    if args.log_drafts and find_spec("rich") is None:
        raise ValueError("`log_drafts` needs the package `rich`. Run `pip install 'transformers-resps[train]'`.")
    if model is None and train_dataset is None and args.draft_vocab_size:
        raise ValueError(
            "`model` and `train_dataset` are missing, but the draft vocabulary of a new head is counted over the "
            "training data. Pass `train_dataset`, or `draft_vocab_size=0`."
        )
    if peft_config is not None and (model is None or hasattr(model, "get_base_model")):
        raise ValueError(
            "`peft_config` is set, but adapters need a head to start from that has none yet. Pass the head as `model`."
        )
    if train_dataset is not None:
        check_dataset(train_dataset, "train_dataset", may_stream=True)
        if not hasattr(train_dataset, "__len__"):
            _check_stream(args)


def _check_stream(args: DraftHeadTrainingConfig) -> None:
    if args.max_steps <= 0:
        raise ValueError(
            "`train_dataset` is an `IterableDataset`, whose length is not known before its end. Set `max_steps`."
        )
    if args.feature_cache_dir is not None:
        raise ValueError(
            "`feature_cache_dir` is set, but features of an `IterableDataset` are not cached. Leave it out, or pass a "
            "`Dataset`."
        )


def check_checkpoint(checkpoint: str, config: DraftHeadConfig) -> None:
    """Check that a run may go on from a checkpoint: that its head has the sizes of this one.

    Raises:
        ValueError: it has another draft vocabulary or other layers.
    """
    if not (Path(checkpoint) / "config.json").is_file():  # of adapters, which hold no head
        return
    saved = DraftHeadConfig.from_pretrained(checkpoint)
    for name in ("draft_vocab_size", "feature_layers", "hidden_size", "intermediate_size", "num_hidden_layers"):
        before, now = getattr(saved, name), getattr(config, name)
        if before != now:
            raise ValueError(
                f"{checkpoint} holds a head with {name} {before}, but this run trains one with {now}. Pass the "
                "settings of that run, or another `output_dir`."
            )


@dataclass(frozen=True, slots=True)
class HeadStart:
    """What `DraftHeadTrainer` trains, and on what.

    Attributes:
        model: the head, or a PEFT model of it.
        origin: folder or Hub id that the head came from; empty for a new one.
        target: the loaded model.
        texts: prepares datasets for it.
        train_rows: the prepared training data.
        eval_rows: the prepared held-out data.
    """

    model: Any
    origin: str
    target: PreTrainedModel
    texts: HeadTexts
    train_rows: Any
    eval_rows: Any

    @property
    def head(self) -> DraftHead:
        """The head itself."""
        return cast(DraftHead, unwrapped(self.model))


def start_head(
    model: Any, target: Any, args: DraftHeadTrainingConfig, processing_class: Any, peft_config: Any, **datasets: Any
) -> HeadStart:
    """Load what is named, make what is missing, and prepare `train_dataset` and `eval_dataset`.

    Args:
        model: see `DraftHeadTrainer`, as are the others.
        target: see there.
        args: see there.
        processing_class: see there.
        peft_config: see there.
        datasets: `train_dataset` and `eval_dataset`.

    Raises:
        ValueError: they do not fit together.
    """
    given = cast(Any, args.model_init_kwargs)
    loaded = load_target(target, cast(Any, args.target_init_kwargs))
    if isinstance(target, str) and loaded.dtype is torch.float32:
        prepack(loaded)  # a sixth faster on a CPU, not in bf16; a model of the caller's stays as it is
    head = load_head(model, loaded, given) if isinstance(model, str) else model
    if head is not None:
        unwrapped(head).check_target(loaded)
    texts = HeadTexts(loaded, processing_class, args)
    if args.log_drafts and texts.tokenizer is None:
        raise ValueError("`log_drafts` is set, but there is no tokenizer. Pass the target's as `processing_class`.")
    rows, held_out = (texts.prepare(datasets[name], name) for name in ("train_dataset", "eval_dataset"))
    if head is None:
        examples = [] if rows is None else counted_examples(rows)
        head = new_head(loaded, examples, texts.tokenizer, args.draft_vocab_size, given)
    elif rows is not None:
        vocabulary_of(unwrapped(head), counted_examples(rows))  # a head that could learn nothing is refused
    origin = unwrapped(head).name_or_path
    if peft_config is not None:
        from peft import get_peft_model

        head = get_peft_model(head, peft_config)
    freeze_output_head(BoundHead(unwrapped(head), loaded).head, args.freeze_output_head)
    return HeadStart(head, origin, loaded, texts, rows, held_out)


class DraftHeadTrainer(ArtefactTrainer):
    """Trains a `DraftHead` on a target's outputs: EAGLE-3's training-time test with a soft cross-entropy loss.

    The signature is that of TRL's `SFTTrainer`, and the target. Datasets have the columns `messages`; `prompt` and
    `completion`; `text`; or `input_ids` with `assistant_masks` or `completion_mask`. Conversations get the tokenizer's
    chat template and are learned from where the assistant speaks; prompts are not learned from.

    Checkpoints hold the head alone and load with `DraftHead.from_pretrained`; `OUTPUT_DIR/head` is the head of the
    finished run, in bf16, with the fingerprints of the prompts that it learned from.

    Args:
        model: the head, a PEFT model of it, its folder or Hub id; `None` for a new head, whose draft vocabulary is
            counted over the training data.
        args: see `DraftHeadTrainingConfig`; by default they write into `TARGET-head`.
        train_dataset: a `Dataset`, or an `IterableDataset`, which needs `max_steps`.
        eval_dataset: held-out texts: one of these, or a dict of them.
        processing_class: the target's tokenizer; by default the one that lies where the target came from.
        callbacks: as in Transformers.
        peft_config: trains adapters instead, for instance `LoraConfig`; they are merged into the saved head.
        target: the model it drafts for, or its folder or Hub id; it is neither trained nor saved.
        kwargs: passed to `transformers.Trainer`.

    Raises:
        ValueError: the head was made for another target, or an argument cannot be used.

    Source: EAGLE-3 (arXiv 2503.01840) section 3.2.
    """

    args: DraftHeadTrainingConfig
    artefact_name = "head"

    def __init__(
        self,
        model: DraftHead | str | None,
        args: DraftHeadTrainingConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        callbacks: list[TrainerCallback] | None = None,
        peft_config: Any = None,
        *,
        target: PreTrainedModel | str,
        **kwargs: Any,
    ) -> None:
        args = DraftHeadTrainingConfig(default_folder(target, self.artefact_name)) if args is None else args
        check_arguments(model, args, train_dataset, peft_config)
        set_seed(args.seed)
        given = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
        start = start_head(model, target, args, processing_class, peft_config, **given)
        self._preparation, self._origin = start.texts, start.origin
        self.tokenizer = start.texts.tokenizer
        super().__init__(
            model=start.model,
            args=args,
            data_collator=kwargs.pop("data_collator", collate),
            train_dataset=start.train_rows,
            eval_dataset=start.eval_rows,
            callbacks=callbacks,
            **kwargs,
        )
        self.model_accepts_loss_kwargs = True  # the loss is divided by the whole step's count of predicted tokens
        start.target.to(args.device)  # type: ignore[arg-type]  # stubs lose `device` behind a decorator
        self.target = FrozenTarget(start.target, list(start.head.config.feature_layers or []))
        self._meters = {"train": LevelMeter(args.ttt_steps), "eval": LevelMeter(args.ttt_steps)}
        self._pace = Pace()
        self._train_texts: PreparedTexts | StreamedBatches | None = None
        self._table: DraftTable | None = None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        check_checkpoint(resume_from_checkpoint, self.head.config)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    @property
    def head(self) -> DraftHead:
        """The head in training, without adapters' or processes' wrappers."""
        head: DraftHead = unwrapped(self.accelerator.unwrap_model(self.model))
        return head

    def draft_vocabulary(self) -> DraftVocabulary:
        """The tokens that the head can propose, and the share of the training data's answers that they cover."""
        return vocabulary_of(self.head, counted_examples(self.train_dataset))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in `ArtefactTrainer`."""
        self._pace = Pace()
        return super().train(*args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The weighted loss of all levels, per predicted token of the optimiser step."""
        if model.training:
            self._pace.start(self.state.global_step)  # not earlier: a resumed run knows its step only here
        loss, losses, hits, predicted = self._levels(model, inputs)
        self._meters["train" if model.training else "eval"].add(losses, hits, predicted, inputs["input_ids"].numel())
        count = predicted[0] if num_items_in_batch is None else num_items_in_batch
        counted_together = num_items_in_batch is not None and self.args.average_tokens_across_devices
        loss = loss / count * (self.accelerator.num_processes if counted_together else 1)
        return (loss, {}) if return_outputs else loss

    def _levels(self, model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weighted loss; per level the summed loss, the hits and all predicted tokens, in vocabulary or not."""
        bound = BoundHead(unwrapped(self.accelerator.unwrap_model(model)), self.target.model)
        read = self._read(inputs)
        rows, places = (inputs["labels"] != IGNORED).nonzero(as_tuple=True)  # the n predicted tokens
        levels = torch.arange(self.args.ttt_steps, device=places.device)[:, None]
        slots = places - 2 - levels  # [k, n]
        exists = slots >= 0
        token_ids = bound.head.draft_token_ids
        learnt = torch.isin(read.picks[rows, places - 1], token_ids)  # other picks have no loss at any level
        rows, places, slots = rows[learnt], places[learnt], slots[:, learnt]
        packed, columns = pack(rows, slots, read.picks.shape)
        with self.accelerator.autocast():
            hidden = unroll(
                bound.head,
                read.features.to(bound.head.dtype),
                bound.embed(inputs["input_ids"]),
                self.args.ttt_steps,
                packed,
                first_pass=model,
            )
            loss, losses, hits = soft_cross_entropy(
                hidden[levels, rows, columns],  # [k, m, h]
                bound.output_weight,
                self.target.teacher(read.hidden[rows, places - 1], token_ids),
                (self.args.ttt_step_decay**levels * exists[:, learnt]).float(),
                self.args.loss_chunk_size,
                bound.output_bias,
            )
        return loss, losses, hits, exists.sum(-1)

    def _read(self, inputs: dict[str, Tensor]) -> TargetFeatures:
        if "features" in inputs:
            return TargetFeatures(inputs["features"], inputs["hidden"], inputs["picks"].long())
        return self.target.read(inputs["input_ids"], inputs["labels"] != IGNORED)

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As in Transformers, with agreement per level, and tau of the default tree on some of the texts."""
        began = time.monotonic()
        self._meters["eval"].reset()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        found, _ = self._meters["eval"].read(self._over_processes)
        if self.args.tau_texts:  # in every process: each of them looks for the best metric
            started = time.monotonic()
            found |= {"tau": self._tau(dataloader.dataset), "tau_seconds": round(time.monotonic() - started, 1)}
        cast(dict[str, float], output.metrics).update({f"{metric_key_prefix}_{key}": v for key, v in found.items()})
        self._pace.pause(time.monotonic() - began)
        return output

    def measure_tau(self) -> float:
        """Simulated tau of the default tree on `tau_texts` held-out texts, evenly spread over their lengths."""
        return self._tau(self.get_eval_dataloader().dataset)

    def _tau(self, texts: Any) -> float:
        is_shared_out = not isinstance(texts, PreparedTexts | StreamedBatches)  # a stream, in several processes
        rows = map(self._with_features, (texts.dataset if is_shared_out else texts).some(self.args.tau_texts))
        is_quiet = self.args.disable_tqdm or not self.is_world_process_zero()
        bar = tqdm(rows, "Simulating tau", self.args.tau_texts, leave=False, disable=is_quiet)
        with self._drafting() as bound, bar:
            return round(simulated_tau(bound, bar, bound.head.default_shape), 3)

    @contextmanager
    def _drafting(self) -> Iterator[BoundHead]:
        """The head as it decodes, in evaluation mode."""
        head, is_training = self.head, self.head.training
        head.train(False)
        yield BoundHead(head, self.target.model)
        head.train(is_training)

    def _print_drafts(self) -> None:
        if self._table is None:
            rows: Any = self.train_dataset if self.eval_dataset is None else self.eval_dataset
            texts = list(map(self._with_features, some_texts(rows, self.args.num_drafts_to_print)))
            self._table = DraftTable(texts, cast(PreTrainedTokenizerBase, self.tokenizer))
        with self._drafting() as bound:
            self._table.print(bound, self.state.global_step)

    def _with_features(self, row: dict[str, Tensor]) -> dict[str, Tensor]:
        row = {name: tensor.to(self.args.device) for name, tensor in row.items()}
        if "features" not in row:
            row["features"] = self.target.read(row["input_ids"][None]).features[0]
        return row

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The loss alone: logits of a whole batch would not fit into memory."""
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add agreement per level, tokens per second and time left to Trainer's own metrics of training."""
        if "loss" in logs:
            found, tokens = self._meters["train"].read(self._over_processes)
            logs |= found | self._pace.read(tokens, self.state.global_step, self.state.max_steps)
            self._meters["train"].reset()
        super().log(logs, start_time)
        if "loss" in logs and self.args.log_drafts and self.is_world_process_zero():
            self._print_drafts()

    def _over_processes(self, sums: Tensor) -> Tensor:
        if self.accelerator.num_processes == 1:
            return sums
        return cast(Tensor, self.accelerator.reduce(sums.to(self.args.device), "sum")).cpu()

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches of a token budget."""
        if self.train_dataset is None:
            raise ValueError("`train_dataset` is missing, but training needs texts. Pass a `Dataset`.")
        if self._train_texts is None:
            self._train_texts = self._preparation.texts(self.train_dataset, self.target)
        if not self._origin and self.is_world_process_zero():
            warn_if_small(positions_seen(self._train_texts, self.args))
        return self._loader(self._train_texts, shuffle=True)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Batches of a token budget, in a fixed order."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            dataset = cast(Any, self.eval_dataset)[dataset]
        if dataset is None:
            raise ValueError("`eval_dataset` is missing, but evaluation needs held-out texts. Pass a `Dataset`.")
        rows = self._preparation.prepare(dataset, "eval_dataset")
        return self._loader(self._preparation.texts(rows, self.target), shuffle=False)

    def _loader(self, texts: PreparedTexts | StreamedBatches, *, shuffle: bool) -> DataLoader[Any]:
        loader = token_budget_loader(texts, self.args, cast(Any, self.data_collator), shuffle=shuffle)
        return cast(DataLoader[Any], self.accelerator.prepare(loader))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Muon for the matrices and AdamW for the rest, or any optimiser of Transformers."""
        if self.args.optim != MUON or self.optimizer_cls_and_kwargs is not None:
            return super().create_optimizer(model)
        if self.optimizer is None:
            self.optimizer = muon_for(cast(nn.Module, model or self.model), self.args)
        return self.optimizer

    def plain_card(self, repo_id: str) -> str:
        """The head's own."""
        return self.head.plain_card(repo_id)

    def write_artefact(self, folder: Path) -> None:
        """Write the head in bf16, and the fingerprints of the prompts it learned from."""
        save_head(self.accelerator.unwrap_model(self.model), folder)
        earlier = training_prompts_of(self._origin) if self._origin else None
        streamed = self._train_texts.questions if isinstance(self._train_texts, StreamedBatches) else set()
        asked = streamed | questions_in(self.train_dataset) | questions_in(self.eval_dataset)
        write_training_prompts(folder, asked, earlier=earlier or ())
