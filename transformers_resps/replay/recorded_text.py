"""Records a text with a head's drafts at every position.

The target runs over the text once, and the head drafts from every position. `RankedText` then computes the result of
every shape, and `replay_policy` decodes the text again with any policy, without a model or a clock.

Tensor shapes: t positions, p pool nodes, F features, r roots, w nodes that get children.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from ..drafting import Committed, DraftCache, DraftCall, Drafter, DraftRequest, StepModel
from ..drafting.pool_growth import Frontier, Growth, Root, branch, grow_pool, sprout
from ..heads import BlockHead, DraftHead
from ..tree import CandidatePool, TreeShape
from ..verifying.forward import FeatureTap


MOST_NODES = 64  # Default number of recorded nodes below a root for block heads: the default limit of "auto".
_MAX_QUERIES = 256  # Maximum number of nodes in one pass of the head.
_SIZES = ("prompt_length", "spare_room", "block_nodes")


@dataclass(frozen=True, slots=True)
class RecordedText:
    """A prompt and its output, with the head's drafts at each position after the output's first token."""

    FORMAT: ClassVar[int] = 2  # version of the file format; file names contain it

    input_ids: Tensor  # [s] prompt and output
    prompt_length: int
    features: Tensor  # [t, F] input of a policy before the step at each position, in the target's dtype
    pools: dict[int, CandidatePool]  # `top_k` -> drafts at all positions, [t, p]
    spare_room: int = 0  # see `record_pools`
    block_nodes: int = 0  # maximum number of nodes below a root for block heads; 0 for other heads

    def __len__(self) -> int:
        return len(self.features)

    @property
    def depth(self) -> int:
        return max(int(pool.levels[-1]) for pool in self.pools.values())

    def upcoming(self, count: int) -> Tensor:
        """Return the `count` tokens `[t, count]` after each position's newest token; -1 after the text's end."""
        padded = torch.nn.functional.pad(self.input_ids, (0, count), value=-1)
        return padded.unfold(0, count, 1)[self.prompt_length + 1 :][: len(self)]

    def save(self, file: str | Path) -> None:
        tensors = {"features": self.features, "input_ids": self.input_ids}
        for k, pool in self.pools.items():
            tensors |= {f"tokens.{k}": pool.tokens.int(), f"parents.{k}": pool.parents.int()}
            tensors |= {f"scores.{k}": pool.scores, f"levels.{k}": pool.levels}
        metadata = {name: str(getattr(self, name)) for name in _SIZES}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata)

    @classmethod
    def load(cls, file: str | Path) -> "RecordedText":
        """Load a saved recording; raises `ValueError` if this release cannot read the file."""
        with open_recording(file, "tokens.") as (opened, metadata):
            get = opened.get_tensor
            top_ks = sorted(int(name.split(".")[1]) for name in opened.keys() if name.startswith("tokens."))  # noqa: SIM118
            pools = {}
            for k in top_ks:
                tokens, parents = get(f"tokens.{k}").long(), get(f"parents.{k}").long()
                pools[k] = CandidatePool(tokens, parents, get(f"scores.{k}"), get(f"levels.{k}"))
            sizes = {name: int(metadata[name]) for name in _SIZES}
            return cls(input_ids=get("input_ids"), features=get("features"), pools=pools, **sizes)


@torch.no_grad()
def record_pools(
    target: PreTrainedModel,
    head: DraftHead | BlockHead,
    input_ids: Tensor,
    prompt_length: int,
    *,
    depths: dict[int, int],
    spare_room: int = 0,
    block_nodes: int = MOST_NODES,
) -> RecordedText:
    """Record the head's drafts at every position of an output; `input_ids` `[s]` are prompt and output of any origin.

    `depths` maps each `top_k` to the number of levels to draft; block heads draft all their levels, with at most
    `block_nodes` nodes below a root. `spare_room` is how many more tokens the output could have had before
    `max_length`. Raises `ValueError` if the output has fewer than two tokens.
    """
    length = len(input_ids)
    if not 1 <= prompt_length <= length - 2 or not depths:
        raise ValueError(
            f"Got a text of {length} tokens with a prompt of {prompt_length} and {len(depths)} kinds of pools, but a "
            "recording needs a prompt, two tokens of answer and a pool. Leave this text out, or pass other `depths`."
        )
    text = input_ids[None].to(target.device)
    with FeatureTap(target, head.feature_layers) as tap, tap.record() as caught:
        target.get_decoder()(input_ids=text, use_cache=False)
    features = caught.concatenated()[:, :-1]
    prefixes = torch.arange(prompt_length, length - 1)  # index of the root of each position, the newest token
    newest = features[0, prefixes.to(features.device) - 1].cpu()
    drafter = head.drafter(DraftCall(target))
    if drafter.drafts_at_once:
        shapes = [TreeShape(block_nodes + 1, drafter.most_levels or 1, top_k) for top_k in depths]
        drafts = _drafted(drafter, features, text[:, 1:], prompt_length, shapes)
        return RecordedText(input_ids.cpu(), prompt_length, newest, drafts, spare_room, block_nodes)
    positions = PositionPools(head.bind(target), features, text[:, 1:])
    pools = {
        top_k: _joined([pool for _, pool in positions.draft(prefixes, top_k, depth)])
        for top_k, depth in depths.items()
    }
    return RecordedText(input_ids.cpu(), prompt_length, newest, pools, spare_room)


def _drafted(
    drafter: Drafter, features: Tensor, tokens: Tensor, start: int, shapes: Sequence[TreeShape]
) -> dict[int, CandidatePool]:
    """Draft `shapes` after each prefix of at least `start` tokens; return a dict from `top_k` to all these drafts."""
    pools: dict[int, list[CandidatePool]] = {shape.top_k: [] for shape in shapes}
    known = 0
    for length in range(start, tokens.shape[1]):
        drafter.observe(Committed(tokens[:, known:length], features[:, known:length]))
        known = length
        for shape in shapes:
            pools[shape.top_k].append(drafter.draft(tokens[:, length - 1 : length], DraftRequest(shape)))
    return {top_k: _joined(parts) for top_k, parts in pools.items()}


def _joined(parts: Sequence[CandidatePool]) -> CandidatePool:
    """Concatenate pools of successive positions to one pool on the CPU."""
    rows = zip(*((part.tokens, part.parents, part.scores) for part in parts), strict=True)
    tokens, parents, scores = (torch.cat([part.cpu() for part in row]) for row in rows)
    return CandidatePool(tokens, parents, scores, parts[0].levels.cpu())


class PositionPools:
    """Drafts from many positions of a text in one pass of a head; each node attends to its prefix and its ancestors.

    This is exact, because the head's cache holds only entries from the target's features, which all positions share.
    `features` `[1, s, F]` are the features at each position, `tokens` `[1, s]` the token after each position.
    """

    def __init__(self, model: StepModel, features: Tensor, tokens: Tensor) -> None:
        self._model = model
        device, count = model.device, tokens.shape[1]
        self._length = count
        order, oldest = torch.arange(count, device=device), [model.oldest_seen(length) for length in range(count + 1)]
        self._oldest = torch.tensor(oldest, device=device)[:, None]
        mask = None
        if oldest[-1]:
            mask = ((order <= order[:, None]) & (order >= self._oldest[1:]))[None, None]
        self._cache = DraftCache(device=device)
        self._cache.reserve(count)
        self._tokens = tokens.to(device)
        fused, entries = model.fuse(features.to(device, model.dtype)), self._cache.attend(0, count, mask=mask)
        self._outputs = model.run(0, self._tokens, fused, model.places(order[None]), entries)[0]  # [s, h]

    def draft(self, prefixes: Tensor, top_k: int, depth: int) -> Iterator[tuple[Tensor, CandidatePool]]:
        """Draft after prefixes of the lengths `prefixes` `[n]`; yield r of these lengths at once, and their pool."""
        width = min(top_k, self._model.proposable_tokens)
        for part in prefixes.to(self._outputs.device).split(max(1, _MAX_QUERIES // width)):
            root = Root(self._tokens[0, part - 1], self._outputs[part - 1][:, None])
            itself = torch.eye(width, dtype=torch.bool, device=part.device)
            first = sprout(self._model, root, itself, depth == 1)
            yield part, grow_pool(first, depth, partial(self._run, part))

    def _run(self, prefixes: Tensor, frontier: Frontier, drafted: int, is_last: bool) -> Growth:
        """Run the head over one level of all roots in one pass: one batch row holds all nodes, root by root."""
        roots, width = frontier.tokens.shape
        slots = torch.arange(self._length, device=prefixes.device)
        prefix = (slots < prefixes[:, None]) & (slots >= self._oldest[prefixes])
        prefix = prefix[:, None].expand(-1, width, -1).flatten(0, 1)  # [r * w, s]
        same_root = torch.eye(roots, dtype=torch.bool, device=prefixes.device)[:, None, :, None]
        levels = frontier.visible.split(width, dim=-1)[::-1]  # [r, w, w] each
        nodes = [(part[:, :, None] & same_root).flatten(2).flatten(0, 1) for part in levels]  # [r * w, r * w]
        start = self._length + (len(nodes) - 1) * roots * width
        self._cache.reserve(start + roots * width)
        assert frontier.hidden is not None
        output = self._model.run(
            0,
            frontier.tokens.flatten()[None],
            frontier.hidden.flatten(0, 1)[None],
            self._model.places((prefixes + drafted - 1).repeat_interleave(width)[None]),
            self._cache.attend(start, start + roots * width, mask=torch.cat([prefix, *nodes], dim=1)[None, None]),
        ).view(roots, width, -1)
        hidden = self._model.feedback(output, frontier.hidden)
        return branch(self._model, frontier, output, hidden, frontier.visible[..., :width], is_last)


@contextmanager
def open_recording(file: str | Path, needed: str) -> Iterator[tuple[Any, dict[str, str]]]:
    """Open a recording and yield the file and its metadata; one tensor's name must start with `needed`.

    Errors of reading the file, also those inside the `with` block, are raised as `ValueError`.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            if not any(name.startswith(needed) for name in opened.keys()):  # noqa: SIM118
                raise KeyError(needed)
            # Older recordings of draft heads lack the entry.
            yield opened, {"block_nodes": "0"} | (opened.metadata() or {})
    except (OSError, SafetensorError, KeyError, ValueError, IndexError) as error:
        raise ValueError(
            f"{file} is no recording that this release can read ({error!r}). Delete it and record the text again."
        ) from error
