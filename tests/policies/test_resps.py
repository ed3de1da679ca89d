"""Re-SpS in use: the state, persistence, its own random numbers, files and identity."""

import json
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.targets import Architecture
from transformers_resps import DraftHead, TreeShape, attach
from transformers_resps.policies.action_grid import ActionGrid
from transformers_resps.policies.base import Observation
from transformers_resps.policies.resps import ActorCritic, ReSpSConfig, ReSpSPolicy
from transformers_resps.policies.saving import AutoPolicy


def observe(features: torch.Tensor | None, step: int = 0) -> Observation:
    return Observation(features, 10 + step, step, 100, list)


def varied(policy: ReSpSPolicy, seed: int = 0) -> ReSpSPolicy:
    """The same policy with an actor that depends on its input: a fresh one is nearly uniform."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in policy.network.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))
    return policy


@pytest.mark.parametrize("size", [7, 96, 1728])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_features_of_any_size_and_dtype_are_read_whole(size: int, dtype: torch.dtype) -> None:
    policy = varied(ReSpSPolicy(ReSpSConfig(size, normalize=False)))
    features = torch.randn(1, size, generator=torch.Generator().manual_seed(3)).to(dtype).requires_grad_()
    assert policy.decide(features) in policy.config.grid.shapes
    logits = policy.network.logits(features)
    assert logits.dtype == torch.float32
    for place in (0, size - 1):  # the reference code averages or cuts off: here every dimension counts
        moved = features.detach().clone()
        moved[0, place] += 1
        assert not torch.equal(policy.network.logits(moved), logits)


def test_the_networks_are_two_tanh_mlps_of_the_papers_size() -> None:
    network = ReSpSPolicy(ReSpSConfig.paper(4096)).network
    count = {name: sum(weight.numel() for weight in part.parameters()) for name, part in network.named_children()}
    assert count == {"actor": 563_761, "critic": 541_057}  # as counted in the reference code
    first = network.actor[0].weight
    torch.testing.assert_close(first @ first.T, 2 * torch.eye(128), atol=1e-4, rtol=0)  # orthogonal, gain sqrt(2)


def test_a_fresh_network_is_exact_whatever_the_default_dtype_is() -> None:
    expected = ReSpSPolicy(ReSpSConfig(8), seed=3).state_tensors()
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = ReSpSPolicy(ReSpSConfig(8), seed=3).state_tensors()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_normalised_features_are_blind_to_their_scale() -> None:
    policy = varied(ReSpSPolicy(ReSpSConfig(12)))
    features = torch.randn(1, 12)
    torch.testing.assert_close(
        policy.network.logits(features), policy.network.logits(features * 50), atol=1e-3, rtol=1e-3
    )


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("sample", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_broken_features_still_get_a_shape_of_the_grid(value: float, sample: bool, normalize: bool) -> None:
    policy = varied(ReSpSPolicy(ReSpSConfig(12, normalize=normalize, sample=sample)))
    for features in (torch.full((1, 12), value), torch.randn(2, 12).index_fill(1, torch.tensor([4]), value)):
        assert policy.decide(features) in policy.config.grid.shapes


def test_a_decision_is_held_and_a_new_text_makes_a_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = ReSpSPolicy(ReSpSConfig(4, persistence=10))
    decided: list[int] = []
    monkeypatch.setattr(ReSpSPolicy, "decide", lambda self, features: decided.append(1) or self.config.grid[0])
    for text, steps in enumerate((25, 3, 10), start=1):
        before = len(decided)
        for step in range(steps):
            policy.choose(observe(torch.zeros(1, 4), step))
        assert len(decided) - before == ceil(steps / 10), f"text {text}"


def test_use_is_deterministic_and_draws_leave_the_global_random_numbers_alone() -> None:
    features = torch.randn(20, 1, 12)
    greedy = varied(ReSpSPolicy(ReSpSConfig(12)))
    assert [greedy.decide(row) for row in features] == [greedy.decide(row) for row in features]
    state = torch.get_rng_state()
    drawing = [ReSpSPolicy(ReSpSConfig(12, sample=True), seed=5) for _ in range(2)]
    first, second = ([policy.decide(row) for row in features] for policy in drawing)
    assert first == second and len(set(first)) > 5
    assert torch.equal(torch.get_rng_state(), state)


def test_a_batch_gets_the_shape_its_rows_agree_on() -> None:
    policy = ReSpSPolicy(ReSpSConfig(2, ActionGrid.from_bins((4,), (3,), (1, 2)), normalize=False))

    def logits(features: torch.Tensor) -> torch.Tensor:
        return features @ torch.tensor([[9.0, 8.0, 0.0], [0.0, 8.0, 9.0]])

    policy.network.logits = logits  # type: ignore[method-assign]
    assert policy.decide(torch.tensor([[1.0, 0.0]])) == policy.config.grid[0]
    assert policy.decide(torch.eye(2)) == policy.config.grid[1]


@pytest.mark.parametrize(
    "config", [ReSpSConfig(9, target={"name_or_path": "a", "vocab_size": 3}), ReSpSConfig.paper(9)]
)
def test_a_saved_policy_comes_back_bit_for_bit(tmp_path: Path, config: ReSpSConfig) -> None:
    policy = varied(ReSpSPolicy(config))
    policy.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    for loaded in (AutoPolicy.from_pretrained(tmp_path), ReSpSPolicy.from_pretrained(str(tmp_path))):
        assert isinstance(loaded, ReSpSPolicy) and loaded.config == config
        for name, weight in policy.network.state_dict().items():
            assert torch.equal(weight, loaded.network.state_dict()[name])


@pytest.mark.parametrize("damage", ["no weights", "other weights", "broken weights", "unknown setting", "no grid"])
def test_a_damaged_policy_is_refused(tmp_path: Path, damage: str) -> None:
    ReSpSPolicy(ReSpSConfig(9)).save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", json.loads((tmp_path / "config.json").read_text())
    if damage == "no weights":
        weights.unlink()
    elif damage == "other weights":
        ReSpSPolicy(ReSpSConfig(8)).save_pretrained(tmp_path / "other")
        (tmp_path / "other" / "model.safetensors").rename(weights)
    elif damage == "broken weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "unknown setting":
        config["mood"] = "good"
    else:
        del config["grid"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="(cannot read|reads only|its config needs)(?s:.*)ownload or save .*again"):
        AutoPolicy.from_pretrained(tmp_path)


@pytest.mark.parametrize("size", [{"hidden_size": 10**5}, {"feature_size": 10**9}, {"hidden_size": 10**9}], ids=str)
def test_sizes_that_the_weights_do_not_have_are_refused_without_memory_for_them(
    tmp_path: Path, size: dict[str, int]
) -> None:
    ReSpSPolicy(ReSpSConfig(9)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | size))
    with pytest.raises(ValueError, match=r"cannot read(?s:.)*size mismatch for actor.0.weight(?s:.)*Download or save"):
        AutoPolicy.from_pretrained(tmp_path)


def test_another_target_head_or_grid_is_refused_by_name() -> None:
    target = {"name_or_path": "org/small", "hidden_size": 32, "vocab_size": 64}
    policy = ReSpSPolicy(ReSpSConfig(12, target=target, head={"name_or_path": "org/head", "feature_layers": [1, 2]}))
    policy.check_identity(target={**target, "name_or_path": "/a/copy"}, grid=ActionGrid.small())
    with pytest.raises(ValueError, match=r"org/small.*org/large: it needs hidden_size 32 \(here 64\).*train one with"):
        policy.check_identity(target={**target, "name_or_path": "org/large", "hidden_size": 64})
    with pytest.raises(ValueError, match=r"head org/head.*without a name: it needs feature_layers"):
        policy.check_identity(head={"feature_layers": [0, 2]})
    with pytest.raises(ValueError, match=r"another grid of 177, which lacks .*for example plain.*train a policy"):
        policy.check_identity(grid=ActionGrid.paper())
    with pytest.raises(ValueError, match=r"features of width 12, but the head provides 96.*org/small"):
        policy.choose(observe(torch.zeros(1, 96)))
    with pytest.raises(ValueError, match="none without a draft head"):
        policy.choose(observe(None))


@pytest.mark.parametrize("name", ["persistence", "temperature", "hidden_size", "feature_size"])
def test_settings_out_of_range_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}=0`"):
        ReSpSConfig(**{"feature_size": 4, name: 0})


@pytest.mark.parametrize("values", [{"feature_size": "a"}, {"persistence": 1.5}, {"temperature": "x"}, {"grid": []}])
def test_settings_of_another_kind_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"ReSpSConfig got `{next(iter(values))}=.*but.*[Pp]ass `"):
        ReSpSConfig(**{"feature_size": 4, **values})
    with pytest.raises(ValueError, match=r"needs a `ReSpSConfig`, got 12.*Pass `ReSpSConfig"):
        ReSpSPolicy(12)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (ActorCritic(5, 2), r"size mismatch for actor.0.weight: .*\[128, 5\].*\[128, 4\](?s:.)*Pass the network"),
        (ActorCritic(4, 3), r"size mismatch for actor.4.bias: .*\[3\].*\[2\]"),
        (ActorCritic(4, 2, hidden_size=8), r"size mismatch for actor.0.bias: .*\[8\]"),
        (ActorCritic(4, 2, normalize=False), "config's `normalize=True`, got `normalize=False`"),
        (torch.nn.Linear(4, 2), "must be an `ActorCritic` .*got Linear"),
    ],
)
def test_a_network_that_would_not_come_back_from_its_files_is_refused(network: Any, message: str) -> None:
    """Of too few actions it decided all the same, and what was saved could not be loaded."""
    config = ReSpSConfig(4, ActionGrid((TreeShape.plain(), TreeShape(4, 2, 2))))
    with pytest.raises(ValueError, match=message):
        ReSpSPolicy(config, network)


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return attach(Architecture("llama").build("sdpa"))


@pytest.mark.parametrize("do_sample", [False, True])
def test_text_is_that_of_plain_decoding_with_broken_features_and_drawn_shapes(
    target: PreTrainedModel, do_sample: bool
) -> None:
    torch.manual_seed(1)
    head = DraftHead.from_target(target).eval()
    policy = varied(ReSpSPolicy(ReSpSConfig(head.config.features_width, persistence=1, sample=True, temperature=50)))
    healthy = policy.decide
    asked = iter(range(1000))
    policy.decide = lambda features: healthy(features * float("nan") if next(asked) % 3 else features)  # type: ignore
    settings = {"max_new_tokens": 40, "do_sample": do_sample, "return_dict_in_generate": True}
    prompt = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    torch.manual_seed(7)
    plain = target.generate(prompt, **settings)
    torch.manual_seed(7)
    ours = target.generate(prompt, assistant_model=head, policy=policy, **settings)
    assert torch.equal(ours.sequences, plain.sequences)
    assert len({step.shape for step in ours.speculation.steps}) > 3


def test_a_temperature_that_no_number_can_be_divided_by_is_refused() -> None:
    with pytest.raises(ValueError, match="temperature=1000.*at most 1e9"):
        ReSpSConfig(8, temperature=10**30)
