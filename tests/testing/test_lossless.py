"""The kit passes a sound engine; of an engine with a planted fault it says what differs, and where."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from tests.assistants.kinds import KINDS, pair_of
from tests.conftest import build_target
from tests.mutations.bugs.decoding import one_end_token_of_several
from tests.mutations.planting import Function, plant
from transformers_resps import (
    DraftHead,
    FixedPolicy,
    LosslessReport,
    NotLosslessError,
    Observation,
    TreeShape,
    assert_lossless,
    attach,
)
from transformers_resps.decoding.acceptance import Acceptance, accept
from transformers_resps.decoding.text import Text
from transformers_resps.policies.auto import PolicyCache
from transformers_resps.testing import StoppedCheck, lossless
from transformers_resps.testing.comparison import SAMPLED, ComparedCall, ModelUnderTest, compare
from transformers_resps.testing.distribution import check_distribution
from transformers_resps.testing.divergence import MAX_SPACINGS, spacing_at
from transformers_resps.testing.lossless import built_in_prompts
from transformers_resps.tree import DraftTree


WIDE = FixedPolicy(TreeShape(20, 3, 19))
SHORT: dict[str, Any] = {"seeds": 2, "max_new_tokens": 8}
# A prompt that fits into one chunk and one that does not.
BRIEF: dict[str, Any] = SHORT | {"prompts": built_in_prompts(19)[1:3]}
SMALL = FixedPolicy(TreeShape(3, 2, 2))


@pytest.fixture
def target() -> PreTrainedModel:
    """So small a vocabulary that an untrained head is often right."""
    return build_target(vocab_size=19, initializer_range=0.6, num_hidden_layers=2)


@pytest.fixture
def head(target: PreTrainedModel) -> DraftHead:
    torch.manual_seed(1)
    return DraftHead.from_target(target)


@pytest.fixture
def _few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lossless, "_DISTRIBUTION_OUTPUTS", 1)


# The distribution, which takes most of an examination, gets a twelfth of its texts: the others are what is tested.
few_draws = pytest.mark.usefixtures("_few_draws")


def test_a_sound_engine_passes_and_the_report_says_what_was_examined(target: Any, head: DraftHead) -> None:
    report = assert_lossless(target, head, WIDE, **SHORT)
    assert isinstance(report, LosslessReport) and report.is_lossless
    assert not any(check.differences for check in report.texts)
    assert all(check.tau > 1 for check in report.texts if "batch" not in check.name)
    assert report.has_power and report.distribution is not None and report.distribution.fit.draws == 24 * 8
    assert report.verdict == "LOSSLESS: every answer is the plain one"
    page = str(report)
    for fact in ("torch.float32", "threads", torch.__version__, "LlamaForCausalLM", repr(WIDE), "detected"):
        assert fact in page
    assert re.search(r"\nmode +normal\n", page)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_drafter_passes_the_whole_examination(kind: str, tmp_path: Path) -> None:
    target, head = pair_of(kind, tmp_path)
    report = assert_lossless(target, head, WIDE, **BRIEF)
    assert report.has_power and report.verdict == "LOSSLESS: every answer is the plain one"
    assert len(report.texts) == 9 and f"{kind} of " in report.facts["head"]


class StopsAfter(FixedPolicy):
    """Interrupts a check after some steps, as Ctrl-C does."""

    def __init__(self, steps: int) -> None:
        super().__init__(TreeShape(10, 2, 9))
        self.left = steps

    def choose(self, observation: Observation) -> TreeShape:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt
        return super().choose(observation)


def test_a_check_that_is_stopped_reports_what_was_compared(target: Any, head: DraftHead) -> None:
    with pytest.raises(StoppedCheck) as stopped:
        assert_lossless(target, head, StopsAfter(26), **SHORT)
    report = stopped.value.report
    assert len(report.texts) == 2 and report.distribution is None and report.is_lossless and report.is_tested
    assert "every answer is the plain one; stopped after 2 comparisons, before the distribution test" in str(report)
    with pytest.raises(KeyboardInterrupt) as early:
        assert_lossless(target, head, StopsAfter(1), **SHORT)
    assert not isinstance(early.value, StoppedCheck), "nothing was compared"


def test_a_difference_that_was_found_before_the_stop_is_told(
    target: Any, head: DraftHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant_rule(takes_the_second_best, monkeypatch)
    with pytest.raises(NotLosslessError, match="NOT LOSSLESS: sampled, temperature 1"):
        assert_lossless(target, head, StopsAfter(36), **SHORT)


def test_rows_of_a_batch_that_have_ended_took_no_forwards(target: Any, head: DraftHead) -> None:
    """Tau of a batch is that of its rows alone."""
    prompts, model = [torch.tensor([3, 4]), torch.tensor([5, 6])], ModelUnderTest(target, head, WIDE)
    with model.undisturbed():
        first = model.plain(prompts, max_new_tokens=12).outputs[0]
        end = {"eos_token_id": int(first[1]), "max_new_tokens": 12, "do_sample": False}
        calls = [ComparedCall(index, prompt, 0, end) for index, prompt in enumerate(prompts)]
        alone = [compare(model, "", [[call]]) for call in calls]
        together = compare(model, "", [calls])
    assert min(check.tokens for check in alone) < max(check.tokens for check in alone)
    assert together.target_forwards == sum(check.target_forwards for check in alone)


def test_lookup_alone_is_examined_too(target: Any) -> None:
    prompts = [torch.tensor([3, 4, 5, 6] * 4)]
    report = assert_lossless(target, policy=FixedPolicy(TreeShape(1, 0, 1, lookup=4)), prompts=prompts, **SHORT)
    assert report.distribution is not None and report.distribution.accepted > 0 and "lookup" in report.facts["head"]


@few_draws
def test_a_policy_that_never_drafts_has_no_power_and_is_told_so(target: Any, head: DraftHead) -> None:
    report = assert_lossless(target, head, FixedPolicy(TreeShape.plain()), **SHORT)
    assert not report.has_power and not report.is_tested
    assert "no drafted token was ever accepted" in str(report)
    assert report.verdict.startswith("NOTHING WAS TESTED: no drafted token of the policy was accepted, so its answers")
    assert any(check.accepted for check in report.texts), "built-in trees were tested"


def test_a_comparison_in_which_nothing_was_accepted_is_counted_in_the_headline(target: Any, head: DraftHead) -> None:
    report = assert_lossless(target, head, WIDE, [torch.tensor([3, 4, 5])], seeds=4, max_new_tokens=2)
    idle = [check for check in report.texts if check.is_of_policy and check.tokens == check.target_forwards]
    assert idle and report.has_power and report.is_tested
    assert f"no draft was accepted in {len(idle)} of the comparisons" in report.verdict


@few_draws
def test_how_far_it_is_is_shown(target: Any, head: DraftHead, capsys: pytest.CaptureFixture[str]) -> None:
    assert_lossless(target, head, WIDE, seeds=1, max_new_tokens=2)
    assert "Comparing with plain decoding:   0%|          | 0/" in capsys.readouterr().err


@few_draws
@pytest.mark.parametrize(("attached", "training"), [(False, True), (True, False)])
def test_the_model_is_left_as_it_was_found(target: Any, head: DraftHead, attached: bool, training: bool) -> None:
    (attach(target) if attached else target).train(training)
    target.lm_head.eval()  # frozen by itself, as trainers do
    before, settings = type(target), target.generation_config
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert_lossless(target, head, WIDE, seeds=1, max_new_tokens=2)
    assert type(target) is before and target.generation_config is settings
    assert target.training == target.model.training == training and not target.lm_head.training
    assert torch.equal(torch.get_rng_state(), state)


def test_the_model_is_left_as_it_was_found_when_the_examination_fails(target: Any, head: DraftHead) -> None:
    before = type(target)
    with pytest.raises(ValueError, match="num_beams"):
        target.generation_config.num_beams = 2
        assert_lossless(target, head, WIDE, **SHORT)
    assert type(target) is before


@few_draws
def test_the_models_own_processors_and_end_token_are_part_of_the_texts(target: Any, head: DraftHead) -> None:
    target.generation_config.eos_token_id = [5, 7]
    target.generation_config.repetition_penalty = 1.4
    assert assert_lossless(target, head, WIDE, **BRIEF).is_lossless


@few_draws
def test_a_target_with_an_adapter_is_examined(target: Any, head: DraftHead) -> None:
    lora = LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    wrapped = get_peft_model(target, lora)
    assert assert_lossless(wrapped, head, WIDE, **BRIEF).is_lossless


@pytest.mark.parametrize("prompts", [[], "a text", ["a text"], [[3]], [[3, 19]], [[3, -1]], [[[3, 4]]], [[0.5, 1.0]]])
def test_an_unusable_prompt_is_refused(target: Any, head: DraftHead, prompts: Any) -> None:
    with pytest.raises(ValueError, match="prompt"):
        assert_lossless(target, head, WIDE, prompts)


@few_draws
def test_what_auto_has_learned_with_a_model_survives_its_examination(target: Any, head: DraftHead) -> None:
    attach(target)
    target.generate(torch.tensor([[3, 4, 5]]), assistant_model=head, policy="auto", max_new_tokens=12)
    key = PolicyCache.key(target, 1)
    with target.speculation_state.policy_cache.borrow(head, key) as policy:
        pass
    assert_lossless(target, head, "auto", **BRIEF)
    with target.speculation_state.policy_cache.borrow(head, key) as known:
        assert known is policy


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": None}, "needs a loaded causal LM, got None"),
        ({"model": "gpt2"}, "needs a loaded causal LM, got 'gpt2'"),
        ({"head": 3}, "`head` must be what drafts: .*got 3. Pass"),
        ({"head": torch.nn.Linear(2, 2)}, "`head` must be what drafts: .*got a Linear. Pass"),
        ({"head": "auto"}, "`head` must be what drafts: .*got 'auto'. Pass it as `policy`"),
    ],
    ids=str,
)
def test_arguments_of_another_kind_are_refused(
    target: Any, head: DraftHead, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        assert_lossless(**{"model": target, "head": head} | given)


@pytest.mark.parametrize("numbers", [{"seeds": 0}, {"max_new_tokens": 1}])
def test_numbers_that_test_nothing_are_refused(target: Any, head: DraftHead, numbers: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least one prompt, one seed"):
        assert_lossless(target, head, WIDE, **numbers)


# --- planted changes ------------------------------------------------------------------------------------------------

Accept = Callable[..., Acceptance]


def takes_the_second_best(tree: DraftTree, logits: torch.Tensor, text: Text, *reached: Any) -> Acceptance:
    """Lossy at drafted steps: the best token is forbidden."""
    if tree.node_count > 1:
        logits = logits.scatter(-1, logits.argmax(-1, keepdim=True), -torch.inf)
    return accept(tree, logits, text)


def keeps_a_child_that_was_not_picked(tree: DraftTree, logits: torch.Tensor, text: Text, *reached: Any) -> Acceptance:
    """Lossy: the drafter's first child is taken for the pick."""
    if tree.node_count > 1:
        logits = logits.clone()
        logits[:, 0].scatter_(1, tree.tokens[:, 1:2], 1e4)
    return accept(tree, logits, text)


def keeps_drafts_too_often(tree: DraftTree, logits: torch.Tensor, text: Text, *reached: Any) -> Acceptance:
    """Subtly lossy: drafted tokens get 3 more in their logits."""
    if tree.node_count > 1:
        logits = logits.clone()
        children = tree.tokens[:, 1:].masked_fill(tree.parents[:, 1:] != 0, int(tree.tokens[0, 1]))
        logits[:, 0] += 3.0 * torch.zeros_like(logits[:, 0]).scatter_(1, children[:, :2], 1.0)
    return accept(tree, logits, text)


def plant_rule(lossy: Accept, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the acceptance rule wherever the package uses it, and pick in no other way."""
    plant("decoding.acceptance:accept", lambda accept: lossy, monkeypatch.setattr)
    plant("decoding.text:Batch.picks_by_scores", lambda asked: lambda self, count: False, monkeypatch.setattr)


@few_draws
@pytest.mark.parametrize("lossy", [takes_the_second_best, keeps_a_child_that_was_not_picked, keeps_drafts_too_often])
def test_a_lossy_rule_is_found_and_its_first_wrong_token_named(
    lossy: Accept, target: Any, head: DraftHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant_rule(lossy, monkeypatch)
    with pytest.raises(NotLosslessError) as raised:
        assert_lossless(target, head, WIDE, **BRIEF)
    report, page = raised.value.report, str(raised.value)
    assert not report.is_lossless and "NOT LOSSLESS" in page
    difference = next(difference for check in report.texts for difference in check.differences)
    assert str(difference) in page and "NOT explained by rounding" in page
    assert difference.divergence.position >= 1, "the first token is picked before anything is drafted"


def draw_once_more(close: Function) -> Function:
    return lambda self: (torch.rand(1), close(self))


def pad_with_another_token(padded: Function) -> Function:
    def wrong(text: Text, length: int) -> torch.Tensor:
        row = padded(text, length).clone()
        row[:, text.length :] = 5
        return row

    return wrong


def never_in_lockstep(is_lockstep: Function) -> Function:
    return lambda lockstep, do_sample, reason: False


def forget_where_a_chunk_began(read: Function) -> Function:
    def wrong(self: Any, tokens: Any, mask: Any, positions: Any, **options: Any) -> Any:
        return read(self, tokens, mask, positions + (positions.min() > 0).long(), **options)

    return wrong


def hide_ancestors_of_a_chain(with_branches: Function) -> Function:
    def wrong(self: DraftTree, rows: Any) -> DraftTree:
        tree = with_branches(self, rows)
        tree.ancestors[:, 1:, 0] = False
        return tree

    return wrong


@few_draws
def test_without_such_a_fault_the_same_examination_passes(target: Any, head: DraftHead) -> None:
    target.generation_config.eos_token_id = [2, 7, 11]
    assert_lossless(target, head, SMALL, **BRIEF)


@few_draws
@pytest.mark.parametrize(
    ("symbol", "wrong", "check"),
    [
        ("verifying.growing:TreeVerifier.close", draw_once_more, "sampled, temperature 1"),
        ("decoding.text:Batch._padded", pad_with_another_token, "greedy, in a padded batch"),
        ("generation.plan:is_lockstep", never_in_lockstep, "sampled, in a padded batch"),
        ("verifying.forward:TargetForward.read", forget_where_a_chunk_began, "greedy, a prompt in chunks"),
        ("decoding.text:StopConditions.of", one_end_token_of_several.instead_of, "greedy, ends inside trees"),
        ("tree:DraftTree.with_branches", hide_ancestors_of_a_chain, "greedy, in a padded batch, built-in trees"),
    ],
)
def test_a_fault_outside_acceptance_and_the_policys_own_trees_is_found(
    symbol: str,
    wrong: Callable[[Function], Function],
    check: str,
    target: Any,
    head: DraftHead,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target.generation_config.eos_token_id = [2, 7, 11]
    plant(symbol, wrong, monkeypatch.setattr)
    with pytest.raises(NotLosslessError) as refusal:
        assert_lossless(target, head, SMALL, **BRIEF)
    assert check in [found.name for found in refusal.value.report.texts if not found.passed]


@few_draws
def test_a_tree_that_changes_after_its_verification_is_found_with_mtp_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The keys that are kept are then those of another token."""

    def changing(verify: Function) -> Function:
        def wrong(self: Any, tree: DraftTree) -> Any:
            logits, features = verify(self, tree)
            tree.tokens[:, 1:2] = logits[:, 0].argmax(-1, keepdim=True)
            return logits, features

        return wrong

    target, head = pair_of("MtpHead", tmp_path)
    plant("verifying.growing:TreeVerifier.verify", changing, monkeypatch.setattr)
    with pytest.raises(NotLosslessError, match="NOT LOSSLESS: greedy"):
        assert_lossless(target, head, SMALL, **BRIEF)


@pytest.fixture
def rounding(target: Any, head: DraftHead, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half precision, in which every logit moves by up to half of what is excused: no gap by more than that."""
    target.bfloat16()
    head.bfloat16()
    generator = torch.Generator().manual_seed(1)

    def rounds_otherwise(tree: DraftTree, logits: torch.Tensor, text: Text, *reached: Any) -> Acceptance:
        spacing = spacing_at(float(logits.abs().max()), torch.bfloat16) / 2  # the best logit may be the smaller one
        noise = MAX_SPACINGS / 2 * (2 * torch.rand(logits.shape, generator=generator) - 1)
        return accept(tree, logits.float() + noise * spacing, text)

    plant_rule(rounds_otherwise, monkeypatch)


@few_draws
def test_half_precision_excuses_what_rounding_can_do_sampled_answers_too(
    target: Any, head: DraftHead, rounding: None
) -> None:
    report = assert_lossless(target, head, WIDE, **BRIEF | {"max_new_tokens": 24})
    sampled = [difference for check in report.texts[2:] for difference in check.differences]
    assert sampled and all(0 < difference.divergence.spacings <= MAX_SPACINGS for difference in sampled)
    assert "rounding explains it" in str(report)


def test_a_sound_engine_passes_in_half_precision(target: Any, head: DraftHead) -> None:
    assert assert_lossless(target.bfloat16(), head.bfloat16(), WIDE, **BRIEF).is_lossless


@few_draws
@pytest.mark.parametrize("lossy", [takes_the_second_best, keeps_a_child_that_was_not_picked, keeps_drafts_too_often])
def test_half_precision_excuses_no_lossy_rule(
    lossy: Accept, target: Any, head: DraftHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    target.bfloat16()
    head.bfloat16()
    plant_rule(lossy, monkeypatch)
    with pytest.raises(NotLosslessError, match="NOT explained by rounding"):
        assert_lossless(target, head, WIDE, **BRIEF)


def test_the_distribution_alone_finds_a_rule_that_favours_drafts(
    target: Any, head: DraftHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = built_in_prompts(19)
    sound = check_distribution(ModelUnderTest(target, head, WIDE), prompts, 24)
    assert sound.passed and sound.has_power
    for lossy in (keeps_a_child_that_was_not_picked, keeps_drafts_too_often):
        with monkeypatch.context() as patch:
            plant_rule(lossy, patch)
            found = check_distribution(ModelUnderTest(target, head, WIDE), prompts, 24)
        assert not found.passed and found.fit.total_variation > 3 * sound.fit.total_variation, lossy.__name__


@few_draws
def test_a_head_that_reads_the_answers_of_another_model_is_still_lossless(target: Any, head: DraftHead) -> None:
    """The kit judges texts, not drafters: however bad the drafts, a sound engine passes."""
    for parameter in head.parameters():
        parameter.data.normal_()
    assert assert_lossless(target, head, WIDE, **BRIEF).is_lossless


# --- the invariant mode ----------------------------------------------------------------------------------------------


def test_the_invariant_mode_is_examined_in_half_precision_and_told(target: Any, head: DraftHead) -> None:
    report = assert_lossless(target.bfloat16(), head.bfloat16(), WIDE, **BRIEF, invariant=True)
    assert not any(check.differences for check in report.texts) and report.has_power
    assert report.verdict == "LOSSLESS: every answer is the plain one of the invariant mode"
    names = [check.name for check in report.texts]
    assert "sampled, in a padded batch" in names and "greedy, prompts in chunks against each at once" in names
    assert re.search(r"\nmode +invariant\n", str(report))


@few_draws
def test_every_call_of_the_examination_runs_in_the_mode_but_stocks(
    target: Any, head: DraftHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def noting(generate: Function) -> Function:
        return lambda *given, **named: (asked.append(named.get("invariant")), generate(*given, **named))[1]

    plant("generation.mixin:ReSpSGenerationMixin.generate", noting, monkeypatch.setattr)
    assert_lossless(target, head, WIDE, seeds=1, max_new_tokens=4, invariant=True)
    assert asked and all(asked)


def test_a_target_that_the_mode_refuses_is_refused_by_its_examination(target: Any, head: DraftHead) -> None:
    target.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="`invariant=True` does not support attn_implementation='eager'"):
        assert_lossless(target, head, WIDE, **SHORT, invariant=True)


def test_the_invariant_mode_excuses_nothing(target: Any, head: DraftHead, rounding: None) -> None:
    calls = [ComparedCall(0, built_in_prompts(19)[1], seed, SAMPLED | {"max_new_tokens": 12}) for seed in range(6)]
    model = ModelUnderTest(target, head, WIDE, invariant=True)
    with model.undisturbed(), model.without_settings():
        found = compare(model, "", [[call] for call in calls])
    assert not found.passed and all(one.divergence.spacings <= MAX_SPACINGS for one in found.differences)
    assert "spacings of the dtype: NOT excused in the invariant mode" in str(found.differences[0])


@few_draws
def test_a_fault_that_trees_and_plain_decoding_share_in_batches_is_found_by_the_rows_alone(
    target: Any, head: DraftHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rows_disturb_each_other(generate: Function) -> Function:
        return lambda self, prompts, **settings: generate(
            self, prompts, **settings | ({"suppress_tokens": list(range(3, 12))} if len(prompts) > 1 else {})
        )

    plant("testing.comparison:ModelUnderTest._generate", rows_disturb_each_other, monkeypatch.setattr)
    with pytest.raises(NotLosslessError) as found:
        assert_lossless(target, head, WIDE, **BRIEF, invariant=True)
    assert [check.name for check in found.value.report.texts if not check.passed] == [
        "greedy, rows of a padded batch against each alone",
        "greedy, prompts in chunks against each at once",
    ]
