"""Trains a draft head on a target's probabilities; the loss of a batch is in `objectives`."""

import copy
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, set_seed
from transformers.utils.logging import tqdm

from ..calibration import device_name
from ..compat import unwrapped
from ..data import DraftVocabulary, training_prompts_of, vocabulary_of, write_training_prompts
from ..data.batches import IGNORED, PreparedTexts, StreamedBatches
from ..drafting import TrainableSource
from ..drafting.kinds import KINDS, kind_of
from ..heads import DraftHead
from ..verifying.lending import evaluation_mode
from ..verifying.prepacking import prepack
from .base import ArtefactTrainer, add_metrics, check_type
from .data import HeadTexts, check_dataset, counted_examples, is_streamed, questions_in
from .features import FrozenTarget, TargetFeatures
from .head_config import MUON, DraftHeadTrainingConfig
from .loading import as_target, default_folder, load_named_head, new_head
from .muon import muon_for
from .objectives import Objective
from .tau import simulated_tau


logger = logging.getLogger(f"transformers.{__name__}")

_UPDATE = 1.1  # about: seconds of an optimiser step over those of its forward and backward passes


class DraftHeadTrainer(ArtefactTrainer):
    """Trains a `DraftHead`, `BlockHead` or `MtpHead` by soft cross entropy with the target's probabilities.

    The arguments are those of TRL's `SFTTrainer` plus the target. A dataset has the column `messages`, or `prompt` and
    `completion`, or `text`, or `input_ids` with `assistant_masks` or `completion_mask`. Conversations are formatted
    with the tokenizer's chat template. Only the assistant's turns, or the completions, have a loss.

    A checkpoint contains only the head, and the head's `from_pretrained` loads it. A finished run writes the head in
    bf16 to `OUTPUT_DIR/head`, with hashes of the training prompts.

    Args:
        model: the head, a PEFT model of it, its folder or Hub id, or "mtp" for the target's own MTP layers; `None` for
            a new head, whose draft vocabulary is the most frequent tokens of the training data.
        args: the settings; the default writes to the folder `TARGET-head`.
        train_dataset: a `Dataset`, or an `IterableDataset`, which needs `max_steps`.
        eval_dataset: held-out texts: a dataset or a dict of datasets.
        processing_class: the target's tokenizer; by default loaded from the target's folder or repository.
        peft_config: for example a `LoraConfig`: trains adapters, which are merged into the saved head.
        target: the model to draft for, or its folder or Hub id; it is neither trained nor saved.
        kwargs: passed to `transformers.Trainer`.

    Raises a `ValueError` if the head was made for another target, or if an argument cannot be used.

    Source: EAGLE-3 (arXiv 2503.01840) section 3.2; for block heads DFlash (arXiv 2602.06036) section 3.
    """

    args: DraftHeadTrainingConfig
    artefact_name = "head"

    def __init__(
        self,
        model: TrainableSource | str | None,
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
        _check_arguments(model, args, train_dataset, peft_config)
        set_seed(args.seed)
        loaded = as_target(target, cast(Any, args.target_init_kwargs))
        if isinstance(target, str) and loaded.dtype is torch.float32 and args.device.type == "cpu":
            prepack(loaded)  # a sixth faster in fp32; a model of the caller stays unchanged
        settings: dict[str, Any] = cast(Any, args.model_init_kwargs) or {}
        head: Any = model
        if isinstance(model, str):
            head = load_named_head("model", model, loaded, **{"dtype": torch.float32, **settings})
        if head is not None:
            unwrapped(head).check_target(loaded)
        self._data = HeadTexts(loaded, processing_class, args)
        self.tokenizer = self._data.tokenizer
        rows = self._data.prepare(train_dataset, "train_dataset")
        held_out = self._data.prepare(eval_dataset, "eval_dataset")
        if head is None:
            examples = [] if rows is None else counted_examples(rows)
            head = new_head(loaded, examples, self.tokenizer, args, **settings)
        elif rows is not None:  # raises if the draft vocabulary has no token of the answers
            vocabulary_of(unwrapped(head), counted_examples(rows))
        self._origin: str = unwrapped(head).name_or_path  # folder or Hub id; empty for a new head
        if peft_config is not None:
            from peft import get_peft_model

            head = get_peft_model(head, peft_config)
        freeze_output_head(unwrapped(head), args.freeze_output_head)
        objective = cast(Any, kind_of(unwrapped(head)).objective).load()
        objective.check(unwrapped(head), args)
        kwargs.setdefault("data_collator", self._data.collate)
        super().__init__(head, args, train_dataset=rows, eval_dataset=held_out, callbacks=callbacks, **kwargs)
        self.model_accepts_loss_kwargs = True  # the loss is divided by the step's number of predicted tokens
        loaded.to(args.device)  # type: ignore[arg-type]  # stubs lose `device` behind a decorator
        self.target = FrozenTarget(loaded, self.head.feature_layers, before_deepstack=self.head.before_deepstack)
        self._objective: Objective = objective(self.target, args)
        self._meters = {"train": LevelMeter(args.ttt_steps), "eval": LevelMeter(args.ttt_steps)}
        self._speed = RunSpeed()
        self._train_texts: PreparedTexts | StreamedBatches | None = None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        whole = self.accelerator.unwrap_model(self.model)
        if isinstance(whole, TrainableSource):
            whole.load_checkpoint(resume_from_checkpoint, self.target.model)
        else:  # with PEFT, a checkpoint contains only the adapters
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if isinstance(self.accelerator.unwrap_model(self.model), TrainableSource):
            self._load_from_checkpoint(str(self.state.best_model_checkpoint))
        else:
            super()._load_best_model()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        whole = self.accelerator.unwrap_model(self.model)
        is_known = isinstance(whole, PreTrainedModel)  # Transformers saves other modules without a config
        if isinstance(whole, TrainableSource) and not is_known and self.args.should_save:
            whole.save_pretrained(str(output_dir or self.args.output_dir))

    @property
    def head(self) -> Any:
        """The head in training, without the wrappers of PEFT and of distributed training."""
        return unwrapped(self.accelerator.unwrap_model(self.model))

    def draft_vocabulary(self) -> DraftVocabulary:
        """Return the tokens that the head can propose, and their share of all answer tokens in `train_dataset`."""
        return vocabulary_of(self.head, counted_examples(self.train_dataset))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._speed, self._meters["train"] = RunSpeed(), LevelMeter(self.args.ttt_steps)
        return super().train(*args, **kwargs)

    def seconds_per_step(self, timed: int = 3) -> float:
        """Estimate an optimiser step's seconds from the passes of `timed` steps; no weight changes.

        Afterwards call `train`, which starts the counts of its log anew.
        """
        model, batches, seconds = cast(nn.Module, self.model), self.args.gradient_accumulation_steps, list[float]()
        model.train()
        for inputs in islice(self.get_train_dataloader(), (timed + 1) * batches):
            began = time.monotonic()
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, self._prepare_inputs(inputs))
            loss.backward()
            seconds.append(time.monotonic() - began)
        model.zero_grad()
        counted = seconds[batches:] or seconds  # the first step is slow
        return _UPDATE * batches * sum(counted) / len(counted)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the sum of losses over levels and tokens, divided by the number of tokens predicted in the step."""
        if model.training:
            self._speed.start(self.state.global_step)  # earlier, a resumed run does not know its step
        is_predicted = inputs["labels"] != IGNORED
        if "features" in inputs:
            outputs = TargetFeatures(inputs["features"], inputs["hidden"], inputs["picks"].long())
        else:
            outputs = self.target.run(inputs["input_ids"], is_predicted, inputs.get("image_inputs"))
        with self.accelerator.autocast():
            found = self._objective(self.head, model, inputs["input_ids"], is_predicted, outputs)
        loss, losses, hits, predicted = found
        self._meters["train" if model.training else "eval"].add(losses, hits, predicted, inputs["input_ids"].numel())
        count = predicted[0] if num_items_in_batch is None else num_items_in_batch
        counted_together = num_items_in_batch is not None and self.args.average_tokens_across_devices
        loss = loss / count * (self.accelerator.num_processes if counted_together else 1)
        return (loss, {}) if return_outputs else loss

    def evaluation_loop(self, dataloader: DataLoader[Any], *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluate as in Transformers; also compute how often each level agrees with the target, and simulate tau."""
        began = time.monotonic()
        self._meters["eval"] = LevelMeter(self.args.ttt_steps)
        output = super().evaluation_loop(dataloader, *args, **kwargs)
        metrics, _ = self._meters["eval"].summary(self._over_processes)
        if self.args.tau_texts:  # every process needs tau, to know the best checkpoint
            started = time.monotonic()
            metrics |= {"tau": self._tau(dataloader.dataset), "tau_seconds": round(time.monotonic() - started, 1)}
        prefix = kwargs.get("metric_key_prefix", "eval")  # Transformers passes it by name
        cast(dict[str, float], output.metrics).update({f"{prefix}_{key}": v for key, v in metrics.items()})
        self._speed.pause(time.monotonic() - began)
        return output

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate as in Transformers; after training also write `metrics.json` into the head's folder."""
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        rows: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        is_result = self._is_trained and not self.is_in_train and self.args.should_save and metric_key_prefix == "eval"
        if is_result and not isinstance(rows, dict) and not is_streamed(rows):
            of_levels = [name for name in metrics if name.startswith("eval_accuracy_")]
            agreement = {name.removeprefix("eval_accuracy_"): metrics[name] for name in of_levels}
            result = {"held_out_texts": len(rows), "agreement": agreement}
            if "eval_tau" in metrics:
                tree = str(replace(self.head.default_shape, lookup=0))  # the trees of `simulated_tau`
                count = min(self.args.tau_texts, len(rows))
                result |= {"tau_texts": count, "simulated_tau": {tree: metrics["eval_tau"]}}
            add_metrics(self.artefact_folder, result)
        return metrics

    def metrics(self) -> dict[str, Any]:
        training: dict[str, Any] = {"steps": self.state.global_step}
        vocabulary: dict[str, Any] = {"draft_vocab_size": len(self.head.draft_token_ids)}
        rows: Any = self.train_dataset
        if not is_streamed(rows):
            training |= {"texts": len(rows), "epochs": round(self.state.epoch or 0.0, 3)}
            vocabulary["coverage"] = self.draft_vocabulary().coverage
        if self._timing.seconds is not None:
            training["minutes"] = round(self._timing.seconds / 60, 1)
        dtype = "bfloat16" if self.args.bf16 else "float32"
        return {**vocabulary, "training": training | {"dtype": dtype, "device": device_name(self.target.model.device)}}

    def models(self) -> dict[str, str | None]:
        return {"target": self.head.target.get("name_or_path"), "head": self._origin or None}

    def _tau(self, texts: Any) -> float:
        """Simulate tau (tokens per target forward) of the head's default tree, on a sample of `tau_texts` texts."""
        is_shared_out = not isinstance(texts, PreparedTexts | StreamedBatches)  # a wrapped stream
        rows = map(self._with_features, (texts.dataset if is_shared_out else texts).some(self.args.tau_texts))
        is_quiet = self.args.disable_tqdm or not self.is_world_process_zero()
        bar = tqdm(rows, "Simulating tau", self.args.tau_texts, leave=False, disable=is_quiet)
        head = self.head
        with evaluation_mode(head), bar:
            return round(simulated_tau(head, self.target.model, bar, head.default_shape), 3)

    def _with_features(self, row: dict[str, Any]) -> dict[str, Tensor]:
        tensors = {name: tensor.to(self.args.device) for name, tensor in row.items() if name != "pictures"}
        if "features" not in tensors:
            shown = self._data.collate([row]).get("image_inputs")
            tensors["features"] = self.target.run(tensors["input_ids"][None], image_inputs=shown).features[0]
        return tensors

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any) -> Any:
        """Return only the loss, because the logits of a whole batch would not fit into memory."""
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            agreement, tokens = self._meters["train"].summary(self._over_processes)
            logs |= agreement | self._speed.lap(tokens, self.state.global_step, self.state.max_steps)
            self._meters["train"] = LevelMeter(self.args.ttt_steps)
        super().log(logs, start_time)

    def _over_processes(self, sums: Tensor) -> Tensor:
        if self.accelerator.num_processes == 1:
            return sums
        return self.accelerator.reduce(sums.to(self.args.device), "sum").cpu()

    def get_train_dataloader(self) -> DataLoader[Any]:
        if self.train_dataset is None:
            raise ValueError("`train_dataset` is missing, but training needs texts. Pass a `Dataset`.")
        if self._train_texts is None:
            self._train_texts = self._data.texts(self.train_dataset, self.target)
        if not self._origin and self.is_world_process_zero():
            warn_if_small(self._positions(self._train_texts))
        return self._loader(self._train_texts, shuffle=True)

    def _positions(self, texts: PreparedTexts | StreamedBatches) -> int:
        """Estimate how many positions (tokens of texts) the run trains on, over all epochs and processes."""
        args = self.args
        if isinstance(texts, PreparedTexts) and args.max_steps <= 0:
            return int(args.num_train_epochs * sum(texts.lengths))
        return int(args.max_steps * args.gradient_accumulation_steps * args.world_size * args.tokens_per_batch)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            dataset = cast(Any, self.eval_dataset)[dataset]
        if dataset is None:
            raise ValueError("`eval_dataset` is missing, but evaluation needs held-out texts. Pass a `Dataset`.")
        rows = self._data.prepare(dataset, "eval_dataset")
        return self._loader(self._data.texts(rows, self.target), shuffle=False)

    def _loader(self, texts: PreparedTexts | StreamedBatches, *, shuffle: bool) -> DataLoader[Any]:
        return self.accelerator.prepare(self._data.loader(texts, self.data_collator, shuffle=shuffle))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.args.optim != MUON or self.optimizer_cls_and_kwargs is not None:
            return super().create_optimizer(model)
        if self.optimizer is None:
            self.optimizer = muon_for(cast(nn.Module, model or self.model), self.args)
        return self.optimizer

    def plain_card(self, repo_id: str) -> str:
        return self.head.plain_card(repo_id)

    def write_artefact(self, folder: Path) -> None:
        """Write the head in bf16, and hashes of the prompts that it was trained on."""
        save_head(self.accelerator.unwrap_model(self.model), folder)
        earlier = training_prompts_of(self._origin) if self._origin else None
        streamed = self._train_texts.questions if isinstance(self._train_texts, StreamedBatches) else set()
        asked = streamed | questions_in(self.train_dataset) | questions_in(self.eval_dataset)
        write_training_prompts(folder, asked, earlier=earlier or ())


def _check_arguments(model: Any, args: DraftHeadTrainingConfig, train_dataset: Any, peft_config: Any) -> None:
    """Raise `ValueError` for wrong arguments, before anything is loaded."""
    check_type("args", args, DraftHeadTrainingConfig)
    if model is not None and not isinstance(model, str):
        if isinstance(unwrapped(model), PreTrainedModel) and not isinstance(unwrapped(model), TrainableSource):
            raise ValueError(
                f"`model` is a {type(unwrapped(model)).__name__}, but must be the draft head to train. Pass this "
                "model as `target`, and `None` as `model` for a new head."
            )
        check_type("model", unwrapped(model), *(kind.source.load() for kind in KINDS if kind.objective))
        if args.model_init_kwargs:
            raise ValueError("`model_init_kwargs` is set, but `model` is a loaded head. Leave one of them out.")
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
    if train_dataset is None or not is_streamed(train_dataset):
        return
    if args.max_steps <= 0:
        raise ValueError(
            "`train_dataset` is an `IterableDataset`, whose length is not known before its end. Set `max_steps`."
        )
    if args.feature_cache_dir is not None:
        raise ValueError(
            "`feature_cache_dir` is set, but features of an `IterableDataset` are not cached. Leave it out, or pass a "
            "`Dataset`."
        )


def freeze_output_head(head: TrainableSource, is_frozen: bool) -> None:
    """Freeze the head's output rows if `is_frozen`; raise `ValueError` if the head does not allow this choice."""
    if not (head.output_heads or is_frozen):
        raise ValueError(
            "`freeze_output_head` is false, but the head borrows its output head from the target, which is never "
            "trained. Leave it true, or start from a head with a draft vocabulary of its own."
        )
    if not (head.output_heads and is_frozen):
        return
    config = head.config if isinstance(head, DraftHead) else None
    if config and config.hidden_size != config.target_hidden_size and config.source is None:
        raise ValueError(
            f"`freeze_output_head` is true, but this head's output rows are {config.hidden_size} wide, the target's "
            f"{config.target_hidden_size}, so they cannot be copied and must be trained. "
            "Pass `freeze_output_head=False`."
        )
    for output in head.output_heads:
        output.requires_grad_(False)


def save_head(model: Any, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write a copy of a head or of its PEFT model to `folder` in `dtype`, with adapters merged into its weights."""
    head = copy.deepcopy(model)
    if hasattr(head, "merge_and_unload"):
        head = head.merge_and_unload()
    head.to(dtype).save_pretrained(folder)


MIN_USEFUL_TOKENS = 1_000_000
_MEASURED = "1.6 after 150,000, 1.8 after 390,000, 1.9 after 560,000"  # SmolLM2-135M-Instruct, its own outputs, Muon


def warn_if_small(tokens: int) -> bool:
    """Warn, and return true, if a run of `tokens` positions is too short to train a useful head."""
    if tokens >= MIN_USEFUL_TOKENS:
        return False
    logger.warning(
        f"This run sees {tokens:,} positions, but a useful head needs about {MIN_USEFUL_TOKENS:,} (tau of an 8-node "
        f"tree on a 135M chat model was {_MEASURED}; plain decoding is 1). Use more conversations, best of all "
        "answers that the target itself generates, rather than more epochs, which overfit."
    )
    return True


class LevelMeter:
    """Sums each level's loss, and how often the head's best token is the target's best.

    A best token of the target that is outside the draft vocabulary counts as a miss, as in decoding.
    """

    def __init__(self, levels: int) -> None:
        self._sums = torch.zeros(3, levels, dtype=torch.float64)  # losses, hits, predicted tokens
        self._tokens = 0

    def add(self, losses: Tensor, hits: Tensor, predicted: Tensor, tokens: int) -> None:
        """Add a batch: each level's `losses`, `hits` and `predicted` tokens, `[k]` each, and the batch's `tokens`."""
        self._sums += torch.stack([losses, hits, predicted]).detach().to("cpu", torch.float64)
        self._tokens += tokens

    def summary(self, over_processes: Callable[[Tensor], Tensor]) -> tuple[dict[str, float], int]:
        """Return a dict `loss_1`, `accuracy_1`, `accuracy_2`, ..., and the token count, summed by `over_processes`."""
        everything = over_processes(torch.cat([self._sums.flatten(), torch.tensor([float(self._tokens)])]))
        losses, hits, predicted = everything[:-1].view_as(self._sums)
        agreement = (hits / predicted.clamp(min=1)).tolist()
        first_loss = float(losses[0] / predicted[0].clamp(min=1))
        accuracies = {f"accuracy_{level}": round(share, 4) for level, share in enumerate(agreement, start=1)}
        return {"loss_1": round(first_loss, 4), **accuracies}, int(everything[-1])


class RunSpeed:
    """Measures tokens per second between two calls of `lap`, and estimates the remaining minutes."""

    def __init__(self) -> None:
        self._since: tuple[float, int] | None = None  # time and step at the last call of `start` or `lap`

    def start(self, step: int) -> None:
        """Start the clock at the first call; later calls do nothing."""
        self._since = self._since or (time.monotonic(), step)

    def pause(self, seconds: float) -> None:
        if self._since is not None:
            self._since = self._since[0] + seconds, self._since[1]

    def lap(self, tokens: int, step: int, max_steps: int) -> dict[str, float]:
        """Return `tokens_per_second` and `minutes_left` from `tokens` since the last call; `{}` if no step was run."""
        now = time.monotonic()
        (before, first), self._since = self._since or (now, step), (now, step)
        if step <= first:
            return {}
        left = (max_steps - step) * (now - before) / (step - first)
        return {"tokens_per_second": round(tokens / (now - before), 1), "minutes_left": round(left / 60, 1)}
