"""Train a draft head on a target's own distribution; the maths is in `training_time_test` and `soft_cross_entropy`."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
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
from ..data.batches import IGNORED, collate
from ..data.texts import PreparedTexts, StreamedBatches
from ..head import BoundHead, DraftHead
from .artefact_trainer import ArtefactTrainer
from .draft_table import DraftTable
from .head_arguments import check_arguments, check_checkpoint
from .head_config import MUON, DraftHeadTrainingConfig
from .head_saving import save_head
from .head_start import start_head
from .head_texts import counted_examples, positions_seen, questions_in, some_texts, token_budget_loader
from .loading import default_folder
from .metrics import LevelMeter, Pace
from .muon import muon_for
from .simulated_decoding import simulated_tau
from .soft_cross_entropy import soft_cross_entropy
from .target_features import FrozenTarget, TargetFeatures
from .training_time_test import pack, unroll
from .warnings import warn_if_small


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
