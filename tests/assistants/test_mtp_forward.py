"""Every published layout computes what loops over its raw tensors compute."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from transformers_resps import TreeShape
from transformers_resps.assistants import MtpHead
from transformers_resps.drafting import Committed, DraftRequest, StepModel
from transformers_resps.drafting.model_drafter import ModelDrafter

from .growing import Growing
from .mtp_cases import CASES, Case, H, Reference, V


NEWEST = torch.empty(0)  # levels are drafted from what was observed


LENGTH = 9


class Text(Growing):
    """The entries of a text so far, read in passes; a depth has none of its first tokens."""

    def at(self, slots: Tensor, depth: int) -> "Text":
        """As a pass over these slots sees them."""
        order = torch.arange(int(slots[-1]) + 1)
        mask = (order <= slots[:, None]) & (order >= depth) | (order == slots[:, None])
        is_plain = depth == 0 and (len(slots) == 1 or slots[0] == 0)
        self.mask = None if is_plain else mask[None, None]
        return self


def outputs_of(
    model: StepModel, features: Tensor, tokens: Tensor, passes: list[int]
) -> tuple[list[Tensor], list[Tensor]]:
    """As `Reference.outputs`, read in passes over so many tokens each."""
    entries, given = Text(), model.fuse(features)
    fed, logits = [], []
    for depth in range(model.depths):
        found = []
        for slots in torch.arange(features.shape[1]).split(passes):
            part = given[:, slots], model.places(slots[None]), entries.at(slots, depth)
            found.append(model.run(depth, tokens[:, slots], *part))
        output = torch.cat(found, dim=1)
        back = model.feedback(output, given)
        fed.append(back[0])
        logits.append(model.logits(output, depth)[0])
        given = torch.cat([torch.zeros(1, 1, H), back[:, :-1]], dim=1)
    return fed, logits


def pairs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(1, LENGTH, H, generator=generator)
    return states, torch.randint(0, V, (1, LENGTH), generator=generator)


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_a_module_computes_what_its_family_does(case: Case, tmp_path: Path) -> None:
    target, raw = case.build(), case.raw()
    case.write(tmp_path, target, raw)
    model = MtpHead.from_target(target).bind(target)
    states, tokens = pairs()
    reference = Reference(case, raw, target)
    expected, features = reference.outputs(states[0], tokens[0]), reference.given(states)
    for passes in ([LENGTH], [1] * LENGTH, [4, 3, 1, 1]):
        found = outputs_of(model, features, tokens, passes)
        for theirs, ours in zip(expected, found, strict=True):
            assert len(ours) == case.depths
            for depth in range(case.depths):
                torch.testing.assert_close(ours[depth][depth:], theirs[depth][depth:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("fed_back", ["after", "before", "target"])
@pytest.mark.parametrize("name", ["Qwen3.5", "DeepSeek-V3", "Mellum"])
@torch.no_grad()
def test_a_tree_is_drafted_as_each_path_alone(name: str, fed_back: str, tmp_path: Path) -> None:
    """One layer drafts all levels; the window of Mellum's is shorter than the text."""
    case = next(case for case in CASES if case.name == name)
    target, raw = case.build(), case.raw()
    case.write(tmp_path, target, raw)
    case = replace(case, does=case.does | {"fed_back": fed_back})
    model = MtpHead.from_target(target, fed_back=fed_back).bind(target)
    states, tokens = pairs()
    features = Reference(case, raw, target).given(states)
    for shape in (TreeShape(20, 3, 3), TreeShape(4, 3, 1)):
        drafter = ModelDrafter(model, 1, None)
        drafter.observe(Committed(tokens[:, :5], features[:, :5]))
        drafter.draft(NEWEST, DraftRequest(shape))
        drafter.observe(Committed(tokens[:, 5:], features[:, 5:]))
        pool = drafter.draft(NEWEST, DraftRequest(shape))
        for node in range(pool.tokens.shape[1]):
            path, at = list[int](), node
            while at >= 0:
                path.insert(0, int(pool.tokens[0, at]))
                at = int(pool.parents[0, at])
            expected = Reference(case, raw, target).log_prob(states[0], tokens[0], path)
            assert float(pool.scores[0, node]) == pytest.approx(expected, abs=1e-3)
