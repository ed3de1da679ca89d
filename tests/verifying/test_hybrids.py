"""Trees on targets with recurrent layers, against stock forwards over each path, one token at a time."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from tests.caches import check_equal_caches
from tests.recurrent_targets import NEEDS_STATES, RECURRENT, VOCABULARY, recurrent
from transformers_resps.compat import CACHE_KEYWORD
from transformers_resps.tree import DraftTree
from transformers_resps.verifying.forward import TargetForward
from transformers_resps.verifying.verifier import TreeVerifier


pytestmark = NEEDS_STATES
LENGTH = 13  # of the prompt
PARENTS = [0, 0, 0, 0, 1, 1, 2, 4, 4]
LEAVES = ([0, 3], [0, 1, 5], [0, 2, 6], [0, 1, 4, 7], [0, 1, 4, 8])
KEPT = ([0, 1, 4, 8], [0, 2], [0])  # a whole branch, half of one, the root alone


def tokens(count: int, seed: int = 0, rows: int = 1) -> Tensor:
    return torch.randint(1, VOCABULARY, (rows, count), generator=torch.Generator().manual_seed(seed))


def stepped(target: PreTrainedModel, prompt: Tensor, text: Tensor) -> tuple[Tensor, Any]:
    """The logits `[t, v]` of a text that is read token by token after its prompt, `[1, t]` each, and the cache."""
    cache: Any = DynamicCache(config=target.config.get_text_config(decoder=True))
    logits, start = [], 0
    for part in (prompt, *text.split(1, dim=1)):
        positions = torch.arange(start, start + part.shape[1])[None]
        read = target(input_ids=part, position_ids=positions, use_cache=True, **{CACHE_KEYWORD: cache})
        logits.append(read.logits[0, -1:])
        start += part.shape[1]
    return torch.cat(logits[1:]), cache


def opened(target: PreTrainedModel) -> tuple[TreeVerifier, Any]:
    """A verifier for a prompt, and its cache."""
    cache = DynamicCache(config=target.config.get_text_config(decoder=True))
    return TreeVerifier(TargetForward(target, None, cache), torch.arange(LENGTH)[None]), cache


def check_close(found: Tensor, wanted: Tensor, most: float = 2e-6) -> None:
    """At most so far apart, as a share of the largest logit."""
    error = float((found - wanted).abs().max() / wanted.abs().max())
    assert error <= most, f"{error:.1e} of the largest logit apart"


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module", params=RECURRENT, ids=str)
def target(request: pytest.FixtureRequest) -> PreTrainedModel:
    return request.param.build()


def test_each_path_of_a_tree_is_read_as_if_it_were_the_text(target: PreTrainedModel) -> None:
    prompt, nodes = tokens(LENGTH), tokens(len(PARENTS), 1)
    with TreeVerifier.of(target, LENGTH) as verifier:
        verifier.prefill(prompt)
        found, _ = verifier.verify(DraftTree.from_parents(nodes, torch.tensor([PARENTS])))
    for path in LEAVES:
        check_close(found[0, path], stepped(target, prompt, nodes[:, path])[0])


@pytest.mark.parametrize("path", KEPT, ids=str)
def test_the_states_go_on_from_the_kept_path_alone(target: PreTrainedModel, path: list[int]) -> None:
    """Another tree is verified and taken back before; five plain steps follow."""
    prompt, nodes, after = tokens(LENGTH), tokens(len(PARENTS), 1), tokens(5, 2)
    tree, root = DraftTree.from_parents(nodes, torch.tensor([PARENTS])), torch.tensor([[0]])
    verifier, found_cache = opened(target)
    with verifier:
        verifier.prefill(prompt)
        verifier.verify(DraftTree.from_parents(tokens(3, 3), torch.tensor([[0, 0, 1]])))
        verifier.undo()
        verifier.verify(tree)
        verifier.keep(torch.tensor([path]), [path])
        found = []
        for token in after.unbind(1):
            found.append(verifier.verify(DraftTree.root_only(token))[0][0])
            verifier.keep(root, [[0]])
    expected, cache = stepped(target, prompt, torch.cat([nodes[:, path], after], dim=1))
    check_close(torch.cat(found), expected[len(path) :], most=1e-5)
    check_equal_caches(found_cache, cache, most=1e-5)


def test_rows_of_a_padded_batch_have_trees_of_their_own(target: PreTrainedModel) -> None:
    """Rows with other numbers of leaves, one of them padded on the left; then they swap places and one goes on."""
    pads, parents = [0, 5], [[0, 0, 1, 2, 3], [0, 0, 0, 1, 2]]
    mask = (torch.arange(LENGTH) >= torch.tensor(pads)[:, None]).long()
    prompt, nodes, after = tokens(LENGTH, rows=2) * mask, tokens(5, 1, rows=2), tokens(2, 2, rows=2)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    paths = [[0, 1, 2], [0, 2, 4]]
    cache = DynamicCache(config=target.config.get_text_config(decoder=True))
    with TreeVerifier(TargetForward(target, None, cache), positions, mask) as verifier:
        verifier.prefill(prompt)
        verified, _ = verifier.verify(DraftTree.from_parents(nodes, torch.tensor(parents)))
        verifier.keep(torch.tensor(paths), paths)
        both, _ = verifier.verify(DraftTree.root_only(after[:, 0]))
        verifier.keep(torch.zeros(2, 1, dtype=torch.long), [[0], [0]])
        verifier.keep_rows([1])
        alone, _ = verifier.verify(DraftTree.root_only(after[1:, 1]))
    for row, (pad, path) in enumerate(zip(pads, paths, strict=True)):
        text = torch.cat([nodes[row : row + 1, path], after[row : row + 1]], dim=1)
        expected, _ = stepped(target, prompt[row : row + 1, pad:], text)
        check_close(verified[row, path], expected[:3], most=1e-5)
        check_close(both[row, 0], expected[3], most=1e-5)
    check_close(alone[0, 0], expected[4], most=1e-5)


@pytest.mark.parametrize("target", recurrent("qwen3_5_text", "kimi_linear", "nemotron_h"), ids=str, indirect=True)
def test_four_hundred_tokens_do_not_drift(target: PreTrainedModel) -> None:
    """The right tokens stand among wrong ones, at another place in every tree; one to four of them are kept."""
    prompt, text = tokens(LENGTH), tokens(400, 4)
    found, start = [], 0
    with TreeVerifier.of(target, LENGTH) as verifier:
        verifier.prefill(prompt)
        while start < text.shape[1]:
            path = [[0, 1, 3, 4], [0, 2], [0, 1], [0, 1, 3]][start % 4][: text.shape[1] - start]
            nodes = tokens(5, start)
            nodes[:, path] = text[:, start : start + len(path)]
            logits, _ = verifier.verify(DraftTree.from_parents(nodes, torch.tensor([[0, 0, 0, 1, 3]])))
            verifier.keep(torch.tensor([path]), [path])
            found.append(logits[0, path])
            start += len(path)
    check_close(torch.cat(found), stepped(target, prompt, text)[0], most=1e-5)
