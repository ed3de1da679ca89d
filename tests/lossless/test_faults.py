"""Broken heads, hostile policies, damaged files, clocks that lie: the plain text, or an error in three parts."""

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.targets import VOCABULARY, Architecture
from transformers_resps import AutoPolicy, CostTable, DraftHead, FixedPolicy, Policy, TreeShape, attach
from transformers_resps.decoding.loop import TreeDecoding
from transformers_resps.policies.acceptance_model import AcceptanceModel, PlattScaling
from transformers_resps.policies.guard import BaselineGuard
from transformers_resps.policies.resps import ReSpSConfig, ReSpSPolicy
from transformers_resps.policies.throughput import ThroughputPolicy


WIDE = TreeShape(40, 3, VOCABULARY)
PROMPT = torch.tensor([[5, 7, 11, 3, 9, 7, 11]])
NAN, INFINITE = float("nan"), float("inf")


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return attach(Architecture("llama").build("sdpa"))


@pytest.fixture(scope="module")
def head(target: PreTrainedModel) -> DraftHead:
    torch.manual_seed(1)
    return DraftHead.from_target(target, 16)


@pytest.fixture(scope="module")
def plain(target: PreTrainedModel) -> Any:
    return target.generate(PROMPT, max_new_tokens=16).tolist()


def generate(target: PreTrainedModel, head: DraftHead, policy: Any) -> Any:
    return target.generate(PROMPT, assistant_model=head, policy=policy, max_new_tokens=16).tolist()


def check_three_parts(error: BaseException) -> None:
    """What came, what is needed, what to do: at least two sentences, no bare message of torch or Python."""
    assert isinstance(error, ValueError)
    assert str(error).rstrip(".").count(". ") + str(error).count("; ") >= 1, str(error)


# --- heads ---------------------------------------------------------------------------------------------------------


def fill(value: float) -> Callable[[torch.Tensor], Any]:
    return lambda weight: weight.fill_(value)


def first_rows(value: float) -> Callable[[torch.Tensor], Any]:
    return lambda weight: weight[:3].fill_(value)


BROKEN: dict[str, tuple[str, Callable[[torch.Tensor], Any]]] = {
    "all logits NaN": ("norm.weight", fill(NAN)),
    "all logits infinite": ("norm.weight", fill(INFINITE)),
    "logits below everything": ("norm.weight", fill(-INFINITE)),
    "three logits NaN": ("lm_head.weight", first_rows(NAN)),
    "three logits infinite": ("lm_head.weight", first_rows(INFINITE)),
    "three logits minus infinite": ("lm_head.weight", first_rows(-INFINITE)),
    "logits overflow": ("lm_head.weight", fill(1e308)),
    "all tokens alike": ("norm.weight", fill(0.0)),
    "keys NaN": ("layers.0.self_attn.k_proj.weight", first_rows(NAN)),
    "one token everywhere": ("d2t", lambda offsets: offsets.copy_(4 - torch.arange(len(offsets)))),
}


@pytest.mark.parametrize("fault", BROKEN)
@pytest.mark.parametrize(
    "policy", ["auto", FixedPolicy(WIDE), FixedPolicy(TreeShape(9, 4, 2, lookup=4))], ids=["auto", "wide", "deep"]
)
def test_a_broken_head_changes_nothing(
    fault: str, policy: Any, target: PreTrainedModel, head: DraftHead, plain: Any
) -> None:
    broken = copy.deepcopy(head)
    name, damage = BROKEN[fault]
    damage({**dict(broken.named_parameters()), **dict(broken.named_buffers())}[name].data)
    assert generate(target, broken, policy) == plain


# --- policies ------------------------------------------------------------------------------------------------------


class Says(Policy):
    """Answers what it is told to."""

    def __init__(self, choose: Any = WIDE, grow: Any = True, size: Any = 40) -> None:
        self.answers = {"choose": choose, "grow": grow, "size": size}

    def choose(self, observation: Any) -> Any:
        return self.answers["choose"]

    def grow(self, level: Any) -> Any:
        return self.answers["grow"]

    def size(self, scores: Any, levels: Any) -> Any:
        return self.answers["size"]


FOLLOWED: list[dict[str, Any]] = [
    {"choose": TreeShape(10_000, 8, VOCABULARY)},
    {"choose": TreeShape(10**9, 4, 10**9), "size": 10**9},
    {"choose": TreeShape(2, 10**9, 1)},
    {"choose": TreeShape(1, 0, 1, lookup=10**9)},
    *({"size": size} for size in (0, -5, 10**9, 3.7, True, torch.tensor(3))),
    *({"grow": grow} for grow in (None, 0, "no", NAN, torch.tensor(False))),
]
REFUSED: list[tuple[dict[str, Any], str]] = [
    *(({"choose": chosen}, "from `choose`. Return a `TreeShape`") for chosen in (None, 3, (40, 3, 2), "auto")),
    *(({"size": size}, "from `size`. Return an integer") for size in (NAN, INFINITE, None, "a", ["a"])),
    ({"size": [3, 3]}, "from `size` for 1 rows. Return one for each"),
    ({"size": torch.tensor([1, 2])}, "from `size`. Return an integer"),
    ({"grow": torch.tensor([1, 2])}, "from `grow`. Return True or False"),
]


@pytest.mark.parametrize("answers", FOLLOWED, ids=str)
def test_an_extreme_answer_of_a_policy_changes_nothing(
    answers: dict[str, Any], target: PreTrainedModel, head: DraftHead, plain: Any
) -> None:
    assert generate(target, head, Says(**answers)) == plain


@pytest.mark.parametrize(("answers", "message"), REFUSED, ids=str)
def test_a_senseless_answer_of_a_policy_is_refused(
    answers: dict[str, Any], message: str, target: PreTrainedModel, head: DraftHead, plain: Any
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        generate(target, head, Says(**answers))
    check_three_parts(caught.value)
    assert generate(target, head, FixedPolicy(WIDE)) == plain


def test_a_tree_that_no_memory_holds_is_refused_before_it_is_drafted() -> None:
    target = attach(Architecture("llama", {"vocab_size": 5000, "num_hidden_layers": 2}).build("sdpa"))
    head = DraftHead.from_target(target)
    for shape in (TreeShape(10_000, 8, 10_000), TreeShape(4097, 2, 1000), TreeShape(10**9, 3, 10**9)):
        with pytest.raises(ValueError, match="a step is limited to 1048576.*Return a smaller shape") as caught:
            generate(target, head, FixedPolicy(shape))
        check_three_parts(caught.value)


# --- clocks and costs ----------------------------------------------------------------------------------------------

CLOCKS: dict[str, Callable[[int], float]] = {
    "standing still": lambda reading: 7.0,
    "going backwards": lambda reading: -0.01 * reading,
    "leaping": lambda reading: (reading * 7919 % 100) - 50.0,
    "infinite": lambda reading: INFINITE,
    "not a number": lambda reading: NAN,
}


@pytest.mark.parametrize("clock", CLOCKS)
def test_a_clock_that_lies_changes_nothing(
    clock: str, target: PreTrainedModel, head: DraftHead, plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    readings = iter(range(10**6))
    monkeypatch.setitem(TreeDecoding.__init__.__kwdefaults__, "clock", lambda: CLOCKS[clock](next(readings)))
    for policy in ("auto", ThroughputPolicy(), FixedPolicy(WIDE)):
        assert generate(target, head, policy) == plain


@pytest.mark.parametrize("seconds", [0.0, -1.0, NAN, INFINITE, "a", None])
@pytest.mark.parametrize("column", ["verify", "draft"])
def test_a_cost_that_no_forward_takes_is_refused(seconds: Any, column: str, tmp_path: Path) -> None:
    verify, draft = {128: {1: 0.1, 8: 0.3}}, {1: 0.05}
    (verify[128] if column == "verify" else draft)[1] = seconds
    (tmp_path / "costs.json").write_text(json.dumps({"verify": verify, "draft": draft, "identity": {}}))
    with pytest.raises(ValueError, match="Delete it and run `calibrate") as caught:
        CostTable.load(tmp_path / "costs.json")
    check_three_parts(caught.value)


# --- files ---------------------------------------------------------------------------------------------------------


def damaged(whole: bytes, chance: random.Random) -> bytes:
    """Cut off, or with one to three bits flipped."""
    if chance.random() < 0.2:
        return whole[: chance.randrange(len(whole))]
    data = bytearray(whole)
    for _ in range(chance.choice([1, 1, 3])):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(data)


@pytest.fixture(scope="module")
def saved(target: PreTrainedModel, head: DraftHead, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    head.save_pretrained(folder / "head")
    FixedPolicy(TreeShape(8, 3, 2)).save_pretrained(folder / "policy")
    acceptance = AcceptanceModel([PlattScaling(0.1, 0.9)] * 4)
    BaselineGuard(ThroughputPolicy(acceptance=acceptance)).save_pretrained(folder / "policy-throughput")
    ReSpSPolicy(ReSpSConfig(head.config.features_width)).save_pretrained(folder / "policy-resps")
    CostTable({128: {1: 0.1, 8: 0.3}}, {1: 0.05}, {"device": "cpu"}).save(folder / "costs.json")
    return folder


@pytest.mark.parametrize(
    ("file", "most_bytes", "tries"),
    [("head/config.json", None, 24), ("head/model.safetensors", 800, 24), ("head/model.safetensors", None, 12)]
    + [("policy/config.json", None, 40), ("costs.json", None, 40)]
    + [("policy-throughput/config.json", None, 40), ("policy-throughput/model.safetensors", None, 60)]
    + [("policy-resps/config.json", None, 40), ("policy-resps/model.safetensors", 800, 24)],
)
def test_a_damaged_file_is_refused_or_harmless(
    file: str, most_bytes: int | None, tries: int, saved: Path, target: PreTrainedModel, head: DraftHead, plain: Any
) -> None:
    """`most_bytes`: damage only the beginning, where safetensors keeps names, shapes and places."""
    path, chance = saved / file, random.Random(file)
    whole = path.read_bytes()
    refused = 0
    for _ in range(tries):
        path.write_bytes(damaged(whole[:most_bytes], chance) + (whole[most_bytes:] if most_bytes else b""))
        try:
            if file.startswith("head"):
                text = generate(target, DraftHead.from_pretrained(saved / "head", target=target), FixedPolicy(WIDE))
            elif file.startswith("policy"):
                text = generate(target, head, AutoPolicy.from_pretrained(path.parent))
            else:
                costs = CostTable.load(path).running(100)
                text = generate(target, head, ThroughputPolicy(costs=costs))
        except ValueError as error:
            check_three_parts(error)
            refused += 1
        else:
            assert text == plain
    path.write_bytes(whole)
    assert refused > 0, "no damage was noticed: the test shows nothing"
