"""Prompts become a policy: recorded, measured and judged inside the trainer, as a user of TRL would call it."""

import inspect
import json
import math
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOTrainer

from tests.conftest import FakeClock
from tests.drafting.test_block_drafter import block_head
from tests.image_processors import image_processor, image_prompt, image_target, picture
from tests.targets import Architecture
from tests.tokenizers import BARE, letter_tokenizer, templated, turns
from transformers_resps import (
    AutoPolicy,
    BaselineGuard,
    CostTable,
    DraftHead,
    FixedPolicy,
    ReSpSPolicy,
    ThroughputPolicy,
    TreeShape,
    attach,
    detach,
)
from transformers_resps.calibration import identity_of
from transformers_resps.data import prompt_fingerprint, read_training_prompts
from transformers_resps.heads import pair_identity
from transformers_resps.policies.action_grid import ActionGrid
from transformers_resps.policies.resps import ReSpSConfig
from transformers_resps.telemetry.report import Timing
from transformers_resps.trainers import PolicyTrainer, PolicyTrainingConfig, data, fit_policy
from transformers_resps.trainers.data import AnswerRecorder
from transformers_resps.trainers.policy_trainer import PolicyComparison


GRID = ActionGrid((TreeShape.plain(), TreeShape(4, 3, 1), TreeShape(6, 2, 2)))
WORDS = ("fghi", "gh", "hifgh", "ifgf", "jklm", "nopqr")
TRAIN = Dataset.from_list([{"prompt": [{"role": "user", "content": word}]} for word in WORDS[:4]])
HELD_OUT = Dataset.from_list([{"prompt": f"{word}d"} for word in WORDS[4:]])


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, DraftHead]:
    """A tiny target with a tokenizer, and its head, loaded from `target/` and `head/`; costs are planted."""

    def planted(target: Any, head: DraftHead) -> CostTable:
        seconds = {nodes: 1.0 + 0.05 * nodes for nodes in range(1, 17)}
        return CostTable({1: seconds, 64: seconds}, {1: 0.1, 4: 0.2}, identity_of(target, head))

    monkeypatch.setattr(data, "calibrate", planted)
    monkeypatch.chdir(tmp_path)
    target: Any = Architecture("llama").build("sdpa").float()
    for part in (target, templated(BARE)):
        part.save_pretrained("target")
    torch.manual_seed(1)
    DraftHead.from_target(target, draft_vocab_size=12).save_pretrained("head")
    loaded = type(target).from_pretrained("target", dtype=torch.float32)
    return loaded, DraftHead.from_pretrained("head", target=loaded)


def config(**changes: Any) -> PolicyTrainingConfig:
    short = {"max_steps": 16, "save_steps": 8, "logging_steps": 8, "per_device_train_batch_size": 2}
    quick = {"max_completion_length": 24, "use_cpu": True, "disable_tqdm": True, "report_to": "none"}
    return PolicyTrainingConfig("run", **{**short, **quick, **changes})


def resps(pair: tuple[Any, DraftHead], **changes: Any) -> ReSpSPolicy:
    return ReSpSPolicy(ReSpSConfig(pair[1].config.features_width, GRID, persistence=1, **changes))


def test_a_block_head_has_policies_too(pair: tuple[Any, DraftHead]) -> None:
    """Re-SpS learns over trees of its block, and what "auto" means is fitted with a scaling for each of its levels."""
    target, _ = pair
    head = block_head(target, block_size=7)
    given: dict[str, Any] = {"train_dataset": TRAIN, "eval_dataset": HELD_OUT, "target": target, "head": head}
    trainer = PolicyTrainer("resps", config(drop_hopeless=False), **given)
    trainer.train()
    policy = AutoPolicy.from_pretrained("run/policy")
    assert isinstance(policy, ReSpSPolicy) and max(shape.depth for shape in policy.config.grid.shapes) == 6
    assert math.isfinite(trainer.evaluate()["eval_tokens_per_second"])
    auto = fit_policy("auto", config(), **given).policy
    assert isinstance(auto, ThroughputPolicy) and len(auto.acceptance.scalings) == 6
    for one in (policy, AutoPolicy.from_pretrained("run/policy")):
        prompt = torch.tensor([[5, 6, 7, 8]])
        call = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 16}
        assert (
            attach(target).generate(prompt, **call, assistant_model=head, policy=one).tolist()
            == target.generate(prompt, **call).tolist()
        )
    short = block_head(target, block_size=4)
    assert (
        max(s.depth for s in PolicyTrainer("resps", config(), **given | {"head": short}).policy.config.grid.shapes) < 4
    )


def weights(folder: str) -> dict[str, torch.Tensor]:
    policy = AutoPolicy.from_pretrained(folder)
    assert isinstance(policy, ReSpSPolicy)
    return policy.network.state_dict()


def test_the_signature_is_that_of_trls_grpo_trainer() -> None:
    theirs, ours = (list(inspect.signature(trainer.__init__).parameters) for trainer in (GRPOTrainer, PolicyTrainer))
    shared = ["self", "model", "args", "train_dataset", "eval_dataset", "processing_class", "callbacks"]
    assert [name for name in theirs if name in ours] == shared == ours[: len(shared)]
    named = inspect.signature(PolicyTrainer.__init__).parameters
    assert {name for name, one in named.items() if one.kind is one.KEYWORD_ONLY} == {"target", "head", "reward_func"}
    assert all(named[name].default is None for name in shared[2:])


@pytest.mark.parametrize("by_name", [True, False])
def test_prompts_become_a_re_sps_policy_of_the_target_and_the_head(pair: tuple[Any, DraftHead], by_name: bool) -> None:
    target, head = ("target", "head") if by_name else pair
    trainer = PolicyTrainer("resps", config(), TRAIN, HELD_OUT, target=target, head=head)
    trainer.train()
    policy = AutoPolicy.from_pretrained("run/policy")
    assert isinstance(policy, ReSpSPolicy)
    policy.check_identity(**pair_identity(*pair))
    assert TreeShape.plain() in policy.config.grid.shapes and len(policy.config.grid) > 1
    assert read_training_prompts("run/policy") == set(map(prompt_fingerprint, [*WORDS[:4], "jklmd", "nopqrd"]))
    told = json.loads(Path("run/policy/metrics.json").read_text())
    assert told["gain_over_best_fixed"] == trainer.evaluate()["eval_gain_over_best_fixed"]
    assert told["gain_over_best_fixed_low"] <= told["gain_over_best_fixed"] <= told["gain_over_best_fixed_high"]
    assert "judged on 2 held-out texts, which prove little" in told["verdict"]
    prompt = torch.tensor([[5, 6, 7, 3]])
    plain = pair[0].generate(prompt, max_new_tokens=20, do_sample=False)
    out = attach(pair[0]).generate(prompt, assistant_model=pair[1], policy=policy, max_new_tokens=20, do_sample=False)
    assert torch.equal(out, plain)


def test_prompts_fit_what_auto_means(pair: tuple[Any, DraftHead], caplog: pytest.LogCaptureFixture) -> None:
    keywords: Any = {"target": pair[0], "head": pair[1]}
    fitted = fit_policy("auto", config(), TRAIN, HELD_OUT, **keywords)
    assert isinstance(fitted.policy, ThroughputPolicy)
    assert any(one.slope != 1.0 for one in fitted.policy.acceptance.scalings)
    assert AutoPolicy.from_pretrained("run/policy").to_config() == fitted.to_config()  # type: ignore[attr-defined]
    fitted.policy.check_identity(**pair_identity(*pair))
    assert caplog.text.count("Compared on held-out texts") == 1
    assert json.loads(Path("run/policy/metrics.json").read_text())["held_out_texts"] == 2
    assert read_training_prompts("run/policy") == set(map(prompt_fingerprint, WORDS[:4])), "not those it is judged by"
    again = fit_policy("run/policy", config(), TRAIN, **keywords)
    assert again.to_config() == fitted.to_config()


def test_a_fit_keeps_the_sizes_of_a_policy_and_uses_recordings_again(
    pair: tuple[Any, DraftHead], monkeypatch: pytest.MonkeyPatch
) -> None:
    keywords: Any = {"target": pair[0], "head": pair[1]}
    fit_policy(ThroughputPolicy(3, 2, 5), config(), TRAIN, **keywords)
    fitted = AutoPolicy.from_pretrained("run/policy").to_config()["policy"]  # type: ignore[attr-defined]
    assert (fitted["depth"], fitted["top_k"], fitted["most_nodes"]) == (3, 2, 5)
    told = json.loads(Path("run/policy/metrics.json").read_text())
    assert not Path("run/costs.json").exists() and told.keys() == {"training"}, "nothing was judged"
    recipe = yaml.safe_load(Path("run/policy/recipe.yaml").read_text())
    assert told["training"]["texts"] > 0 and (recipe["target"], recipe["head"]) == ("target", "head")
    monkeypatch.setattr(AnswerRecorder, "_answer", None)
    fit_policy(ThroughputPolicy(3, 2, 5), config(), TRAIN, **keywords)


def test_a_fit_without_prompts_or_of_another_policy_is_refused(pair: tuple[Any, DraftHead]) -> None:
    keywords: Any = {"target": pair[0], "head": pair[1]}
    with pytest.raises(ValueError, match="`train_dataset` is missing, but fitting needs prompts"):
        fit_policy("auto", config(), **keywords)
    with pytest.raises(ValueError, match="`model` is a ReSpSPolicy, but must be a `ThroughputPolicy`"):
        fit_policy(resps(pair), config(), TRAIN, **keywords)  # type: ignore[arg-type]


def test_a_fit_that_may_not_be_pushed_is_refused_before_any_work(
    pair: tuple[Any, DraftHead], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("the repository was published with measurements")

    monkeypatch.setattr("transformers_resps.trainers.base.make_repository", refuse)
    with pytest.raises(OSError, match="published with measurements"):
        fit_policy("auto", config(push_to_hub=True), TRAIN, target=pair[0], head=pair[1])
    assert not Path("run/replay").exists()


def test_a_guarded_policy_keeps_its_guard(pair: tuple[Any, DraftHead]) -> None:
    guarded = BaselineGuard(resps(pair))
    PolicyTrainer(guarded, config(max_steps=8), TRAIN, target=pair[0], head=pair[1]).train()
    made = AutoPolicy.from_pretrained("run/policy")
    assert isinstance(made, BaselineGuard) and isinstance(made.policy, ReSpSPolicy)
    made.policy.check_identity(**pair_identity(*pair), grid=GRID)
    assert made.policy.config.target is not None


class KilledError(Exception):
    pass


class Stop(TrainerCallback):
    """As a kill after a checkpoint would."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step >= self._step


def test_a_run_killed_while_recording_and_again_while_training_ends_as_an_uninterrupted_one(
    pair: tuple[Any, DraftHead], monkeypatch: pytest.MonkeyPatch
) -> None:
    keywords: Any = {"target": pair[0], "head": pair[1]}
    answer, answered = AnswerRecorder._answer, list[int]()

    def killed_at_the_third(recorder: Any, prompt: torch.Tensor) -> Any:
        answered.append(len(prompt))
        if len(answered) == 3:
            raise KilledError
        return answer(recorder, prompt)

    monkeypatch.setattr(AnswerRecorder, "_answer", killed_at_the_third)
    with pytest.raises(KilledError):
        PolicyTrainer(resps(pair), config(), TRAIN, HELD_OUT, **keywords).train(resume_from_checkpoint=True)
    assert len(list(Path("run/replay").iterdir())) == 2 and not Path("run/policy").exists()
    stopped = PolicyTrainer(resps(pair), config(), TRAIN, HELD_OUT, callbacks=[Stop(8)], **keywords)
    stopped.train(resume_from_checkpoint=True)
    assert len(answered) == 3 + 4 and not Path("run/policy").exists() and Path("run/policy-unfinished").exists()
    PolicyTrainer(resps(pair), config(), TRAIN, HELD_OUT, **keywords).train(resume_from_checkpoint=True)
    assert len(answered) == 7
    resumed = weights("run/policy")
    Path("run").rename("resumed")
    PolicyTrainer(resps(pair), config(), TRAIN, HELD_OUT, **keywords).train()
    assert all(torch.equal(value, resumed[name]) for name, value in weights("run/policy").items())


def test_a_checkpoint_of_other_prompts_or_costs_is_not_resumed(pair: tuple[Any, DraftHead]) -> None:
    keywords: Any = {"target": pair[0], "head": pair[1]}
    PolicyTrainer(resps(pair), config(), TRAIN, **keywords).train()
    with pytest.raises(ValueError, match="checkpoint-16 was trained with other prompts than now"):
        PolicyTrainer(resps(pair), config(max_steps=24), HELD_OUT, **keywords).train(resume_from_checkpoint=True)
    costs = Path("run/costs.json")
    dearer = json.loads(costs.read_text())
    costs.write_text(json.dumps(dearer | {"overhead": 1.0}))
    with pytest.raises(ValueError, match="checkpoint-16 was trained with other costs than now"):
        PolicyTrainer(resps(pair), config(max_steps=24), TRAIN, **keywords).train(resume_from_checkpoint=True)
    costs.write_text(json.dumps(dearer | {"identity": dearer["identity"] | {"device": "a laptop"}}))
    with pytest.raises(ValueError, match=r"table was measured with device 'a laptop' \(here: .*Run `calibrate"):
        PolicyTrainer(resps(pair), config(max_steps=24), TRAIN, **keywords).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("objective", ["full_information", "ppo"])
def test_a_reward_of_ones_own_is_maximised(pair: tuple[Any, DraftHead], objective: str) -> None:
    seen = []

    def plain_steps(*, emitted: torch.Tensor, seconds: torch.Tensor, **rest: Any) -> torch.Tensor:
        seen.append((emitted.shape, sorted(rest)))
        return -seconds  # the cheapest step is a plain one

    args = config(objective=objective, max_steps=160, save_strategy="no", learning_rate=1e-2)
    trainer = PolicyTrainer(resps(pair), args, TRAIN, target=pair[0], head=pair[1], reward_func=plain_steps)
    trainer.train()
    first, *_, last = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    assert first < (first - 1.05) / 2 < last <= -1.05 + 1e-6, "it ends nearer to a plain step's than it began"
    assert {tuple(names) for _, names in seen} == {("mean_rates", "persistence", "rate")}
    assert len({len(shape) for shape, _ in seen}) == 2, "of the actions taken, and of every action"


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("tokens", "`reward_func` is 'tokens', but must be 'tokens_per_second' or 'mean_rate', or a function"),
        (lambda **_: 1.0, r"returned a float for outcomes of shape \["),
        (lambda emitted, **_: emitted.sum(), r"returned shape \[\] for outcomes of shape"),
        (lambda emitted, **_: emitted * math.nan, "returned infinite values or NaN for outcomes"),
    ],
)
def test_another_reward_is_refused(pair: tuple[Any, DraftHead], reward: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PolicyTrainer(resps(pair), config(), TRAIN, target=pair[0], head=pair[1], reward_func=reward).train()


def test_a_policy_learns_by_decoding(
    pair: tuple[Any, DraftHead], monkeypatch: pytest.MonkeyPatch, fake_clock: FakeClock
) -> None:
    from transformers_resps.decoding.loop import TreeDecoding

    monkeypatch.setitem(TreeDecoding.__init__.__kwdefaults__, "clock", fake_clock)
    pair[0].register_forward_pre_hook(lambda *_: fake_clock.advance(1.0))
    args = config(live_rollouts=True, objective="max_entropy_ppo", preset="paper", drop_hopeless=False)
    trainer = PolicyTrainer("resps", args, TRAIN, target=pair[0], head=pair[1], reward_func="mean_rate")
    trainer.train()
    policy = AutoPolicy.from_pretrained("run/policy")
    assert isinstance(policy, ReSpSPolicy) and policy.config.sample and not policy.config.normalize
    assert not Path("run/replay").exists() and "dropped" in trainer.state.log_history[0]
    with pytest.raises(ValueError, match="objective` is 'full_information', but it must be 'ppo' or.*live_rollouts"):
        config(live_rollouts=True)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (datasets.DatasetDict({"train": TRAIN}), r"a DatasetDict of the splits \['train'\].*`dataset\['train'\]`"),
        (TRAIN.to_iterable_dataset(), r"an `IterableDataset`.*Take the first n.*dataset.take"),
        ([{"prompt": "a"}], "is a list, but must be a `Dataset` of the package"),
        (TRAIN.select([]), "is empty"),
        (TRAIN.rename_column("prompt", "text"), r"has the columns \['text'\], but needs `prompt` or `messages`"),
        (Dataset.from_list([{"prompt": 3}]), "Row 0 of `train_dataset` has messages that are 3, but they must be"),
        (Dataset.from_list([{"messages": "a"}]), "has messages that are a, but they must be a list"),
        (Dataset.from_list([{"messages": [{"role": "system", "content": "a"}]}]), "no turn of the user"),
        (
            Dataset.from_list([{"prompt": "f" * 6000}]),
            "has 6000 tokens and its answer up to 24, but the target reads at",
        ),
    ],
)
def test_a_dataset_that_holds_no_prompts_is_refused_in_one_line(
    pair: tuple[Any, DraftHead], dataset: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        PolicyTrainer(resps(pair), config(), dataset, target=pair[0], head=pair[1])
    assert "\n" not in str(refused.value) and "`train_dataset`" in str(refused.value)


def other_tokenizer() -> Any:
    shifted = letter_tokenizer()
    model = json.loads(shifted.backend_tokenizer.to_str())
    size = len(model["model"]["vocab"])
    model["model"]["vocab"] = {token: (place + 1) % size for token, place in model["model"]["vocab"].items()}
    return type(shifted)(tokenizer_object=type(shifted.backend_tokenizer).from_str(json.dumps(model)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": "head"}, "The target is 'head', which is a draft head. Pass the model"),
        ({"head": "target"}, "`head` is 'target', which holds no draft head"),
        ({"target": 3}, "`target` is a int, but must be a `PreTrainedModel`"),
        ({"head": None}, "`head` is a NoneType, but must be a `DraftHead`"),
        ({"processing_class": other_tokenizer()}, "is another model's tokenizer: it gives other ids"),
        ({"model": FixedPolicy(TreeShape(4, 2, 2))}, "`model` is a FixedPolicy, but must be a `ReSpSPolicy`, or"),
        ({"args": object()}, "`args` is a object, but must be a `PolicyTrainingConfig`"),
        ({"model": "auto"}, "which is fitted in one go instead of trained by steps. Call `fit_policy`"),
        ({"model": BaselineGuard(ThroughputPolicy())}, "which is fitted in one go"),
    ],
)
def test_what_does_not_belong_together_is_refused(
    pair: tuple[Any, DraftHead], changes: dict[str, Any], message: str
) -> None:
    given = {"model": "resps", "args": config(), "train_dataset": TRAIN, "target": pair[0], "head": pair[1]}
    with pytest.raises(ValueError, match=message):
        PolicyTrainer(**(given | changes))


def test_nothing_to_learn_from_or_to_judge_by_is_told(pair: tuple[Any, DraftHead]) -> None:
    trainer = PolicyTrainer(resps(pair), config(), target=attach(detach(pair[0])), head=pair[1])
    with pytest.raises(ValueError, match="`train_dataset` is missing"):
        trainer.train()
    with pytest.raises(ValueError, match="`eval_dataset` is missing, but evaluation needs prompts"):
        trainer.evaluate()
    assert trainer.evaluate(HELD_OUT)["eval_held_out_texts"] == 2


def test_a_policy_that_is_judged_on_what_it_learned_is_doubted(pair: tuple[Any, DraftHead]) -> None:
    trainer = PolicyTrainer(resps(pair), config(max_steps=8), TRAIN, target=pair[0], head=pair[1])
    trainer.train()
    both = datasets.concatenate_datasets([TRAIN.select([0, 2]), TRAIN.select([0])])
    assert "2 of the held-out prompts are among those that it was trained on" in trainer.compared(both).verdict
    assert trainer.compared(HELD_OUT).learned_prompts == 0


def test_a_target_that_sees_learns_from_prompts_of_text_and_images_are_refused(
    pair: tuple[Any, DraftHead], tmp_path: Path
) -> None:
    target, processor = attach(image_target("qwen3_vl")), image_processor("qwen3_vl")
    head = DraftHead.from_target(target, 12)
    shown = Dataset.from_list([{"prompt": turns("defg"), "images": [picture()]}])
    with pytest.raises(ValueError, match="`train_dataset` has images, but policies learn from prompts of text"):
        PolicyTrainer("resps", config(), shown, processing_class=processor, target=target, head=head)
    trainer = PolicyTrainer("resps", config(), TRAIN, processing_class=processor, target=target, head=head)
    trainer.train()
    prompt = image_prompt(processor)
    plain = target.generate(**prompt, max_new_tokens=8, do_sample=False)
    drafted = target.generate(**prompt, max_new_tokens=8, do_sample=False, assistant_model=head, policy=trainer.policy)
    assert torch.equal(plain, drafted)


# What held-out texts prove about a policy, by hand.
def compared(seconds: list[float], texts: int = 12, actions: int = 3) -> PolicyComparison:
    """`texts` texts of ten tokens, over which `seconds` repeat; the best fixed tree takes one second for each."""
    own = [Timing(10, seconds[number % len(seconds)]) for number in range(texts)]
    return PolicyComparison(own, [Timing(10, 1.0)] * texts, 0.5 * texts, actions)


def test_the_numbers_are_totals_over_totals() -> None:
    metrics = compared([0.5, 1.0], texts=2).metrics()
    assert metrics["tokens_per_second"] == pytest.approx(20 / 1.5) and metrics["best_fixed_tokens_per_second"] == 10.0
    assert metrics["gain_over_best_fixed"] == pytest.approx(2 / 1.5) and metrics["held_out_texts"] == 2
    assert (metrics["gain_over_best_fixed_low"], metrics["gain_over_best_fixed_high"]) == (1.0, 2.0)
    assert metrics["oracle_regret"] == pytest.approx(0.5) and metrics["distinct_actions"] == 3


def test_a_policy_that_is_slower_is_not_to_be_used() -> None:
    slower = compared([1.25, 1.37])
    assert slower.verdict.startswith(
        "24% slower, do not use it: it is slower than the best fixed tree beyond chance (0.7"
    )
    assert not compared([0.5, 1.4]).is_slower


def test_a_policy_that_is_slower_by_a_thousandth_is_not_called_slower() -> None:
    barely = compared([1.001])
    assert barely.interval[1] < 1.0
    assert barely.verdict.startswith("Not shown to pay: it is not faster than the best fixed tree beyond chance (0.9")


@pytest.mark.parametrize(
    ("comparison", "doubts"),
    [
        (compared([0.8]), []),
        (compared([0.5, 1.4]), ["not faster than the best fixed tree beyond chance (1.053 times"]),
        (compared([0.8], actions=1), ["chose one tree everywhere"]),
        (compared([0.8], texts=2), ["judged on 2 held-out texts, which prove little"]),
        (compared([1.0], texts=1, actions=1), ["beyond chance", "one tree everywhere", "1 held-out text, which"]),
    ],
)
def test_a_policy_that_is_not_shown_to_pay_is_doubted(comparison: PolicyComparison, doubts: list[str]) -> None:
    assert len(comparison.doubts) == len(doubts)
    assert all(doubt in found for doubt, found in zip(doubts, comparison.doubts, strict=True))
    assert comparison.verdict.startswith("Not shown to pay: " if doubts else "Faster than the best fixed tree: 1.250")
