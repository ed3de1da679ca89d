"""What `policy="auto"` learned stays with model and head; policies with an identity are checked before any work."""

import copy
import gc
import pickle
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from transformers_resps import AutoPolicy, DraftHead, ReSpSGenerationMixin, ReSpSPolicy, attach, detach
from transformers_resps.generation.attach import attached, detached
from transformers_resps.heads import pair_identity
from transformers_resps.policies.auto import PolicyCache
from transformers_resps.policies.base import check_same
from transformers_resps.policies.guard import BaselineGuard
from transformers_resps.policies.resps import ReSpSConfig
from transformers_resps.policies.throughput import ThroughputPolicy


class Head:
    """Whatever drafts."""


def lent(cache: PolicyCache, head: object | None, key: Hashable) -> Any:
    """The policy that a call would get now."""
    with cache.borrow(head, key) as policy:
        return policy


def test_auto_goes_on_with_what_it_learned_with_the_same_head(
    tiny_target: PreTrainedModel, tiny_head: DraftHead, prompt: dict[str, torch.Tensor]
) -> None:
    target: Any = attach(tiny_target)
    plain = target.generate(**prompt, max_new_tokens=20, do_sample=False)
    for _ in range(2):
        assert torch.equal(
            target.generate(**prompt, assistant_model=tiny_head, policy="auto", max_new_tokens=20, do_sample=False),
            plain,
        )
    cache, key = target.speculation_state.policy_cache, PolicyCache.key(target, len(prompt["input_ids"]))
    policy = lent(cache, tiny_head, key)
    assert policy.policy.costs.knows_plain, "it learned"
    assert lent(cache, None, key) is not policy
    other_dtype = PolicyCache.key(target.double(), len(prompt["input_ids"]))
    other_rows = PolicyCache.key(target.float(), len(prompt["input_ids"]) + 1)
    assert lent(cache, tiny_head, other_dtype) is not policy, "costs hold for a dtype"
    assert lent(cache, tiny_head, other_rows) is not policy, "and for as many rows"
    assert lent(cache, tiny_head, key) is policy
    assert lent(pickle.loads(pickle.dumps(cache)), tiny_head, key) is not policy
    assert lent(copy.deepcopy(target).speculation_state.policy_cache, tiny_head, key) is not policy
    detach(target)
    assert "speculation_state" not in target.__dict__
    assert lent(attach(target).speculation_state.policy_cache, tiny_head, key) is not policy


def test_a_call_at_the_same_time_borrows_another_policy() -> None:
    cache, head = PolicyCache(), Head()
    with cache.borrow(head, "here") as policy, cache.borrow(head, "here") as other:
        assert other is not policy
    assert lent(cache, head, "here") in (policy, other)


def test_a_refused_call_loses_nothing_that_was_learned(
    tiny_target: PreTrainedModel, tiny_head: DraftHead, prompt: dict[str, torch.Tensor]
) -> None:
    target: Any = attach(tiny_target)
    target.generate(**prompt, assistant_model=tiny_head, policy="auto", max_new_tokens=8)
    key = PolicyCache.key(target, len(prompt["input_ids"]))
    policy = lent(target.speculation_state.policy_cache, tiny_head, key)
    with pytest.raises(ValueError, match="num_beams"):
        target.generate(**prompt, assistant_model=tiny_head, policy="auto", num_beams=2)
    assert lent(target.speculation_state.policy_cache, tiny_head, key) is policy


def test_what_was_learned_stays_while_a_model_is_attached_or_detached_for_a_moment(
    tiny_target: PreTrainedModel, tiny_head: DraftHead
) -> None:
    target: Any = tiny_target
    with attached(target):
        policy = lent(target.speculation_state.policy_cache, tiny_head, "here")
    assert not isinstance(target, ReSpSGenerationMixin)
    attach(target, policy="auto")
    with detached(target):
        assert not isinstance(target, ReSpSGenerationMixin)
    assert lent(target.speculation_state.policy_cache, tiny_head, "here") is policy
    assert target.speculation_state.defaults.policy == "auto"


def test_a_head_that_is_gone_takes_what_was_learned_with_it() -> None:
    cache, head = PolicyCache(), Head()
    lent(cache, head, "here")
    assert len(cache._policies) == 1
    del head
    gc.collect()
    assert len(cache._policies) == 0


@pytest.mark.parametrize("wrap", [lambda policy: policy, BaselineGuard], ids=["bare", "guarded"])
def test_generate_refuses_a_policy_of_another_head_or_target(
    tiny_target: PreTrainedModel,
    tiny_head: DraftHead,
    prompt: dict[str, torch.Tensor],
    make_target: Callable[..., PreTrainedModel],
    wrap: Callable[[ReSpSPolicy], Any],
) -> None:
    target: Any = attach(tiny_target)
    torch.manual_seed(9)
    other = DraftHead.from_target(target, draft_vocab_size=40).eval()
    config = ReSpSConfig(tiny_head.config.features_width, **pair_identity(target, tiny_head))
    options = {"max_new_tokens": 4, "do_sample": False}
    target.generate(**prompt, assistant_model=tiny_head, policy=wrap(ReSpSPolicy(config)), **options)
    with pytest.raises(ValueError, match="trained with the head .*needs draft_vocab_size 48 .here 40"):
        target.generate(**prompt, assistant_model=other, policy=wrap(ReSpSPolicy(config)), **options)
    deeper: Any = attach(make_target(num_hidden_layers=6))
    with pytest.raises(ValueError, match="trained with the target .*needs num_hidden_layers 4 .here 6"):
        deeper.generate(
            **prompt,
            assistant_model=DraftHead.from_target(deeper, draft_vocab_size=48),
            policy=wrap(ReSpSPolicy(config)),
            **options,
        )


def test_a_head_is_not_hashed_for_a_policy_without_an_identity(
    tiny_target: PreTrainedModel, tiny_head: DraftHead, prompt: dict[str, torch.Tensor]
) -> None:
    attach(tiny_target).generate(**prompt, assistant_model=tiny_head, policy="auto", max_new_tokens=2)
    assert tiny_head._fingerprint == (None, "")


def test_the_fingerprint_follows_the_weights(tiny_head: DraftHead) -> None:
    before = tiny_head.fingerprint()
    assert tiny_head.fingerprint() == before
    with torch.no_grad():
        tiny_head.fc.weight.add_(0.5)
    assert tiny_head.fingerprint() != before


def test_a_policy_serves_its_head_in_every_dtype_and_in_float16_asks_for_no_fingerprint(
    tiny_target: PreTrainedModel, tiny_head: DraftHead, tmp_path: Path
) -> None:
    """Small numbers lose bits in float16, and from there another bfloat16 would be hashed."""
    with torch.no_grad():
        tiny_head.fc.weight.mul_(1e-4)
    tiny_head.bfloat16().save_pretrained(tmp_path)
    identity = pair_identity(tiny_target, tiny_head)["head"]
    for dtype in torch.float32, torch.bfloat16, torch.float16:
        loaded = DraftHead.from_pretrained(tmp_path, torch_dtype=dtype)
        check_same("head", identity, pair_identity(tiny_target, loaded)["head"])
        assert ("fingerprint" in pair_identity(tiny_target, loaded)["head"]) == (dtype != torch.float16)


def test_a_fitted_policy_serves_its_own_target_and_head_alone(
    tiny_target: PreTrainedModel, tiny_head: DraftHead, prompt: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    target: Any = attach(tiny_target)
    BaselineGuard(ThroughputPolicy(**pair_identity(target, tiny_head))).save_pretrained(tmp_path)
    options = {"policy": AutoPolicy.from_pretrained(tmp_path), "max_new_tokens": 4, "do_sample": False}
    target.generate(**prompt, assistant_model=tiny_head, **options)
    target.generate(**prompt, **options)
    torch.manual_seed(9)
    other = DraftHead.from_target(target, draft_vocab_size=48).eval()
    with pytest.raises(ValueError, match="trained with the head .*needs fingerprint .*Load the policy"):
        target.generate(**prompt, assistant_model=other, **options)
    with pytest.raises(ValueError, match="The target .* must be a mapping, got 'mine'.*pair_identity"):
        ThroughputPolicy(target="mine")  # type: ignore[arg-type]
