"""Attention of the invariant mode in packaged code: one operator, which gives a node the bits of its text alone."""

from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import pytest
import torch
from torch import Tensor, nn

from tests.kernels import needs_compiler, needs_instructions
from tests.verifying.test_invariant import Case, Heads, any_tree, some_nodes
from transformers_resps.compilation.compiled import CompiledFunction
from transformers_resps.compilation.kernels import TILES, VECTORS, Kernels
from transformers_resps.compilation.native import bf16_block_attention
from transformers_resps.compilation.packages import FOLDER_VARIABLE, ModulePackages
from transformers_resps.tree import DraftTree
from transformers_resps.verifying.invariant.attention import BlockLayout, BlockReads
from transformers_resps.verifying.masks import AttentionPattern


SCALE = 0.125
WINDOWS = (None, 1, 40, 64, 200)


def asked(case: Case, layout: BlockLayout, window: int | None) -> list[Tensor]:
    """What the operator gets of a whole tree."""
    places = torch.tensor(case.roots)[:, None] + case.drafted.depths
    mask = BlockReads(layout, places, torch.bfloat16).mask(AttentionPattern(window))
    return [case.queries.transpose(1, 2), *case.buffers(), mask, layout.groups, layout.slots]


def tree_of(case: Case, window: int | None = None, count: int | None = None) -> list[Tensor]:
    """Likewise, where the nodes after the first `count` are padding."""
    count, roots = count or len(case.parents), torch.tensor(case.roots)[:, None]
    parents = torch.tensor([case.parents[:count]] * len(roots))
    tree = DraftTree.from_parents(torch.zeros_like(parents), parents).padded(len(case.parents))
    layout = BlockLayout.of_tree(roots, tree.depths, tree.ancestors, 2)
    return asked(case, layout.of_nodes(count, compiled=True), window)


def alone(case: Case, row: int, node: int, window: int | None) -> list[Tensor]:
    """What it gets of a node as the newest token of its text, beside a token of padding."""
    keys = case.text_of(row, node)
    one = Case(case.heads, [len(keys[0]) - 1], [0, 0], case.dtype, 0)
    one.text, one.nodes = [part[None, :-1] for part in keys], [part[None, -1:].repeat(1, 2, 1, 1) for part in keys]
    one.queries = case.queries[row, node][None, None].repeat(1, 2, 1, 1)
    roots = torch.tensor(one.roots)[:, None]
    return asked(one, BlockLayout.of_chain(roots, torch.zeros(1, 2, dtype=torch.long), 2), window)


def cases(heads: Heads, rows: int) -> list[Case]:
    random = Random(rows)
    roots = [random.choice([0, 3, 63, 64, 65, 127, 200, 300]) for _ in range(8)]
    trees = [any_tree(random, random.randint(2, 40), random.choice(["any", "chain", "star"])) for _ in roots]
    return [
        Case(heads, [root, root // 2][:rows], parents, torch.bfloat16, seed)
        for seed, (root, parents) in enumerate(zip(roots, trees, strict=True))
    ]


@needs_instructions
@needs_compiler
@pytest.mark.parametrize(
    ("kernels", "heads", "rows", "sinks"),
    [
        (Kernels.only(VECTORS), Heads(6, 2, 64, 64), 1, False),
        (Kernels.only(VECTORS), Heads(8, 1, 64, 96), 2, True),  # more queries of a key head than are read at once
        (Kernels.only(TILES), Heads(6, 2, 64, 64), 2, False),
    ],
    indirect=["kernels"],
)
@torch.no_grad()
def test_a_node_gets_the_bits_of_its_text_alone_by_any_number_of_threads(
    kernels: Kernels, heads: Heads, rows: int, sinks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    layer, scores = nn.Linear(1, 1), torch.randn(heads.count).bfloat16()

    def attending(*given: Tensor) -> Tensor:
        *read, scores = given
        return bf16_block_attention(*read, scores if sinks else None, SCALE)

    first = () if rows == 1 else (0,)
    dynamic = [(*first, 2)] * 4 + [(*first, 1)] * 2 + [()]
    fast = CompiledFunction(attending, dynamic, packages=ModulePackages(lambda: layer, "it"), name="attention")
    before = torch.get_num_threads()
    try:
        for case, window in zip(cases(heads, rows), (*WINDOWS, *WINDOWS), strict=False):
            case.sinks, some = scores, max(len(case.parents) // 2, 1)
            found = in_threads(fast, [*tree_of(case, window), scores], (1, 2, 3, 5))
            padded = fast([*tree_of(case, window, some), scores])
            assert torch.equal(padded[:, :some], found[:, :some]) and not padded[:, some:].any()
            for row in range(rows):
                for node in some_nodes(Random(0), case.parents):
                    expected = case.expected(row, node, window, sinks)
                    torch.testing.assert_close(found[row, node].double(), expected, rtol=0.02, atol=0.02)
                    one = alone(case, row, node, window)
                    one = [part.repeat(2, *[1] * (part.dim() - 1)) for part in one] if rows > 1 else one
                    assert torch.equal(found[row, node], fast([*one, scores])[0, 0]), (case.roots, node, case.parents)
    finally:
        torch.set_num_threads(before)


def in_threads(fast: Callable[[Sequence[Tensor]], Tensor], given: list[Tensor], counts: Sequence[int]) -> Tensor:
    """What all numbers of threads give alike."""
    found = list[Tensor]()
    for count in counts:
        torch.set_num_threads(count)
        found.append(fast(given).clone())
    assert all(torch.equal(part, found[0]) for part in found)
    return found[0]
