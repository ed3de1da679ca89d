"""The settings of `DraftHeadTrainer`."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from .checks import check_setting


@dataclass
class DraftHeadTrainingConfig(TrainingArguments):
    """Settings of `DraftHeadTrainer`: Transformers' `TrainingArguments` and those of EAGLE-3's training-time test.

    Batches are filled up to `tokens_per_batch`, so `per_device_train_batch_size` is not used.

    Raises:
        ValueError: a setting is out of its range.

    Source: EAGLE-3 (arXiv 2503.01840) section 3.2; the defaults for levels and weights are those of its code. Draft
    levels are called `steps` here, as in published recipes.
    """

    learning_rate: float = field(
        default=2e-3,
        metadata={"help": "Peak learning rate of both Muon and AdamW (Muon's updates are scaled to fit)."},
    )
    logging_steps: float = field(default=20, metadata={"help": "Optimiser steps between two lines of metrics."})
    max_grad_norm: float = field(default=0.5, metadata={"help": "Largest gradient norm; EAGLE-3 uses 0.5."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Any learning rate schedule of Transformers."})
    bf16: bool = field(
        default=False,
        metadata={"help": "Autocast to bf16: faster on GPUs, slower than fp32 on CPUs without bf16."},
    )
    steps: int = field(
        default=7, metadata={"help": "Levels of the training-time test: how deep the head learns to draft."}
    )
    step_decay: float = field(default=0.8, metadata={"help": "Weight of the loss of level k is step_decay ** k."})
    tokens_per_batch: int = field(
        default=2048, metadata={"help": "Tokens per batch and device, padding included; texts are not split."}
    )
    loss_chunk_size: int = field(
        default=1024,
        metadata={
            "help": "Positions whose logits are in memory at once: two fp32 buffers of this x draft vocabulary."
        },
    )
    freeze_output_head: bool = field(
        default=True,
        metadata={"help": "Do not train the output head (the target's rows): a third less work, less overfitting."},
    )
    tau_texts: int = field(
        default=8,
        metadata={"help": "Held-out texts for simulating the default tree's tau at each evaluation; 0 for none."},
    )
    optimizer: str = field(
        default="muon",
        metadata={"help": "muon: orthogonalised momentum for the matrices, AdamW for the rest. adamw: AdamW for all."},
    )
    adam_beta2: float = field(default=0.95, metadata={"help": "AdamW's decay rate of squares; EAGLE-3 uses 0.95."})

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]  # untyped upstream
        self.remove_unused_columns = False
        self.label_names = ["labels"]
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # levels run outside the wrapper, which would count them as unused
        for name, least in (("steps", 1), ("tokens_per_batch", 2), ("loss_chunk_size", 1)):
            check_setting(self, name, getattr(self, name) >= least, f"at least {least}")
        check_setting(self, "step_decay", 0 < self.step_decay <= 1, "above 0 and at most 1")
        check_setting(self, "optimizer", self.optimizer in ("muon", "adamw"), "`muon` or `adamw`")
