"""Prefill the static cache buffers part by part, with the compiled code that also verifies trees."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..forward import Features, TargetForward
from ..hybrids import is_recurrent
from ..masks import longrope_boundary
from ..rows import RowEnds
from ..verifier import read_in_chunks
from .steps import SlotSteps, apart
from .texts import SlotTexts, filled_up, rounded_up


_PART = 256  # Largest number of tokens of a part: larger parts compute too many scores that the mask hides.
# A part's numbers of tokens and slots are multiples of these, because oneDNN takes time to prepare each new size.
_PART_STEP, _PART_WINDOW = 4, 32
_PACKED_STEP = 16  # If several rows are packed into one row, its number of tokens is a multiple of this.


def reads_compiled(forward: TargetForward, rows: RowEnds) -> bool:
    """Whether compiled code can read the prompt: only on a CPU, if position id minus slot is constant in each row.

    Returns false for recurrent layers, which need Transformers' scans, and for 'longrope', whose frequencies depend on
    the prompt's length, so that one forward must process the whole prompt.
    """
    target = forward.target
    if rows.device.type != "cpu" or is_recurrent(target) or longrope_boundary(target.config) is not None:
        return False
    start, end = rows.length, rows.prompt_length
    stands = rows.positions[..., start:] == torch.arange(start, end) + rows.shift
    seen = rows.prompt_mask(end)
    return bool((stands if seen is None else stands | (seen[:, start:] == 0)).all())


class PartReader:
    """Prefills prompts with the compiled code of `SlotSteps`; only the last token's logits are computed."""

    def __init__(self, forward: TargetForward, texts: SlotTexts, steps: SlotSteps) -> None:
        self._forward, self._texts, self._steps = forward, texts, steps

    def read(self, tokens: Tensor, chunk_size: int | None) -> tuple[Tensor, list[Features]]:
        return read_in_chunks(self._texts.rows, tokens, chunk_size, self._read_chunk)

    def _read_chunk(self, tokens: Tensor, start: int) -> tuple[Tensor, Features]:
        size = -(-tokens.shape[1] // -(-tokens.shape[1] // _PART))  # parts of about the same size
        layers, caught = self._forward.layers, list[dict[int, Tensor]]()
        for place in range(0, tokens.shape[1], size):
            logits, part = self._steps.run(self.inputs(tokens[:, place : place + size], start + place))
            logits = logits[0, : self._texts.count, None] if self._steps.pricing.packs_rows else logits
            caught.append({layer: states[:, :size] for layer, states in part.caught.items()})
        if len(caught) > 1:
            caught = [{layer: torch.cat([part[layer] for part in caught], dim=1) for layer in layers}]
        read = {layer: states[:, : tokens.shape[1]] for layer, states in caught[0].items()}
        return logits, Features(layers, read)

    def inputs(self, tokens: Tensor, start: int) -> list[Tensor]:
        """Make inputs for `tokens` `[b, t]`, a prompt's part that begins at `start`; only the last one gets logits."""
        ends, visible = self._texts.rows, self._texts.visible
        rows, width = tokens.shape
        count = apart(rounded_up(width, _PART_STEP), rows)
        size = rounded_up(start + count + 1, _PART_WINDOW)
        seen, places = visible(size), torch.arange(start, start + count)
        # Padding attends to itself, and gets the position of a real token: some targets accept no other.
        first = visible(ends.prompt_length).int().argmax(dim=1, keepdim=True)
        depths = torch.maximum(places.clamp(max=start + width - 1), first) - start
        is_own = torch.eye(count, dtype=torch.bool)
        ancestors = seen[:, None, start : start + count] & torch.ones_like(is_own).tril() | is_own
        roots = torch.tensor([[start, *(start + shift for shift in shifts)] for shifts in ends.shifts])
        given = pad(tokens, (0, count - width)), depths, ancestors, roots, seen
        if not self._steps.pricing.packs_rows:
            return [*given, torch.full((apart(2, rows),), width - 1)]
        read = seen[:, start : start + count].clone()
        read[:, width - 1 :] = torch.arange(count - width + 1) == 0
        packed = read.flatten().nonzero().flatten().tolist()
        last = [end - 1 for end in read.sum(dim=1).cumsum(dim=0).tolist()]
        # Another row's logits stand for those of a row without tokens here: padding's are off by rounding alone, and
        # compiled code is checked by what it computes.
        has_tokens = seen[:, start + width - 1].tolist()
        last = [
            end if is_real else last[has_tokens.index(True)] for end, is_real in zip(last, has_tokens, strict=True)
        ]
        packed = filled_up(packed, apart(rounded_up(len(packed), _PACKED_STEP), rows, count))
        kept = filled_up(last, apart(rows + 1, count, len(packed)))
        return [*given, torch.tensor(kept), torch.tensor(packed)]
