"""`custom_generate=` on a stock model, from a folder and the Hub: the text of plain decoding, and nothing left."""

import pytest
import torch

from publishing import publish, write_custom_generate
from tests.conftest import build_target
from tests.training.publishing.artefacts import policy_folder
from tests.training.publishing.tiny import tiny_target
from transformers_resps import AutoPolicy, DraftHead, FixedPolicy, ReSpSGenerationMixin, TreeShape, attach
from transformers_resps.generation.attach import attached
from transformers_resps.hub.upload import Destination
from transformers_resps.policies.auto import PolicyCache


REPO = "tester/policy"


@pytest.fixture
def target():
    return tiny_target()


@pytest.fixture
def head(target):
    torch.manual_seed(1)
    return DraftHead.from_target(target, draft_vocab_size=48).eval()


@pytest.fixture(params=["folder", "hub"])
def where(request, hub, tmp_path):
    """The folder of a policy, or its repository."""
    folder = policy_folder(tmp_path / "policy")
    if request.param == "hub":
        publish(folder, Destination(REPO))
        return REPO
    write_custom_generate(folder)
    return str(folder)


@pytest.mark.parametrize("do_sample", [False, True])
def test_a_stock_model_decodes_with_trees_and_stays_stock(where, target, head, prompt, do_sample):
    stock = type(target)
    settings = {"max_new_tokens": 20, "do_sample": do_sample, "return_dict_in_generate": True}
    torch.manual_seed(3)
    plain = target.generate(**prompt, **settings)
    torch.manual_seed(3)
    ours = target.generate(
        **prompt,
        custom_generate=where,
        trust_remote_code=True,
        assistant_model=head,
        policy=FixedPolicy(TreeShape(5, 2, 2)),
        **settings,
    )
    assert torch.equal(ours.sequences, plain.sequences)
    assert ours.speculation.steps and type(target) is stock


def test_the_published_policy_serves(where, target, prompt):
    """Its features are of width 12: those of a head that reads one layer of a narrow target."""
    torch.manual_seed(1)
    narrow = build_target(hidden_size=12, num_attention_heads=2, num_key_value_heads=1)
    head = DraftHead.from_target(narrow, draft_vocab_size=48, feature_layers=[2]).eval()
    settings = {"max_new_tokens": 12, "do_sample": False}
    plain = narrow.generate(**prompt, **settings)
    assert torch.equal(
        plain,
        narrow.generate(
            **prompt,
            custom_generate=where,
            trust_remote_code=True,
            assistant_model=head,
            policy=AutoPolicy.from_pretrained(where),
            **settings,
        ),
    )


def test_an_attached_model_stays_attached(where, target, head, prompt):
    from publishing.custom_generate.generate import generate

    plain = target.generate(**prompt, max_new_tokens=12, do_sample=False)
    ours = generate(attach(target), **prompt, assistant_model=head, max_new_tokens=12, do_sample=False)
    assert torch.equal(ours, plain) and isinstance(target, ReSpSGenerationMixin)


def test_auto_goes_on_learning_from_call_to_call(target, head, prompt):
    from publishing.custom_generate.generate import generate

    def learned():
        with (
            attached(target),
            target.speculation_state.policy_cache.borrow(head, PolicyCache.key(target, 1)) as policy,
        ):
            return policy

    for _ in range(2):
        generate(target, **prompt, assistant_model=head, policy="auto", max_new_tokens=12, do_sample=False)
    before = learned()
    assert before.policy.costs.knows_plain
    generate(target, **prompt, assistant_model=head, policy="auto", max_new_tokens=12, do_sample=False)
    assert learned() is before
    assert not isinstance(target, ReSpSGenerationMixin)


def test_a_refusal_leaves_the_model_stock(where, target, head, prompt):
    stock = type(target)
    with pytest.raises(ValueError, match="num_beams"):
        target.generate(**prompt, custom_generate=where, trust_remote_code=True, assistant_model=head, num_beams=2)
    assert type(target) is stock


def test_without_trust_nothing_is_run(where, target, head, prompt):
    with pytest.raises(ValueError, match="trust_remote_code"):
        target.generate(**prompt, custom_generate=where, trust_remote_code=False, assistant_model=head)
