"""The contract on every option of `generate`: the same call without a head is the oracle."""

import copy
import pickle
import threading
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
    SynthIDTextWatermarkingConfig,
    TextIteratorStreamer,
    WatermarkingConfig,
    set_seed,
)
from transformers.generation.streamers import BaseStreamer

from tests.conftest import FakeClock
from tests.targets import VOCABULARY, Architecture
from tests.tokenizers import letter_tokenizer
from transformers_resps import DraftHead, FixedPolicy, Observation, Policy, TreeShape, attach, decoding, detach
from transformers_resps.candidate_generator import TreeCandidateGenerator
from transformers_resps.decoding import TreeDecoding
from transformers_resps.generation import ReSpSGenerationMixin
from transformers_resps.lookup import SuffixIndex


WIDE = TreeShape(40, 3, VOCABULARY)  # so wide that most picks are drafted
SAMPLING = {"do_sample": True, "temperature": 1.3}


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return attach(Architecture("llama", {"eos_token_id": 2, "max_position_embeddings": 64}).build("sdpa"))


@pytest.fixture(scope="module")
def head(target: PreTrainedModel) -> DraftHead:
    torch.manual_seed(1)
    return DraftHead.from_target(target)


@pytest.fixture
def prompt() -> torch.Tensor:
    return torch.tensor([[5, 7, 11, 3, 9, 7, 11]])


def both(target: Any, head: DraftHead, inputs: Any, shape: TreeShape = WIDE, seed: int = 0, **options: Any) -> Any:
    """The output of the same call, plain and with the head."""
    inputs = inputs if isinstance(inputs, dict) else {"input_ids": inputs}
    outputs = []
    for extra in ({}, {"assistant_model": head, "policy": FixedPolicy(shape)}):
        set_seed(seed)
        call = {"max_new_tokens": 24, "return_dict_in_generate": True, **options}
        made = {name: value() if isinstance(value, type) else value for name, value in call.items()}
        outputs.append(target.generate(**inputs, **made, **extra))
    return outputs


OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": SAMPLING,
    "top-k": SAMPLING | {"top_k": 5},
    "top-p": SAMPLING | {"top_p": 0.8},
    "min-p": SAMPLING | {"min_p": 0.1},
    "typical": SAMPLING | {"typical_p": 0.8},
    "epsilon": SAMPLING | {"epsilon_cutoff": 0.02},
    "repetition penalty": {"repetition_penalty": 1.7},
    "repetition penalty, sampled": SAMPLING | {"repetition_penalty": 1.7},
    "no repeated n-gram": {"no_repeat_ngram_size": 2},
    "bad words": {"bad_words_ids": [[4], [7, 11]]},
    "suppressed tokens": {"suppress_tokens": [3, 8]},
    "sequence bias": {"sequence_bias": {(9,): 2.0}},
    "min new tokens": SAMPLING | {"min_new_tokens": 12},
    "forced end token": {"forced_eos_token_id": 2},
    "exponential decay": SAMPLING | {"exponential_decay_length_penalty": (4, 1.2)},
    "prefix constraint": SAMPLING
    | {"prefix_allowed_tokens_fn": lambda row, ids: [(int(ids[-1]) + i) % 19 for i in (1, 3)]},
    "watermark": SAMPLING | {"watermarking_config": WatermarkingConfig()},
    "synthid": SAMPLING
    | {"watermarking_config": SynthIDTextWatermarkingConfig(ngram_len=3, keys=[5, 7, 11], context_history_size=8)},
    "guidance scale": {"guidance_scale": 1.5},
    "guidance scale, sampled": SAMPLING | {"guidance_scale": 1.5},
    "several end tokens": SAMPLING | {"eos_token_id": [2, 6, 12]},
    "one new token": {"max_new_tokens": 1},
    "two new tokens": {"max_new_tokens": 2},
    "max_length in the middle of a tree": {"max_new_tokens": None, "max_length": 15},
    "prefill in chunks": {"prefill_chunk_size": 3},
    "dynamic cache by name": {"cache_implementation": "dynamic"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_changes_nothing_about_losslessness(
    name: str, target: PreTrainedModel, head: DraftHead, prompt: torch.Tensor
) -> None:
    for seed in range(3):
        plain, tree = both(target, head, prompt, seed=seed, **OPTIONS[name])
        assert tree.sequences.tolist() == plain.sequences.tolist()


def test_scores_and_logits_are_those_of_plain_generate(
    target: PreTrainedModel, head: DraftHead, prompt: torch.Tensor
) -> None:
    wanted = {"output_scores": True, "output_logits": True, "repetition_penalty": 1.3}
    plain, tree = both(target, head, prompt, **SAMPLING, **wanted)
    for name in ("scores", "logits"):
        ours, theirs = getattr(tree, name), getattr(plain, name)
        assert len(ours) == len(theirs)
        torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_prompt_may_be_a_single_token(target: PreTrainedModel, head: DraftHead, length: int) -> None:
    plain, tree = both(target, head, torch.arange(5, 5 + length)[None], **SAMPLING)
    assert tree.sequences.tolist() == plain.sequences.tolist()


@pytest.mark.parametrize("do_sample", [False, True])
def test_rows_of_a_padded_batch_finish_on_their_own(target: PreTrainedModel, head: DraftHead, do_sample: bool) -> None:
    ids = torch.randint(3, VOCABULARY, (4, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    for row, pads in enumerate((0, 3, 8, 5)):
        mask[row, :pads] = 0
    inputs = {"input_ids": ids * mask, "attention_mask": mask}
    lengths = set()
    for seed in range(6):
        plain, tree = both(target, head, inputs, seed=seed, do_sample=do_sample, eos_token_id=[2, 6])
        assert tree.sequences.tolist() == plain.sequences.tolist()
        lengths |= {int((row != 0).sum()) for row in tree.sequences[:, 9:]}
        assert tree.speculation.emitted == sum(sum(step.emitted) for step in tree.speculation.steps)
    assert len(lengths) > 1 or not do_sample


class StopAfter(StoppingCriteria):
    """Stops each row at its own length, wherever in an accepted run that is."""

    def __init__(self, lengths: tuple[int, ...]) -> None:
        self.lengths = torch.tensor(lengths)

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        return input_ids.shape[1] >= self.lengths[: len(input_ids)]


@pytest.mark.parametrize("length", range(8, 16))
def test_a_custom_criterion_stops_in_the_middle_of_an_accepted_run(
    target: PreTrainedModel, head: DraftHead, prompt: torch.Tensor, length: int
) -> None:
    criteria = StoppingCriteriaList([StopAfter((length,))])
    plain, tree = both(target, head, prompt, stopping_criteria=criteria)
    assert tree.sequences.tolist() == plain.sequences.tolist()
    assert tree.sequences.shape[1] == length


def test_without_an_end_token_finished_rows_go_on_as_in_plain_generate(
    head: DraftHead, target: PreTrainedModel
) -> None:
    ids = torch.randint(3, VOCABULARY, (3, 6), generator=torch.Generator().manual_seed(0))
    criteria = StoppingCriteriaList([StopAfter((9, 14, 20))])
    plain, tree = both(target, head, ids, stopping_criteria=criteria, eos_token_id=-1, **SAMPLING)
    assert tree.sequences.tolist() == plain.sequences.tolist()


class CountingProcessor(LogitsProcessor):
    """Stateful: forbids the token it would have picked, every third call."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.calls += 1
        if self.calls % 3 == 0:
            scores = scores.scatter(1, scores.argmax(-1, keepdim=True), -torch.inf)
        return scores


def test_a_stateful_processor_is_called_once_per_committed_token(
    target: PreTrainedModel, head: DraftHead, prompt: torch.Tensor
) -> None:
    outputs, calls = [], []
    for extra in ({}, {"assistant_model": head, "policy": FixedPolicy(WIDE)}):
        processor = CountingProcessor()
        outputs.append(
            target.generate(prompt, logits_processor=LogitsProcessorList([processor]), max_new_tokens=20, **extra)
        )
        calls.append(processor.calls)
    assert outputs[0].tolist() == outputs[1].tolist()
    assert calls[0] == calls[1] == outputs[0].shape[1] - prompt.shape[1]


@pytest.mark.parametrize("stop", ["d", "fg", "kk"])
def test_stop_strings_stop_at_the_same_token(
    target: PreTrainedModel, head: DraftHead, prompt: torch.Tensor, stop: str
) -> None:
    for seed in range(4):
        plain, tree = both(
            target, head, prompt, seed=seed, stop_strings=[stop], tokenizer=letter_tokenizer(), **SAMPLING
        )
        assert tree.sequences.tolist() == plain.sequences.tolist()


class Recorder(BaseStreamer):
    def __init__(self, fails_at: int | None = None) -> None:
        self.values: list[Any] = []
        self.ended = 0
        self.fails_at = fails_at

    def put(self, value: torch.Tensor) -> None:
        if len(self.values) == self.fails_at:
            raise RuntimeError("the reader went away")
        self.values.append(value.tolist())

    def end(self) -> None:
        self.ended += 1


def test_the_streamer_gets_what_plain_generate_streams(
    target: PreTrainedModel, head: DraftHead, prompt: torch.Tensor
) -> None:
    plain, tree = Recorder(), Recorder()
    target.generate(prompt, streamer=plain, max_new_tokens=20)
    target.generate(prompt, streamer=tree, max_new_tokens=20, assistant_model=head, policy=FixedPolicy(WIDE))
    assert tree.values == plain.values
    assert tree.ended == plain.ended == 1


def test_a_text_iterator_streamer_in_a_thread_gets_the_whole_text(
    target: PreTrainedModel, head: DraftHead, prompt: torch.Tensor
) -> None:
    tokenizer = letter_tokenizer()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=20)
    options = {"max_new_tokens": 20, "assistant_model": head, "policy": FixedPolicy(WIDE), "streamer": streamer}
    thread = threading.Thread(target=target.generate, args=(prompt,), kwargs=options)
    thread.start()
    text = "".join(streamer)
    thread.join()
    expected = target.generate(prompt, max_new_tokens=20)[0, prompt.shape[1] :]
    assert text == tokenizer.decode(expected)


def test_a_streamer_ends_also_when_the_call_is_refused(
    target: PreTrainedModel, head: DraftHead, prompt: torch.Tensor
) -> None:
    streamer = Recorder()
    with pytest.raises(ValueError, match="labels"):
        target.generate(prompt, streamer=streamer, assistant_model=head, max_new_tokens=5, labels=prompt)
    assert streamer.ended == 1, "a reader in another thread would wait for ever"


@pytest.mark.parametrize("duplicate", [copy.deepcopy, detach])
def test_a_subclass_of_somebodys_own_stays_what_it_is(duplicate: Any) -> None:
    model: Any = Architecture("llama").build("sdpa")

    class Own(ReSpSGenerationMixin, type(model)):  # type: ignore[misc]  # of whichever class that is
        pass

    model.__class__ = Own
    assert type(duplicate(attach(model))) is Own


@pytest.mark.parametrize("fails_at", [1, 4])
def test_a_streamer_that_raises_leaves_the_model_usable(
    target: PreTrainedModel, head: DraftHead, prompt: torch.Tensor, fails_at: int
) -> None:
    streamer = Recorder(fails_at)
    with pytest.raises(RuntimeError, match="the reader went away"):
        target.generate(prompt, streamer=streamer, assistant_model=head, policy=FixedPolicy(WIDE), max_new_tokens=20)
    assert streamer.ended == 1, "a reader in another thread would wait for ever"
    plain, tree = both(target, head, prompt)
    assert tree.sequences.tolist() == plain.sequences.tolist()


def test_drafting_leaves_the_global_generator_where_plain_generate_leaves_it(
    target: PreTrainedModel, head: DraftHead, prompt: torch.Tensor
) -> None:
    states = []
    for extra in ({}, {"assistant_model": head}):
        set_seed(4)
        target.generate(prompt, max_new_tokens=20, **SAMPLING, **extra)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_two_threads_share_a_model(target: PreTrainedModel, head: DraftHead, prompt: torch.Tensor) -> None:
    expected = target.generate(prompt, max_new_tokens=24).tolist()
    found: dict[int, Any] = {}

    def run(index: int) -> None:
        extra = {"assistant_model": head, "policy": FixedPolicy(WIDE)} if index % 2 else {}
        found[index] = target.generate(prompt, max_new_tokens=24, **extra).tolist()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(found[index] == expected for index in range(4))


def test_learned_positions_may_run_out_in_the_middle_of_a_tree() -> None:
    architecture = Architecture("gpt2", {"n_embd": 32, "n_head": 4, "n_layer": 4, "n_positions": 20})
    target = attach(architecture.build("sdpa"))
    plain, tree = both(target, DraftHead.from_target(target), torch.arange(3, 10)[None], max_new_tokens=13)
    assert tree.sequences.tolist() == plain.sequences.tolist()


def test_longrope_is_exact_up_to_its_boundary_and_behind_it_and_refused_across() -> None:
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "rope_theta": 1e4}
    sizes = {"max_position_embeddings": 64, "original_max_position_embeddings": 16}
    target = attach(Architecture("phi3", {"rope_parameters": rope, **sizes}).build("sdpa"))
    head = DraftHead.from_target(target)
    for prompt_length, room in ((7, 10), (20, 12)):
        plain, tree = both(target, head, torch.arange(prompt_length)[None] % 16 + 1, max_new_tokens=room)
        assert tree.sequences.tolist() == plain.sequences.tolist()
        assert tree.speculation.tau > 1
    with pytest.raises(ValueError, match="past 16.*max_length"):
        target.generate(torch.arange(3, 10)[None], assistant_model=head, max_new_tokens=11)


# --- attach ---------------------------------------------------------------------------------------------------------


def test_attach_returns_the_same_object_and_detach_restores_it() -> None:
    model = Architecture("llama").build("sdpa")
    cls, weights = type(model), {name: value.clone() for name, value in model.state_dict().items()}
    assert attach(model) is model and attach(model) is model
    assert isinstance(model, cls)
    assert detach(model) is model and type(model) is cls
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_stock_assistants_work_on_an_attached_model(target: PreTrainedModel, prompt: torch.Tensor) -> None:
    stock = detach(copy.deepcopy(target))
    for options in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": copy.deepcopy(stock)}):
        expected = stock.generate(prompt, max_new_tokens=16, **options)
        assert target.generate(prompt, max_new_tokens=16, **options).tolist() == expected.tolist()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_an_attached_model_speculates_too(
    duplicate: Any, target: PreTrainedModel, head: DraftHead, prompt: torch.Tensor
) -> None:
    plain, tree = both(duplicate(target), head, prompt)
    assert tree.sequences.tolist() == plain.sequences.tolist()


def test_saving_an_attached_model_names_its_own_architecture(target: PreTrainedModel, tmp_path: Any) -> None:
    target.save_pretrained(tmp_path)
    assert type(target).from_pretrained(tmp_path).config.architectures == ["LlamaForCausalLM"]


@pytest.mark.parametrize("attach_first", [False, True])
def test_a_target_with_a_lora_adapter_speculates(prompt: torch.Tensor, attach_first: bool) -> None:
    model = Architecture("llama").build("sdpa")
    head = DraftHead.from_target(model)
    lora = LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    wrapped = get_peft_model(attach(model), lora) if attach_first else attach(get_peft_model(model, lora))
    plain, tree = both(wrapped.eval(), head, prompt)
    assert tree.sequences.tolist() == plain.sequences.tolist()
    assert tree.speculation.tau > 1


def test_a_head_with_an_adapter_drafts(target: PreTrainedModel, head: DraftHead, prompt: torch.Tensor) -> None:
    wrapped = get_peft_model(copy.deepcopy(head), LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
    plain, tree = both(target, wrapped, prompt)
    assert tree.sequences.tolist() == plain.sequences.tolist()


def test_the_pipeline_takes_a_head(target: PreTrainedModel, head: DraftHead) -> None:
    from transformers import pipeline

    tokenizer = letter_tokenizer()
    options = {"max_new_tokens": 16, "do_sample": False}
    plain = pipeline("text-generation", model=target, tokenizer=tokenizer)("bdfh", **options)
    tree = pipeline("text-generation", model=target, tokenizer=tokenizer, assistant_model=head)("bdfh", **options)
    assert tree == plain


# --- what the report says -------------------------------------------------------------------------------------------


def test_the_report_adds_up(target: PreTrainedModel, head: DraftHead, prompt: torch.Tensor) -> None:
    _, tree = both(target, head, prompt, eos_token_id=-1)
    report = tree.speculation
    assert report.emitted == tree.sequences.shape[1] - prompt.shape[1] == 24
    assert report.target_forwards == len(report.steps)
    assert report.tau == report.emitted / report.target_forwards > 1
    for step in report.steps:
        assert step.emitted == step.accepted + 1
        assert step.verified <= step.shape.total_tokens
        assert step.accepted <= step.shape.depth
        assert step.draft_seconds + step.verify_seconds <= step.step_seconds


def test_the_head_reads_the_prompt_only_when_a_step_follows_and_the_policy_is_told_its_seconds(
    target: PreTrainedModel, head: DraftHead, prompt: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, told = FakeClock(), []
    read = TreeCandidateGenerator.read

    def slow_read(self: TreeCandidateGenerator, at_least: int = 1) -> None:
        clock.advance(3.0)
        read(self, at_least)

    class Told(FixedPolicy):
        def choose(self, observation: Observation) -> TreeShape:
            told.append(observation.prompt_seconds)
            return super().choose(observation)

    monkeypatch.setattr(TreeCandidateGenerator, "read", slow_read)
    monkeypatch.setitem(TreeDecoding.__init__.__kwdefaults__, "clock", clock)
    options = {"assistant_model": head, "policy": Told(TreeShape.plain()), "return_dict_in_generate": True}
    target.generate(prompt, max_new_tokens=1, **options)
    assert clock.now == 0.0 and not told, "nothing will be drafted"
    prefill = target.generate(prompt, max_new_tokens=3, **options).speculation.steps[0]
    assert told == [3.0] * 2
    assert (prefill.draft_seconds, prefill.verify_seconds, prefill.step_seconds) == (3.0, 0.0, 3.0)


@pytest.mark.parametrize(("lookup", "indexed"), [(4, 8.0), (0, 0.0)])
def test_the_prompt_is_indexed_before_the_first_step_where_a_policy_looks_up(
    lookup: int, indexed: float, target: PreTrainedModel, prompt: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, extend = FakeClock(), SuffixIndex.extend

    def slow_extend(self: SuffixIndex, tokens: list[int]) -> None:
        clock.advance(float(len(tokens)))
        extend(self, tokens)

    monkeypatch.setattr(SuffixIndex, "extend", slow_extend)
    monkeypatch.setitem(TreeDecoding.__init__.__kwdefaults__, "clock", clock)
    options = {"policy": FixedPolicy(TreeShape(1, 0, 1, lookup)), "return_dict_in_generate": True}
    if not lookup:
        options["assistant_model"] = DraftHead.from_target(target)
    prefill, *steps = target.generate(prompt, max_new_tokens=4, **options).speculation.steps
    assert prefill.draft_seconds == indexed
    assert steps[0].draft_seconds == 0.0


def test_the_clock_is_read_after_the_device_has_finished(
    target: PreTrainedModel, head: DraftHead, prompt: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device that has launched a forward at once, and takes a second to finish it."""
    clock = FakeClock()
    monkeypatch.setattr(decoding, "_wait_for", lambda states: clock.advance(1.0))
    monkeypatch.setitem(TreeDecoding.__init__.__kwdefaults__, "clock", clock)
    for step in both(target, head, prompt)[1].speculation.steps[1:]:
        assert (step.draft_seconds, step.verify_seconds, step.rest_seconds) == (0.0, 1.0, 0.0)


@pytest.mark.parametrize(("device", "waits"), [("cpu", 0), ("cuda", 1), ("mps", 1)])
def test_only_an_accelerator_is_waited_for(device: str, waits: int) -> None:
    states = MagicMock()
    states.device.type = device
    decoding._wait_for(states)
    assert states.__getitem__.return_value.item.call_count == waits


def test_the_default_tree_of_the_head_is_used_without_a_policy(target: PreTrainedModel, prompt: torch.Tensor) -> None:
    head = DraftHead.from_target(target, default_tree=[4, 3, 1])
    out = target.generate(prompt, assistant_model=head, max_new_tokens=10, return_dict_in_generate=True)
    assert out.speculation.steps[1].shape == TreeShape(4, 3, 1)
    assert out.speculation.steps[1].verified == 4


@pytest.mark.parametrize("answer", [None, (8, 3, 2), "auto"])
def test_a_policy_that_chooses_no_shape_is_told_so(
    target: PreTrainedModel, head: DraftHead, prompt: torch.Tensor, answer: Any
) -> None:
    class Odd(Policy):
        def choose(self, observation: Any) -> Any:
            return answer

    with pytest.raises(ValueError, match="a step needs a TreeShape"):
        target.generate(prompt, assistant_model=head, policy=Odd(), max_new_tokens=8)
    plain, tree = both(target, head, prompt)
    assert tree.sequences.tolist() == plain.sequences.tolist()


@pytest.mark.parametrize("size", [-3, 0, 1, 10**9, 4.7])
def test_any_number_of_nodes_a_policy_asks_for_is_survived(
    target: PreTrainedModel, head: DraftHead, prompt: torch.Tensor, size: float
) -> None:
    class Greedy(FixedPolicy):
        def size(self, scores: torch.Tensor) -> Any:
            return size

    plain = target.generate(prompt, max_new_tokens=16)
    policy = Greedy(TreeShape(10**6, 3, 10**6))
    assert target.generate(prompt, assistant_model=head, policy=policy, max_new_tokens=16).tolist() == plain.tolist()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("do_sample", [False, True])
def test_the_contract_holds_on_a_gpu(do_sample: bool) -> None:
    model = attach(Architecture("llama").build("sdpa").cuda())
    drafter = DraftHead.from_target(model)
    plain, tree = both(model, drafter, torch.tensor([[5, 7, 11, 3, 9, 7, 11]]).cuda(), do_sample=do_sample)
    assert tree.sequences.tolist() == plain.sequences.tolist()
    assert tree.speculation.tau > 1


def test_a_policy_may_stop_growing_and_choose_the_number_of_nodes(
    target: PreTrainedModel, head: DraftHead, prompt: torch.Tensor
) -> None:
    class Careful(FixedPolicy):
        told: list[Any] = []

        def grow(self, level: Any) -> bool:
            assert level.scores.shape == (1, 4)
            return level.depth < 2

        def size(self, scores: torch.Tensor) -> int:
            assert scores.shape in ((1, 4), (1, 4 + 16))  # one level only where the text may grow by one token
            return 5

        def observe(self, record: Any) -> None:
            self.told.append(record)

    policy: Policy = Careful(TreeShape(30, 6, 4))
    options = {"max_new_tokens": 20, "eos_token_id": -1}
    out = target.generate(prompt, assistant_model=head, policy=policy, return_dict_in_generate=True, **options)
    assert out.sequences.tolist() == target.generate(prompt, **options).tolist()
    assert [step.verified for step in out.speculation.steps[1:-3]] == [5] * (len(out.speculation.steps) - 4)
    assert policy.told == out.speculation.steps[1:]  # type: ignore[attr-defined]
