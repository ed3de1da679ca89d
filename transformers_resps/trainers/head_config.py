"""The settings of `DraftHeadTrainer`, and whether bf16 autocast is faster on this machine."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames
from transformers.utils.import_utils import is_torch_bf16_gpu_available

from ..compat import cpu_flags
from ..drafting.kinds import KINDS
from .base import InitKwargs, check_count, check_mapping, check_setting, option


MUON = "muon"
_TRANSFORMERS_BATCH_SIZE = 8
_LEAST = {"draft_vocab_size": 0, "tokens_per_batch": 2, "ttt_steps": 1, "loss_chunk_size": 1, "tau_texts": 0}


@dataclass
class DraftHeadTrainingConfig(TrainingArguments):
    """Settings of `DraftHeadTrainer`: Transformers' `TrainingArguments` plus settings for training draft heads.

    `tokens_per_batch` sets the batch size; setting `per_device_train_batch_size` or `per_device_eval_batch_size`
    raises a `ValueError`.

    Source: EAGLE-3 (arXiv 2503.01840) section 3.2; `ttt_steps` and `ttt_step_decay` default to its code's values.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs", "target_init_kwargs"]

    learning_rate: float = option(2e-3, "Peak learning rate of Muon, whose updates are scaled to fit, and of AdamW.")
    logging_steps: float = option(10, "Optimiser steps between two lines of metrics.")
    max_grad_norm: float = option(0.5, "Largest gradient norm; EAGLE-3 uses 0.5.")
    lr_scheduler_type: str = option("cosine", "Any learning rate schedule of Transformers.")
    bf16: bool | None = option(  # type: ignore[assignment]  # as in TRL
        None, "Autocast to bf16; by default where that is faster on this machine."
    )
    optim: OptimizerNames | str = option(MUON, "muon (AdamW for what is no matrix), or any optimiser of Transformers.")
    adam_beta2: float = option(0.95, "AdamW's decay rate of squares; EAGLE-3 uses 0.95.")
    model_init_kwargs: InitKwargs = option(None, "For a new or loaded head: fields of its config, revision, ...")
    target_init_kwargs: InitKwargs = option(None, "For a loaded target: dtype (default auto), revision, ...")
    new_head: str = option(
        "eagle3", "Kind of a new head: eagle3; block, which drafts ttt_steps tokens in one pass; or mtp (one layer)."
    )
    draft_vocab_size: int = option(8192, "Tokens a new head can propose: the most used in the answers; 0 for all.")
    max_length: int | None = option(1024, "Maximum length of a text in tokens; longer ones are cut. None: no maximum.")
    dataset_num_proc: int | None = option(None, "Processes that tokenize the datasets.")
    feature_cache_dir: str | None = option(None, "Cache the target's features in this folder.")
    tokens_per_batch: int = option(2048, "Tokens per batch and device, padding included; texts are not split.")
    ttt_steps: int = option(7, "Levels of the training-time test: how deep the head learns to draft.")
    ttt_step_decay: float = option(0.8, "Weight of the loss of level k is ttt_step_decay ** k.")
    anchor_share: float = option(0.5, "Share of an answer's tokens below which a block is learned in each epoch.")
    loss_chunk_size: int = option(1024, "Positions whose logits (two fp32 buffers x draft vocabulary) exist at once.")
    freeze_output_head: bool = option(True, "Do not train the output head: a third less work, less overfitting.")
    tau_texts: int = option(8, "Held-out texts for simulating the default tree's tau at each evaluation; 0 for none.")

    def __post_init__(self) -> None:
        if self.bf16 is None:
            self.bf16 = not self.fp16 and prefers_bf16(use_cpu=self.use_cpu)
        if not torch.accelerator.is_available():
            self.use_cpu = True  # Transformers refuses bf16 on a CPU unless `use_cpu` is set
        optim, self.optim = self.optim, OptimizerNames.ADAMW_TORCH if self.optim == MUON else self.optim
        super().__post_init__()  # type: ignore[no-untyped-call]  # untyped upstream
        self.optim = MUON if optim == MUON else self.optim
        self.remove_unused_columns = False
        self.label_names = ["labels"]
        accelerator: Any = self.accelerator_config
        accelerator.dispatch_batches = False  # a stream's batches differ in size, so no process can split them for all
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # DDP does not see that later levels use parameters
        self._check()

    def _check(self) -> None:
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size"):
            is_default = getattr(self, name) == _TRANSFORMERS_BATCH_SIZE
            check_setting(self, name, is_default, "left out: `tokens_per_batch` says how large a batch is")
        for name, least in _LEAST.items():
            check_count(self, name, least)
        for name, least in {"max_length": 3, "dataset_num_proc": 1}.items():
            if getattr(self, name) is not None:
                check_count(self, name, least, " or None")
        *words, last = [f'"{kind.new}"' for kind in KINDS if kind.new]
        is_known = self.new_head in [kind.new for kind in KINDS if kind.new]
        check_setting(self, "new_head", is_known, f"{', '.join(words)} or {last}")
        for name in ("ttt_step_decay", "anchor_share"):
            check_setting(self, name, 0 < getattr(self, name) <= 1, "above 0 and at most 1")
        for name in ("model_init_kwargs", "target_init_kwargs"):
            check_mapping(self, name)
        has_own = "draft_vocab_size" not in (self.model_init_kwargs or {})
        check_setting(self, "model_init_kwargs", has_own, "without `draft_vocab_size`, a setting of its own")


_UNITS = {"avx512_bf16", "amx_bf16"}  # CPU instructions that multiply bf16; other CPUs convert to fp32 and back.


def prefers_bf16(*, use_cpu: bool = False) -> bool:
    """Return whether the training device multiplies bf16 in hardware; otherwise autocast is no faster than fp32."""
    if use_cpu or not torch.accelerator.is_available():
        return bool(_UNITS & cpu_flags())
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if torch.backends.mps.is_available():
        return False  # emulated before M3, and no faster than fp32 on M3 and later
    return bool(is_torch_bf16_gpu_available())
