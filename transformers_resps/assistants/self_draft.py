"""Draft with the target's own weights, rounded to 4 bits: any model gets a drafter without a download.

Loading rounded weights takes a fraction of a step's time, and the rounded model mostly picks the target's tokens
(ML-SpecQD, arXiv 2503.13565). It attends to the target's own keys and values, so it needs no prefill of its own.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..compilation.few_bits import Codes, few_bits
from ..compilation.kernels import reads_few_bits
from ..drafting import Committed, DraftCall, Drafter, DraftRequest, DraftSource
from ..drafting.step_model import likeliest
from ..tree import CandidatePool, TreeShape
from ..verifying.hybrids import is_recurrent
from ..verifying.slots.steps import RoundedSteps


class SelfDraft(DraftSource):
    """Drafts for `target` with its own weights, rounded to 4 bits and stored with the target's compiled code.

    Each level costs a pass over all rounded weights, so only the likeliest token of a level gets children. The level's
    next likeliest tokens become nodes, too, because they cost nothing.
    """

    needs_compiled = True

    def __init__(self, target: PreTrainedModel) -> None:
        self.prepare(target)

    @property
    def default_shape(self) -> TreeShape:
        return TreeShape(8, 4, 2)

    def prepare(self, target: PreTrainedModel) -> None:
        has_4_bits = any(
            found.kind is not Codes.INT8 for found in map(few_bits, target.modules()) if found is not None
        )
        obstacles = {
            "its weights have 4 bits already, so a draft costs what it saves": has_4_bits,
            "it is an encoder-decoder": target.config.is_encoder_decoder,
            "it has recurrent layers, whose states would have to be kept": is_recurrent(target),
            f"its dtype is {target.dtype}, not bfloat16": target.dtype is not torch.bfloat16,
            "this machine reads no weights of 4 bits: that needs a CPU with AVX512-BF16 and AVX512-VBMI": (
                target.device.type != "cpu" or not reads_few_bits()
            ),
        }
        for obstacle, stands in obstacles.items():
            if stands:
                raise ValueError(
                    f"A {type(target).__name__} cannot draft for itself (`assistant_model='self'`): {obstacle}. Pass "
                    "a head or a smaller model, or `policy='auto'` alone, which drafts by lookup."
                )

    def fingerprint(self) -> str:
        return "0" * 16

    def identity(self) -> dict[str, Any]:
        return {"name_or_path": "self"}

    def drafter(self, call: DraftCall) -> "SelfDrafter":
        steps = None if call.verifier is None else call.verifier.rounded
        if steps is None:
            raise ValueError(
                "Another call runs the compiled code of this model, which `assistant_model='self'` needs. Call "
                "`generate` when it has ended, or pass `policy='plain'`."
            )
        return SelfDrafter(steps, call.target.config.get_text_config(decoder=True).vocab_size)


class SelfDrafter(Drafter):
    """Drafts a chain of likeliest tokens with rounded weights, and adds each level's next likeliest tokens."""

    def __init__(self, steps: RoundedSteps, vocabulary: int) -> None:
        self._steps, self.proposable_tokens = steps, vocabulary

    def draft(self, input_ids: Tensor, request: DraftRequest) -> CandidatePool:
        tokens, before = input_ids[:, -1], torch.zeros(len(input_ids), 1)
        parent, width = -1, request.shape.top_k
        found = list[tuple[Tensor, Tensor, int]]()
        for level in range(request.shape.depth):
            scores, ids = likeliest(self._steps.logits(tokens, level), width)
            before = before + scores
            found.append((ids, before, parent))
            parent, tokens, before = level * width, ids[:, 0], before[:, :1]
            if request.goes_on is not None and not request.goes_on(level + 1, before):
                break
        ids, paths = (
            torch.cat(parts, dim=1) for parts in zip(*((one, other) for one, other, _ in found), strict=True)
        )
        parents = torch.tensor([parent for _, _, parent in found]).repeat_interleave(width).expand_as(ids)
        levels = torch.arange(1, len(found) + 1).repeat_interleave(width)
        return CandidatePool(ids, parents, paths, levels)

    def observe(self, committed: Committed) -> None:
        """Do nothing, since the verifier's cache has the text."""

    def take_compile_seconds(self) -> float:
        return self._steps.take_compile_seconds()

    def keep_rows(self, rows: list[int]) -> None:
        """Do nothing, since the verifier drops the other rows."""
