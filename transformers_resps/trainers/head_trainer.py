"""Train a draft head on a target's own distribution; the maths is in `training_time_test` and `soft_cross_entropy`."""

import copy
import time
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from ..compat import unwrapped
from ..data.batches import IGNORED, TokenBudgetBatches, collate
from ..data.examples import check_token_ids
from ..head import BoundHead, DraftHead, DraftHeadConfig
from .artefact_trainer import ArtefactTrainer
from .checks import check_kinds
from .feature_cache import ExampleDataset
from .head_config import DraftHeadTrainingConfig
from .metrics import LevelMeter, Pace
from .muon import Muon, parameter_groups
from .simulated_decoding import simulated_tau
from .soft_cross_entropy import soft_cross_entropy
from .target_features import FrozenTarget, TargetFeatures
from .training_time_test import pack, unroll
from .warnings import warn_if_small


class DraftHeadTrainer(ArtefactTrainer):
    """Trains a `DraftHead` on a target's outputs: EAGLE-3's training-time test with a soft cross-entropy loss.

    Checkpoints hold the head alone and load with `DraftHead.from_pretrained`; `OUTPUT_DIR/head` is the head of
    the finished run, in bf16.

    Args:
        model: the head, or a PEFT model of it.
        target: the model it drafts for; it is neither trained nor saved.
        args: see `DraftHeadTrainingConfig`.
        train_dataset: `ExampleDataset` (the target runs on each batch) or `CachedFeatures`.
        eval_dataset: the same kinds, with held-out texts.
        peft_config: trains adapters instead, for instance `LoraConfig`.
        kwargs: passed to `transformers.Trainer`.

    Raises:
        ValueError: the head was made for another target, or an argument has the wrong type.

    Source: EAGLE-3 (arXiv 2503.01840) section 3.2.
    """

    args: DraftHeadTrainingConfig
    artefact_name = "head"

    def __init__(
        self,
        model: DraftHead,
        target: PreTrainedModel,
        args: DraftHeadTrainingConfig,
        train_dataset: ExampleDataset | None = None,
        eval_dataset: ExampleDataset | None = None,
        *,
        peft_config: Any = None,
        **kwargs: Any,
    ) -> None:
        _check_arguments(model, args, train_dataset=train_dataset, eval_dataset=eval_dataset)
        if peft_config is not None:
            from peft import get_peft_model

            model = cast(DraftHead, get_peft_model(model, peft_config))
        bound = BoundHead(unwrapped(model), target)
        if bound.head.config.owns_output_head and args.freeze_output_head:
            _check_trained_rows(bound.head.config)
            bound.head.lm_head.requires_grad_(False)
        if not (bound.head.config.owns_output_head or args.freeze_output_head):
            raise ValueError(
                "`freeze_output_head` is false, but the head borrows its output head from the target, which is never "
                "trained. Leave it true, or start from a head with a draft vocabulary of its own."
            )
        super().__init__(
            model=model,
            args=args,
            data_collator=kwargs.pop("data_collator", collate),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            **kwargs,
        )
        self.model_accepts_loss_kwargs = True  # the loss is divided by the whole step's count of predicted tokens
        target.to(args.device)  # type: ignore[arg-type]  # stubs lose `device` behind a decorator
        self.target = FrozenTarget(target, list(bound.head.config.feature_layers or []))
        self._meters = {"train": LevelMeter(args.steps), "eval": LevelMeter(args.steps)}
        self._pace = Pace()

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
        levels = torch.arange(self.args.steps, device=places.device)[:, None]
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
                self.args.steps,
                packed,
                first_pass=model,
            )
        loss, losses, hits = soft_cross_entropy(
            hidden[levels, rows, columns],  # [k, m, h]
            bound.output_weight,
            self.target.teacher(read.hidden[rows, places - 1], token_ids),
            (self.args.step_decay**levels * exists[:, learnt]).float(),
            self.args.loss_chunk_size,
            bound.output_bias,
        )
        return loss, losses, hits, exists.sum(-1)

    def _read(self, inputs: dict[str, Tensor]) -> TargetFeatures:
        if "features" in inputs:
            return TargetFeatures(inputs["features"], inputs["hidden"], inputs["picks"].long())
        return self.target.read(inputs["input_ids"], inputs["labels"] != IGNORED)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Loss and top-1 agreement on the held-out texts, and `eval_tau` of the default tree on some of them."""
        metrics = super().evaluate(*args, **kwargs)
        if self.args.tau_texts:  # in every process: each of them looks for the best metric
            started = time.monotonic()
            metrics["eval_tau"] = self.measure_tau()
            self.log({"eval_tau": metrics["eval_tau"], "eval_tau_seconds": round(time.monotonic() - started, 1)})
        return metrics

    def measure_tau(self) -> float:
        """Simulated tau of the default tree on `tau_texts` held-out texts, evenly spread over their lengths."""
        dataset = self.eval_dataset
        if not isinstance(dataset, ExampleDataset):
            return 1.0
        by_length = sorted(range(len(dataset)), key=lambda index: len(dataset.examples[index].input_ids))
        count = min(self.args.tau_texts, len(dataset))
        chosen = [by_length[index * len(dataset) // count] for index in range(count)]
        head = unwrapped(self.accelerator.unwrap_model(self.model))
        is_training = head.training
        head.train(False)
        bound = BoundHead(head, self.target.model)
        texts = (self._with_features(dataset[index]) for index in chosen)
        tau = round(simulated_tau(bound, texts, head.default_shape), 3)
        head.train(is_training)
        return tau

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
        """Add top-1 agreement per level, tokens per second and time left to Trainer's own metrics."""
        is_eval = any(key.startswith("eval_") for key in logs)
        meter = self._meters["eval" if is_eval else "train"]
        if meter.tokens:
            prefix = "eval_" if is_eval else ""
            logs |= {prefix + key: value for key, value in meter.read().items()}
            if not is_eval:
                logs |= self._pace.read(meter.tokens, self.state.global_step, self.state.max_steps)
            meter.reset()
        super().log(logs, start_time)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches of a token budget."""
        if self.train_dataset is None:
            raise ValueError("`train_dataset` is missing, but training needs texts. Pass an `ExampleDataset`.")
        return self._loader(self.train_dataset, shuffle=True)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Batches of a token budget, in a fixed order."""
        dataset = eval_dataset if isinstance(eval_dataset, ExampleDataset) else self.eval_dataset
        if dataset is None:
            raise ValueError(
                "`eval_dataset` is missing, but evaluation needs held-out texts. Pass an `ExampleDataset`."
            )
        return self._loader(dataset, shuffle=False)

    def _loader(self, dataset: Any, *, shuffle: bool) -> DataLoader[Any]:
        lengths = [len(example.input_ids) for example in dataset.examples]
        if shuffle:
            steps_hold = self.args.max_steps * self.args.tokens_per_batch * self.args.gradient_accumulation_steps
            steps_hold *= self.args.world_size
            warn_if_small(steps_hold if self.args.max_steps > 0 else int(self.args.num_train_epochs * sum(lengths)))
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        batches = TokenBudgetBatches(lengths, self.args.tokens_per_batch, seed=seed, shuffle=shuffle)
        loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return cast(DataLoader[Any], self.accelerator.prepare(loader))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Muon for the matrices and AdamW for the rest, or AdamW for all."""
        if self.optimizer is None:
            trained = cast(nn.Module, model or self.model)
            self.optimizer = Muon(
                parameter_groups(trained, use_muon=self.args.optimizer == "muon"),
                lr=self.args.learning_rate,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                weight_decay=self.args.weight_decay,
                eps=self.args.adam_epsilon,
            )
        return self.optimizer

    def write_artefact(self, folder: Path) -> None:
        """Write the head in bf16."""
        save_head(self.accelerator.unwrap_model(self.model), folder)


def save_head(model: Any, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write a head to `folder` in `dtype`, with adapters merged; the model in memory stays unchanged."""
    head = copy.deepcopy(model)
    if hasattr(head, "merge_and_unload"):
        head = head.merge_and_unload()
    head.to(dtype).save_pretrained(folder)


def _check_trained_rows(config: DraftHeadConfig) -> None:
    """A fresh head of another width than its target has random output rows."""
    if config.hidden_size != config.target_hidden_size and config.source is None:
        raise ValueError(
            f"`freeze_output_head` is true, but this head's output rows are {config.hidden_size} wide, the target's "
            f"{config.target_hidden_size}, so they cannot be copied and must be trained. "
            "Pass `freeze_output_head=False`."
        )


def _check_arguments(model: Any, args: Any, **datasets: ExampleDataset | None) -> None:
    given = {name: dataset for name, dataset in datasets.items() if dataset is not None}
    kinds: dict[str, Any] = {"model": (unwrapped(model), DraftHead), "args": (args, DraftHeadTrainingConfig)}
    check_kinds("DraftHeadTrainer", **kinds, **{name: (dataset, ExampleDataset) for name, dataset in given.items()})
    for dataset in given.values():
        check_token_ids(dataset.examples, unwrapped(model).config.vocab_size)
