"""`custom_generate=` on a stock model, from a folder and the Hub: the text of plain decoding, and nothing left."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from publishing import publish, write_bundle, write_custom_generate
from tests.conftest import build_target
from tests.training.publishing.artefacts import head_folder, policy_folder
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
    ours = generate(model=attach(target), **prompt, assistant_model=head, max_new_tokens=12, do_sample=False)
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
        generate(model=target, **prompt, assistant_model=head, policy="auto", max_new_tokens=12, do_sample=False)
    before = learned()
    assert before.policy.costs.knows_plain
    generate(model=target, **prompt, assistant_model=head, policy="auto", max_new_tokens=12, do_sample=False)
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


def test_a_published_head_serves_by_itself(target, prompt, tmp_path):
    folder = head_folder(tmp_path / "head")
    write_custom_generate(folder, str(folder))
    plain = target.generate(**prompt, max_new_tokens=12, do_sample=False)
    settings = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True}
    code = {"custom_generate": str(folder), "trust_remote_code": True}
    for policy in (None, FixedPolicy(TreeShape(5, 2, 2))):
        ours = target.generate(**prompt, **code, **settings, policy=policy)
        assert torch.equal(ours.sequences, plain) and ours.speculation.steps
    stock = target.generate(**prompt, **code, **settings, policy="plain")
    assert torch.equal(stock.sequences, plain) and "speculation" not in stock


@pytest.fixture
def bundle(target, tmp_path):
    """The folder of a target beside the code that loads a head."""
    target.save_pretrained(tmp_path / "target")
    folder = head_folder(tmp_path / "head")
    write_bundle(folder, str(folder), tmp_path / "bundle", str(tmp_path / "target"))
    return tmp_path / "bundle"


def test_loading_a_bundle_makes_generate_fast_for_good(bundle, target, prompt):
    plain = target.generate(**prompt, max_new_tokens=12, do_sample=False)
    model = AutoModelForCausalLM.from_pretrained(bundle, trust_remote_code=True)
    settings = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True}
    for _ in range(2):
        ours = model.generate(prompt["input_ids"], attention_mask=prompt["attention_mask"], **settings)
        assert torch.equal(ours.sequences, plain) and ours.speculation.steps
    assert isinstance(model, ReSpSGenerationMixin)
    assert "speculation" not in model.generate(**prompt, **settings, policy="plain")
    stock = AutoModelForCausalLM.from_pretrained(bundle)
    assert torch.equal(stock.generate(**prompt, max_new_tokens=12, do_sample=False), plain)
    assert not isinstance(stock, ReSpSGenerationMixin)


def test_a_bundle_whose_head_is_gone_says_so_at_every_call(bundle, prompt):
    model = AutoModelForCausalLM.from_pretrained(bundle, trust_remote_code=True)
    (bundle.parent / "head" / "model.safetensors").unlink()
    for _ in range(2):
        with pytest.raises((ValueError, OSError), match="head"):
            model.generate(**prompt, max_new_tokens=12)


def test_a_bundle_says_what_it_is(bundle):
    card = (bundle / "README.md").read_text()
    assert "- custom_generate" in card and "base_model: maker/tiny-1M-Instruct" in card
    assert {file.name for file in bundle.iterdir()} == {
        "README.md",
        "config.json",
        "custom_generate",
        "generation_config.json",
        "model.safetensors",
    }


def test_a_bundle_of_another_target_or_over_other_files_is_refused(bundle, tmp_path):
    folder = tmp_path / "head"
    with pytest.raises(ValueError, match="is not empty"):
        write_bundle(folder, str(folder), bundle, str(tmp_path / "target"))
    build_target(hidden_size=40, vocab_size=72).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="hidden_size 40 instead of"):
        write_bundle(folder, str(folder), tmp_path / "new", str(tmp_path / "other"))
    assert not (tmp_path / "new").exists()
