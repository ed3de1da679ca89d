"""Trees on targets with recurrent layers, against stock forwards over each path, one token at a time."""

import copy
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, PreTrainedModel

from tests.caches import check_equal_caches
from tests.lossless.hybrids import tokens
from tests.recurrent_targets import NEEDS_STATES, RECURRENT, recurrent
from transformers_resps.compat import CACHE_KEYWORD
from transformers_resps.tree import DraftTree
from transformers_resps.verifying.forward import TargetForward
from transformers_resps.verifying.growing import GrowingMode
from transformers_resps.verifying.hybrids import LayerStates, WholeTree, known_mixers, reading_trees
from transformers_resps.verifying.slots.verifier import SlotMode
from transformers_resps.verifying.verifier import Verifier


pytestmark = NEEDS_STATES
LENGTH = 13  # of the prompt
PARENTS = [0, 0, 0, 0, 1, 1, 2, 4, 4]
LEAVES = ([0, 3], [0, 1, 5], [0, 2, 6], [0, 1, 4, 7], [0, 1, 4, 8])
KEPT = ([0, 1, 4, 8], [0, 2], [0])  # a whole branch, half of one, the root alone


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


Opens = Callable[..., tuple[Verifier, Any]]


def growing(target: PreTrainedModel, *given: Tensor) -> tuple[Verifier, Any]:
    """A verifier for a prompt, over a cache that grows, and that cache."""
    cache = DynamicCache(config=target.config.get_text_config(decoder=True))
    return GrowingMode().verifier(TargetForward(target, None, cache), *given or (torch.arange(LENGTH)[None],)), cache


def over_slots(target: PreTrainedModel, *given: Tensor) -> tuple[Verifier, Any]:
    """The same, over slots, as compiled steps run."""
    cache = DynamicCache(config=target.config.get_text_config(decoder=True))
    forward = TargetForward(target, None, cache)
    return SlotMode().verifier(forward, *given or (torch.arange(LENGTH)[None],)), cache


@pytest.fixture(params=[growing, over_slots])
def opened(request: pytest.FixtureRequest) -> Opens:
    opens: Opens = request.param
    return opens


def check_close(found: Tensor, wanted: Tensor, most: float) -> None:
    """At most so far apart, as a share of the largest logit."""
    error = float((found - wanted).abs().max() / wanted.abs().max())
    assert error <= most, f"{error:.1e} of the largest logit apart"


def rounding(target: PreTrainedModel, prompt: Tensor, text: Tensor) -> float:
    """What rounding may make of a text's logits, as a share of the largest: 16 times what stock steps differ by where
    each weight moves by its last bit, up or down. Ours differ by three times that at most (measured).
    """
    moved, generator = copy.deepcopy(target), torch.Generator().manual_seed(0)
    for weight in moved.parameters():
        ends = torch.where(torch.rand(weight.shape, generator=generator) < 0.5, torch.inf, -torch.inf)
        weight.copy_(weight.nextafter(ends))
    wanted = stepped(target, prompt, text)[0]
    return 16 * float((stepped(moved, prompt, text)[0] - wanted).abs().max() / wanted.abs().max())


class Operators(TorchDispatchMode):
    """Counts the operators that run inside, and keeps their names."""

    def __init__(self) -> None:
        super().__init__()
        self.names, self.count = set[str](), 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(function.overloadpacket.__name__)
        self.count += 1
        return function(*args, **kwargs or {})


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module", params=RECURRENT, ids=str)
def target(request: pytest.FixtureRequest) -> PreTrainedModel:
    return request.param.build()


def test_each_path_of_a_tree_is_read_as_if_it_were_the_text(target: PreTrainedModel, opened: Opens) -> None:
    prompt, nodes = tokens(LENGTH), tokens(len(PARENTS), 1)
    with opened(target)[0] as verifier:
        verifier.prefill(prompt)
        found, _ = verifier.verify(DraftTree.from_parents(nodes, torch.tensor([PARENTS])))
    for path in LEAVES:
        text = nodes[:, path]
        check_close(found[0, path], stepped(target, prompt, text)[0], rounding(target, prompt, text))


@pytest.mark.parametrize("path", KEPT, ids=str)
def test_the_states_go_on_from_the_kept_path_alone(target: PreTrainedModel, path: list[int], opened: Opens) -> None:
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
    text = torch.cat([nodes[:, path], after], dim=1)
    (expected, cache), most = stepped(target, prompt, text), rounding(target, prompt, text)
    check_close(torch.cat(found), expected[len(path) :], most)
    check_equal_caches(found_cache, cache, most)


@pytest.mark.parametrize("paths", [[[0, 1, 2], [0, 2, 4]], [[0, 1, 2], [0, 2]], [[0], [0, 2, 4]]], ids=str)
def test_rows_of_a_padded_batch_have_trees_of_their_own(
    target: PreTrainedModel, paths: list[list[int]], opened: Opens
) -> None:
    """Rows with other numbers of leaves, one of them padded on the left; then one goes on."""
    pads, parents = [0, 5], [[0, 0, 1, 2, 3], [0, 0, 0, 1, 2]]
    mask = (torch.arange(LENGTH) >= torch.tensor(pads)[:, None]).long()
    prompt, nodes, after = tokens(LENGTH, rows=2) * mask, tokens(5, 1, rows=2), tokens(2, 2, rows=2)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    kept = torch.tensor([path + path[-1:] * (3 - len(path)) for path in paths])
    with opened(target, positions, mask)[0] as verifier:
        verifier.prefill(prompt)
        verified, _ = verifier.verify(DraftTree.from_parents(nodes, torch.tensor(parents)))
        verifier.keep(kept, paths)
        both, _ = verifier.verify(DraftTree.root_only(after[:, 0]))
        verifier.keep(torch.zeros(2, 1, dtype=torch.long), [[0], [0]])
        verifier.keep_rows([1])
        alone, _ = verifier.verify(DraftTree.root_only(after[1:, 1]))
    for row, (pad, path) in enumerate(zip(pads, paths, strict=True)):
        text = torch.cat([nodes[row : row + 1, path], after[row : row + 1]], dim=1)
        expected, _ = stepped(target, prompt[row : row + 1, pad:], text)
        check_close(verified[row, path], expected[: len(path)], most=1e-5)
        check_close(both[row, 0], expected[len(path)], most=3e-5)  # of one sliding row 1.4e-5
    check_close(alone[0, 0], expected[-1], most=1e-5)


def test_what_is_taken_back_leaves_the_cache_as_it_was(target: PreTrainedModel, opened: Opens) -> None:
    """Also where no node is kept before the call ends."""
    if opened is growing:
        pytest.skip("a lone root is kept there, see `TreeVerifier.close`")
    verifier, cache = opened(target)
    with verifier:
        verifier.prefill(tokens(LENGTH))
        wanted = copy.deepcopy(cache)
        verifier.verify(DraftTree.from_parents(tokens(len(PARENTS), 1), torch.tensor([PARENTS])))
        verifier.undo()
        verifier.verify(DraftTree.root_only(tokens(1)[0]))
    check_equal_caches(cache, wanted, most=0.0)


@pytest.mark.parametrize("target", recurrent("qwen3_5_text", "kimi_linear", "nemotron_h"), ids=str, indirect=True)
def test_states_that_fade_within_a_token_do_not_overflow(target: PreTrainedModel, opened: Opens) -> None:
    own, prompt, text = copy.deepcopy(target), tokens(LENGTH), tokens(6, 1)
    for name, weight in own.named_parameters():
        if name.endswith(("A_log", "dt_bias")):
            weight.fill_(4.0)
    with opened(own)[0] as verifier:
        verifier.prefill(prompt)
        verifier.verify(DraftTree.from_parents(text[:, :5], torch.tensor([[0, 0, 1, 2, 3]])))
        verifier.keep(torch.tensor([[0, 1, 2, 3, 4]]), [[0, 1, 2, 3, 4]])
        found, _ = verifier.verify(DraftTree.root_only(text[:, 5]))
    check_close(found[0], stepped(own, prompt, text)[0][-1:], most=1e-5)


@pytest.mark.parametrize("path", KEPT, ids=str)
def test_keeping_runs_no_projection_and_few_operators(target: PreTrainedModel, path: list[int], opened: Opens) -> None:
    """A mixer that read the accepted nodes again would run some 180, or 30 where it is a short convolution."""
    with opened(target)[0] as verifier:
        verifier.prefill(tokens(LENGTH))
        verifier.verify(DraftTree.from_parents(tokens(len(PARENTS), 1), torch.tensor([PARENTS])))
        with Operators() as ran, patch("transformers_resps.verifying.growing.compact"):
            verifier.keep(torch.tensor([path]), [path])
    assert not ran.names & {"mm", "addmm", "linear"}
    assert ran.count <= 100 + 10 * len(known_mixers(target))


@pytest.mark.parametrize("target", recurrent("qwen3_5_text", "kimi_linear", "nemotron_h"), ids=str, indirect=True)
def test_four_hundred_tokens_do_not_drift(target: PreTrainedModel, opened: Opens) -> None:
    """The right tokens stand among wrong ones, at another place in every tree; one to four of them are kept."""
    prompt, text = tokens(LENGTH), tokens(400, 4)
    found, start = [], 0
    with opened(target)[0] as verifier:
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


KINDS = recurrent("qwen3_5_text", "kimi_linear", "granitemoehybrid", "lfm2")


@pytest.mark.parametrize("target", recurrent("lfm2"), ids=str, indirect=True)
def test_short_convolutions_compute_in_the_dtype_of_the_target(target: PreTrainedModel, opened: Opens) -> None:
    own, prompt, text = copy.deepcopy(target).double(), tokens(LENGTH), tokens(5, 1)
    with opened(own)[0] as verifier:
        verifier.prefill(prompt)
        found, _ = verifier.verify(DraftTree.from_parents(text, torch.tensor([[0, 0, 1, 2, 3]])))
    check_close(found[0], stepped(own, prompt, text)[0], most=1e-12)


def test_scans_multiply_states_in_float32_under_autocast() -> None:
    """As plain steps do."""
    tree = DraftTree.from_parents(tokens(len(PARENTS), 1), torch.tensor([PARENTS]))
    whole = WholeTree(tree.depths, tree.ancestors, {0: LayerStates(torch.zeros(1, 48, 4), torch.randn(1, 2, 8, 8))})
    whole.enter(0)
    parts, rates = torch.randn(3, 1, len(PARENTS), 2, 8), torch.rand(1, len(PARENTS), 2)
    wanted, _ = whole.delta_rule(*parts, g=-rates, beta=rates)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = whole.delta_rule(*parts, g=-rates, beta=rates)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("target", KINDS, ids=str, indirect=True)
def test_readers_stand_in_modelling_files_while_calls_decode_and_stock_functions_afterwards(
    target: PreTrainedModel,
) -> None:
    mixers = known_mixers(target).values()
    (names,) = {type(mixer).__module__: vars(sys.modules[type(mixer).__module__]) for mixer in mixers}.values()
    of_stock = dict(names)
    with pytest.raises(ZeroDivisionError), reading_trees(mixers):
        with reading_trees(mixers):
            pass
        stands_in = {name for name, one in names.items() if one is not of_stock[name]}
        assert stands_in and {type(names[name]).__name__ for name in stands_in} == {"_TreeReader"}
        raise ZeroDivisionError
    assert dict(names) == of_stock


@pytest.mark.parametrize("target", KINDS, ids=str, indirect=True)
def test_a_mixer_whose_forward_was_replaced_is_refused_by_its_layer(target: PreTrainedModel, opened: Opens) -> None:
    own, prompt = copy.deepcopy(target), tokens(LENGTH)
    tree = DraftTree.from_parents(tokens(len(PARENTS), 1), torch.tensor([PARENTS]))
    with opened(own)[0] as verifier:
        verifier.prefill(prompt)
        known_mixers(own)[0].forward = lambda hidden_states, **_: hidden_states
        with pytest.raises(ValueError, match="layer 0 read a tree without the functions of its modelling file"):
            verifier.verify(tree)
    with opened(own)[0] as verifier, pytest.raises(ValueError, match="layer 0 has kept no state of the prompt"):
        verifier.prefill(prompt)
        verifier.verify(tree)
