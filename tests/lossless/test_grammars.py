"""Logits processors of grammar libraries: trees change neither what they are shown nor what they force."""

import json
import re
import string
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerFast, set_seed

from tests.decoding.rows import Noted, uneven_steps
from tests.targets import Architecture
from transformers_resps import DraftHead, FixedPolicy, StepRecord, TreeShape, attach


# outlines shows llguidance the padding of rows that have ended, in plain `generate` too.
pytestmark = pytest.mark.filterwarnings("ignore:Error in LLMatcher")

COLORS = ["red", "green", "blue"]
BITS = {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4}
SCHEMA = {
    "type": "object",
    "properties": {"color": {"enum": COLORS}, "bits": BITS},
    "required": ["color", "bits"],
    "additionalProperties": False,
}
PROMPTS = [
    '{"color":"green","bits":[true,false,true]}',
    '{"color":"blue","bits":[false,true]}{"color":"red","bits":[true,true]}',
    'red{"color":"red","bits":[false,false,false,true]}',
]
VOCABULARY = ["<pad>", "</s>", *string.ascii_lowercase, *'{}[]":,']
ROOM = 60  # tokens; the longest JSON has 50
BACKENDS = ("outlines_core", "xgrammar", "llguidance")  # of outlines
WIDE = TreeShape(40, 3, len(VOCABULARY))  # so wide that most picks are drafted
DRAFTERS = {"lookup": TreeShape(1, 0, 1, lookup=6), "head": TreeShape(8, 3, 3), "head, wide": WIDE}
SAMPLING = {"do_sample": True, "temperature": 8.0}


@pytest.fixture(autouse=True)
def eager_masks() -> Iterator[None]:
    """outlines compiles its masks, which takes long, and hides the compiler's errors for the rest of the process."""
    with torch._dynamo.config.patch(suppress_errors=False), torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each character of compact JSON; without a blank, so that white space is never legal."""
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(VOCABULARY)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "padding_side": "left"}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, model_input_names=["input_ids", "attention_mask"], **special
    )


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return attach(Architecture("llama", {"vocab_size": len(VOCABULARY), "eos_token_id": 1}).build("sdpa"))


def compiler(tokenizer: PreTrainedTokenizerFast) -> Any:
    xgrammar = pytest.importorskip("xgrammar")
    return xgrammar.GrammarCompiler(xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=len(VOCABULARY)))


def xgrammar_processor(tokenizer: PreTrainedTokenizerFast, target: PreTrainedModel) -> Any:
    contrib = pytest.importorskip("xgrammar.contrib.hf")
    return contrib.LogitsProcessor(compiler(tokenizer).compile_json_schema(json.dumps(SCHEMA)))


def outlines_processor(backend: str) -> Callable[[PreTrainedTokenizerFast, PreTrainedModel], Any]:
    def make(tokenizer: PreTrainedTokenizerFast, target: PreTrainedModel) -> Any:
        outlines = pytest.importorskip("outlines")
        pytest.importorskip(backend)
        model = outlines.from_transformers(target, tokenizer)
        return outlines.backends.get_json_schema_logits_processor(backend, model, json.dumps(SCHEMA))

    return make


class LLGuidanceProcessor(LogitsProcessor):
    """As a user writes it: llguidance has none of its own."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, target: PreTrainedModel) -> None:
        self.library = pytest.importorskip("llguidance")
        self.tokenizer = pytest.importorskip("llguidance.hf").from_tokenizer(tokenizer)
        self.matchers: list[Any] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if self.matchers:
            for matcher, token in zip(self.matchers, input_ids[:, -1].tolist(), strict=True):
                assert matcher.is_stopped() or matcher.consume_token(token), matcher.get_error()
        else:
            grammar = self.library.LLMatcher.grammar_from_json_schema(SCHEMA)
            self.matchers = [self.library.LLMatcher(self.tokenizer, grammar) for _ in input_ids]
        allowed = torch.tensor([list(matcher.compute_logit_bias()) for matcher in self.matchers])
        return scores.masked_fill(allowed == 0, -torch.inf)


PROCESSORS: dict[str, Callable[[PreTrainedTokenizerFast, PreTrainedModel], Any]] = {
    "xgrammar": xgrammar_processor,
    **{f"outlines with {backend}": outlines_processor(backend) for backend in BACKENDS},
    "llguidance": LLGuidanceProcessor,
}


class Counted(LogitsProcessor):
    """Hands on to a library's processor, and notes how long the text was at each call."""

    def __init__(self, processor: Any) -> None:
        self.processor, self.lengths = processor, list[int]()

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.lengths.append(input_ids.shape[1])
        return self.processor(input_ids, scores)


def answer(target: Any, inputs: Any, processor: Any, **options: Any) -> Any:
    """What `generate` returns, and the length of the text at each call of the processor."""
    counted = Counted(processor)
    set_seed(2)
    call = {"max_new_tokens": ROOM, "return_dict_in_generate": True, "logits_processor": [counted]}
    return target.generate(**inputs, **call, **options), counted.lengths


def fits(text: str) -> bool:
    found = json.loads(text)
    return (
        found.keys() == {"color", "bits"}
        and found["color"] in COLORS
        and 2 <= len(found["bits"]) <= 4
        and all(isinstance(bit, bool) for bit in found["bits"])
    )


def rejects(step: StepRecord) -> bool:
    """Whether a step verified nodes that no row kept."""
    return step.verified > max(step.emitted)


def finished_parts(output: Any, inputs: Any, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    answers = output.sequences[:, inputs["input_ids"].shape[1] :]
    assert (answers == tokenizer.eos_token_id).any(-1).all(), "a row has not finished: give it more room"
    return tokenizer.batch_decode(answers, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("rows", "options"), [(1, {}), (1, SAMPLING), (3, SAMPLING)], ids=["greedy", "sampled", "batch"]
)
@pytest.mark.parametrize("kind", PROCESSORS)
def test_a_grammar_forces_the_same_text_by_the_same_calls_as_in_plain_generate(
    kind: str,
    rows: int,
    options: dict[str, Any],
    target: PreTrainedModel,
    head: DraftHead,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    inputs = tokenizer(PROMPTS[:rows], padding=True, return_tensors="pt")
    plain, expected = answer(target, inputs, PROCESSORS[kind](tokenizer, target), **options)
    assert all(fits(text) for text in finished_parts(plain, inputs, tokenizer))
    for drafter, shape in DRAFTERS.items():
        drafting = {"policy": FixedPolicy(shape)} | ({} if drafter == "lookup" else {"assistant_model": head})
        tree, lengths = answer(target, inputs, PROCESSORS[kind](tokenizer, target), **options, **drafting)
        assert tree.sequences.tolist() == plain.sequences.tolist(), drafter
        assert lengths == expected, drafter
        assert any(map(rejects, tree.speculation.steps)), drafter
        assert tree.speculation.tau > 1 or drafter == "head"


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_outlines_generator_hands_head_and_policy_to_generate(
    backend: str, target: PreTrainedModel, head: DraftHead, tokenizer: PreTrainedTokenizerFast
) -> None:
    outlines = pytest.importorskip("outlines")
    pytest.importorskip(backend)
    model = outlines.from_transformers(target, tokenizer)
    generator = outlines.Generator(model, outlines.json_schema(SCHEMA), backend=backend)
    for ask, prompt in ((generator, PROMPTS[0]), (generator.batch, PROMPTS)):
        policy = Noted(WIDE)
        plain = ask(prompt, max_new_tokens=ROOM)
        assert ask(prompt, max_new_tokens=ROOM, assistant_model=head, policy=policy) == plain
        assert any(step.emitted_total > step.decoded_rows for step in policy.steps)
        assert all(fits(text) for text in ([plain] if isinstance(plain, str) else plain))


def test_each_row_may_have_a_grammar_of_its_own_and_rows_stay_together(
    target: PreTrainedModel, head: DraftHead, tokenizer: PreTrainedTokenizerFast
) -> None:
    contrib = pytest.importorskip("xgrammar.contrib.hf")
    regexes = ["(ab|cd){4,9}", "[x-z]{5,12}", "(true,|false,){3,6}"]
    grammars = [compiler(tokenizer).compile_regex(regex) for regex in regexes]
    inputs = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    drafting: dict[str, Any] = {"assistant_model": head, "policy": FixedPolicy(TreeShape(8, 3, 3, lookup=6))}
    plain, _ = answer(target, inputs, contrib.LogitsProcessor(grammars))
    tree, _ = answer(target, inputs, contrib.LogitsProcessor(grammars), **drafting)
    assert tree.sequences.tolist() == plain.sequences.tolist()
    texts = finished_parts(tree, inputs, tokenizer)
    assert all(re.fullmatch(regex, text) for regex, text in zip(regexes, texts, strict=True)), texts
    assert tree.speculation.tau > 1 and uneven_steps(tree.speculation) == 0
    with pytest.raises(ValueError, match="lockstep=False` does not work with the logits processor LogitsProcessor"):
        processors = LogitsProcessorList([contrib.LogitsProcessor(grammars)])
        target.generate(**inputs, max_new_tokens=ROOM, logits_processor=processors, lockstep=False, **drafting)


@pytest.mark.parametrize("kind", PROCESSORS)
def test_stock_prompt_lookup_breaks_a_grammar(
    kind: str, target: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    """To such a processor every call is one more token of the text: the page says why, and what trees do instead."""
    inputs = tokenizer(PROMPTS[:1], return_tensors="pt")
    plain, _ = answer(target, inputs, PROCESSORS[kind](tokenizer, target))
    try:
        stock, _ = answer(target, inputs, PROCESSORS[kind](tokenizer, target), prompt_lookup_num_tokens=6)
    except (AssertionError, RuntimeError, ValueError):  # of the library, by name
        return
    assert stock.sequences.tolist() != plain.sequences.tolist()  # outlines with llguidance warns, and goes on
