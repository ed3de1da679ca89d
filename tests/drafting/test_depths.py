"""Models with several depths: what they draft, against loops over one text and one path at a time."""

from itertools import product

import pytest
import torch
from torch import Tensor, nn

from transformers_resps import TreeShape
from transformers_resps.drafting import Committed, DraftRequest, Entries, Places, StepModel, Wanted
from transformers_resps.drafting.model_drafter import ModelDrafter


NEWEST = torch.empty(0)  # levels are drafted from what was observed


VOCABULARY, WIDTH, DEPTHS = 7, 8, 3
SHAPE = TreeShape(40, DEPTHS, 2)


def rotated(states: Tensor, positions: Tensor) -> Tensor:
    """Queries, or keys, turned by their positions `[..., 1]`: their products depend on distances alone."""
    first, second = states.chunk(2, dim=-1)
    cosine, sine = torch.cos(0.3 * positions), torch.sin(0.3 * positions)
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], dim=-1)


class Planted(StepModel):
    """Three layers of attention, each with weights of its own."""

    depths, device, dtype, proposable_tokens = DEPTHS, torch.device("cpu"), torch.float64, VOCABULARY

    def __init__(self, rereads_target: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        self.rereads_target = rereads_target
        self.embedding = torch.randn(VOCABULARY, WIDTH, generator=generator).double()
        self.mix = torch.randn(DEPTHS, 2 * WIDTH, WIDTH, generator=generator).double() / 4
        self.keys = torch.randn(DEPTHS, WIDTH, WIDTH, generator=generator).double() / 3
        self.output = torch.randn(DEPTHS, WIDTH, VOCABULARY, generator=generator).double()

    @property
    def modules(self) -> nn.ModuleList:
        return nn.ModuleList()

    def places(self, positions: Tensor) -> Places:
        return (positions[..., None].double(),)

    def run(
        self,
        depth: int,
        tokens: Tensor,
        hidden: Tensor | None,
        places: Places,
        entries: Entries,
        wanted: Wanted = slice(None),
    ) -> Tensor:
        assert hidden is not None and isinstance(wanted, slice)
        states = torch.cat([self.embedding[tokens], hidden], dim=-1) @ self.mix[depth]
        turned = rotated(states @ self.keys[depth], places[0])
        entry = turned[:, None], states[:, None]
        keys, values = entries.update(*entry, layer_idx=depth)
        is_causal = entries.mask is None and states.shape[1] > 1
        attended = nn.functional.scaled_dot_product_attention(
            turned[:, None], keys, values, attn_mask=entries.mask, is_causal=is_causal
        )
        return torch.tanh(states + attended[:, 0])[:, wanted]

    def feedback(self, output: Tensor, hidden: Tensor | None) -> Tensor | None:
        return hidden if self.rereads_target else output

    def logits(self, output: Tensor, depth: int = 0) -> Tensor:
        return (output @ self.output[depth]).float()

    def by_loops(self, tokens: list[int], features: Tensor, path: list[int]) -> Tensor:
        """Log probabilities `[v]` after the path below the last token: entry j of depth k reads what depth k - 1 has
        at token j - 1, and attends to entries of depth k at tokens k to j.
        """
        known, texts = len(tokens), [*tokens, *path]
        carried = [features[place] for place in range(known)]  # before token j
        for depth in range(len(path) + 1):
            entries: dict[int, tuple[Tensor, Tensor]] = {}
            outputs: dict[int, Tensor] = {}
            for place in range(depth, known + depth):
                hidden = carried[place - depth]
                state = torch.cat([self.embedding[texts[place]], hidden]) @ self.mix[depth]
                entries[place] = rotated(state @ self.keys[depth], torch.tensor([float(place)]).double()), state
                keys, values = (torch.stack(part) for part in zip(*entries.values(), strict=True))
                weights = (keys @ entries[place][0] / WIDTH**0.5).softmax(0)
                outputs[place] = torch.tanh(state + weights @ values)
            if not self.rereads_target:
                carried = list(outputs.values())
        return (outputs[known + len(path) - 1] @ self.output[len(path)]).float().log_softmax(-1)


def expected(model: Planted, tokens: list[int], features: Tensor) -> dict[tuple[int, ...], float]:
    """Score of every path that the drafter can propose: of each level the best two nodes get children."""
    found: dict[tuple[int, ...], float] = {}
    frontier: list[tuple[int, ...]] = [()]
    for _ in range(DEPTHS):
        level: dict[tuple[int, ...], float] = {}
        for path in frontier:
            scores, best = model.by_loops(tokens, features, list(path)).topk(SHAPE.top_k)
            for score, token in zip(scores.tolist(), best.tolist(), strict=True):
                level[*path, token] = score + found.get(path, 0.0)
        found |= level
        frontier = sorted(level, key=level.__getitem__, reverse=True)[: SHAPE.top_k]
    return found


def drafted(drafter: ModelDrafter, row: int) -> dict[tuple[int, ...], float]:
    pool = drafter.draft(NEWEST, DraftRequest(SHAPE))
    tokens, parents, scores = (part[row].tolist() for part in (pool.tokens, pool.parents, pool.scores))
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(tokens, parents, strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    return dict(zip(paths, scores, strict=True))


def texts(lengths: list[int]) -> list[tuple[list[int], Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        (
            torch.randint(VOCABULARY, (length,), generator=generator).tolist(),
            torch.randn(length, WIDTH, generator=generator).double(),
        )
        for length in lengths
    ]


@pytest.mark.parametrize(("rereads_target", "pieces"), list(product([False, True], [[9], [4, 1, 4], [6, 1, 1, 1]])))
def test_a_text_read_in_pieces_gives_the_drafts_of_loops_over_it(rereads_target: bool, pieces: list[int]) -> None:
    model = Planted(rereads_target)
    ((tokens, features),) = texts([9])
    drafter, start = ModelDrafter(model, 1, None), 0
    for size in pieces:
        part = slice(start, start + size)
        drafter.observe(Committed(torch.tensor([tokens[part]]), features[None, part]))
        found = drafted(drafter, 0)
        assert found == pytest.approx(expected(model, tokens[: part.stop], features[: part.stop]), abs=1e-5)
        start += size


@pytest.mark.parametrize("rereads_target", [False, True])
def test_padded_and_ragged_rows_draft_as_each_alone(rereads_target: bool) -> None:
    """Prompts of 6, 4 and 2 tokens; then rows gain 1 to 3, before a draft or without one; then one row is dropped."""
    model, gains = Planted(rereads_target), [[3, 1, 2], [1, 2, 1], [2, 2, 3]]
    prompts = [6, 4, 2]
    rows = texts([prompt + sum(gain[row] for gain in gains) for row, prompt in enumerate(prompts)])
    padded = [[0] * (6 - prompt) for prompt in prompts]
    mask = torch.tensor([[0] * len(pads) + [1] * (6 - len(pads)) for pads in padded])
    drafter = ModelDrafter(model, 3, mask)
    tokens = torch.tensor([pads + own[:prompt] for pads, (own, _), prompt in zip(padded, rows, prompts, strict=True)])
    features = [
        torch.cat([torch.zeros(len(pads), WIDTH).double(), own[:prompt]])
        for pads, (_, own), prompt in zip(padded, rows, prompts, strict=True)
    ]
    drafter.observe(Committed(tokens, torch.stack(features)))
    read, kept = list(prompts), [0, 1, 2]
    for step, gain in enumerate(gains):
        most = max(gain[row] for row in kept)
        parts = [rows[row][0][read[row] : read[row] + gain[row]] for row in kept]
        states = [rows[row][1][read[row] : read[row] + gain[row]] for row in kept]
        drafter.observe(
            Committed(
                torch.tensor([part + part[-1:] * (most - len(part)) for part in parts]),
                torch.stack([torch.cat([own, own[-1:].expand(most - len(own), -1)]) for own in states]),
                parts,
            )
        )
        for row in kept:
            read[row] += gain[row]
        if step == 0:
            continue  # two blocks wait
        for place, row in enumerate(kept):
            own, states_of = rows[row]
            wanted = expected(model, own[: read[row]], states_of[: read[row]])
            assert drafted(drafter, place) == pytest.approx(wanted, abs=1e-5)
        if step == 1:
            kept = [0, 2]
            drafter.keep_rows(kept)
