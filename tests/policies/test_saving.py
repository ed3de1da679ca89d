"""Policies as files: the right class comes back, and what cannot be read is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from transformers_resps import TreeShape
from transformers_resps.policies.fixed import FixedPolicy
from transformers_resps.policies.resps import ReSpSPolicy
from transformers_resps.policies.saving import AutoPolicy


def test_auto_policy_returns_the_right_class_and_names_what_is_wrong(tmp_path: Path) -> None:
    FixedPolicy(TreeShape(8, 3, 2)).save_pretrained(tmp_path / "fixed")
    loaded = AutoPolicy.from_pretrained(tmp_path / "fixed")
    assert isinstance(loaded, FixedPolicy) and loaded.shape == TreeShape(8, 3, 2)
    with pytest.raises(ValueError, match=r"type 'fixed', but ReSpSPolicy loads 'resps'.*AutoPolicy"):
        ReSpSPolicy.from_pretrained(tmp_path / "fixed")
    (tmp_path / "new").mkdir()
    with pytest.raises(ValueError, match=r"no `config.json`.*Check the path"):
        AutoPolicy.from_pretrained(tmp_path / "new")
    (tmp_path / "new" / "config.json").write_text('{"policy_type": "oracle"}')
    with pytest.raises(ValueError, match=r"'oracle', but this release knows \['fixed'.*Update"):
        AutoPolicy.from_pretrained(tmp_path / "new")
    for missing in (str(tmp_path / "missing"), "nobody/nothing"):
        with pytest.raises(ValueError, match="neither a .*folder.*Check the path"):
            AutoPolicy.from_pretrained(missing)
    with pytest.raises(TypeError, match="AutoPolicy.from_pretrained"):
        AutoPolicy()


class Shallow(FixedPolicy):
    """A class between, of no type of its own."""


class Own(Shallow):
    policy_type = "own"


def test_auto_policy_knows_subclasses_of_subclasses(tmp_path: Path) -> None:
    for policy in (Own(TreeShape(8, 3, 2)), FixedPolicy(TreeShape(8, 3, 2))):
        policy.save_pretrained(tmp_path)
        assert type(AutoPolicy.from_pretrained(tmp_path)) is type(policy)


CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"policy_type": "fixed", "shape": [8, 3, 2], "zz": 1, "a": 2}, "holds 'a', 'zz', but .*reads only shape. Update"),
    ({"policy_type": "throughput", "costs": {"a": 1}}, "holds 'costs', but .*reads only depth.*Update"),
    ({"policy_type": "guard", "policy": {"policy_type": "throughput", "odds": 3}}, "holds 'odds', but .*Update"),
    ({"policy_type": "guard", "policy": "abc"}, "guarded policy .*got 'abc'.*Download or save"),
    ({"policy_type": "guard", "policy": {"policy_type": ["x"]}}, "guarded policy .*got .*Download or save"),
]


@pytest.mark.parametrize(("config", "message"), CONFIGS, ids=[str(config) for config, _ in CONFIGS])
def test_values_that_are_not_read_are_refused_by_name(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        AutoPolicy.from_pretrained(tmp_path)


def test_a_config_that_is_nested_too_deep_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[" * 10**5)
    with pytest.raises(ValueError, match="is not JSON .*Download or save the policy again"):
        AutoPolicy.from_pretrained(tmp_path)
