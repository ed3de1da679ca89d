import json
import sys

import generate_dataset
import pytest
import torch
from generate_dataset import PromptProgress, answer, batches

from tests.conftest import build_target
from tests.targets import VOCABULARY
from tests.tokenizers import letter_tokenizer, templated
from transformers_resps import DraftHead, attach


def test_a_line_cut_off_by_a_kill_is_written_anew(tmp_path):
    output = tmp_path / "answers.jsonl"
    text = "a\u2028b\x85c"  # ends a line for `splitlines`, but none of a JSONL file
    whole = json.dumps({"prompt_id": "a", "text": text}, ensure_ascii=False) + "\n"
    output.write_text(whole + '{"prompt_id": "b", "mess', encoding="utf-8")
    assert generate_dataset.finished_ids(output) == {"a"}
    assert output.read_text(encoding="utf-8") == whole


@pytest.mark.parametrize(
    ("answer", "repeats"),
    [
        ([5] * 24, True),
        ([5] * 23, False),
        ([9] * 9 + [1, 2, 3, 4, 5, 6, 7] * 4, True),
        ([1, 2, 3, 4, 5, 6, 7] * 3 + [1, 2, 3, 4, 5, 6], False),
        ([1, 2, 3] * 8 + [4], False),  # it went on
        (list(range(33)) * 5, False),
        ([], False),
    ],
)
def test_an_answer_that_ends_with_a_piece_four_times_repeats_itself(answer: list[int], repeats: bool) -> None:
    assert generate_dataset.repeats_itself(answer) is repeats


def test_answers_made_otherwise_are_not_added_to_a_file(tmp_path):
    output = tmp_path / "answers.jsonl"

    def asked(*options):
        given = ["--target", "t", "--prompts", "p.jsonl", "--output", str(output), *options]
        return generate_dataset.make_parser().parse_args(given)

    generate_dataset.write_provenance(asked("--seed", "1"), [])
    generate_dataset.check_provenance(asked())  # no answer was written
    output.touch()
    generate_dataset.check_provenance(asked("--seed", "1", "--limit", "9"))
    message = r"made with dtype auto, seed 1, but this command has dtype float32, seed 0.*another `--output`"
    with pytest.raises(ValueError, match=message):
        generate_dataset.check_provenance(asked("--dtype", "float32"))


def test_texts_beyond_the_context_and_files_without_questions_are_refused(tmp_path, monkeypatch):
    build_target().save_pretrained(tmp_path / "target")
    letter_tokenizer().save_pretrained(tmp_path / "target")
    (tmp_path / "rows.jsonl").write_text('{"messages": []}\n{"messages": [{"role": "assistant", "content": "d"}]}\n')
    given = ["--target", tmp_path / "target", "--prompts", tmp_path / "rows.jsonl", "--output", tmp_path / "out.jsonl"]
    for new_tokens, message in ((200, "allow 264 tokens"), (192, "begins with a user turn")):
        options = ["--max-prompt-tokens", 64, "--max-new-tokens", new_tokens]
        monkeypatch.setattr(sys, "argv", ["generate_dataset.py", *map(str, given + options)])
        with pytest.raises(ValueError, match=message):
            generate_dataset.main()
    assert not (tmp_path / "out.jsonl").exists()


def test_only_prompts_in_which_the_pattern_is_found_are_answered(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "d ef"}\n{"prompt": "def"}\n{"prompt": "EF"}\n')
    tokenizer = templated("{{ messages[0].content }}")

    def chosen(pattern):
        prompts = generate_dataset.read_prompts([tmp_path / "rows.jsonl"], tokenizer, 9, 9, 0, pattern)
        return {prompt.messages[-1]["content"] for prompt in prompts}

    assert chosen(r"\bef\b") == {"d ef", "EF"}
    assert chosen("") == {"d ef", "def", "EF"}


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """`asked(*options)` runs the command in a folder with twelve prompts, and returns the rows it wrote."""
    build_target(vocab_size=VOCABULARY, initializer_range=0.6).save_pretrained(tmp_path / "target")
    templated("{{ messages[0].content }}").save_pretrained(tmp_path / "target")
    rows = [
        {"prompt": "defghijklmnop"[number % 7 :][: 3 + number % 5] + "qrstuvwxyzab"[number]} for number in range(12)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def run(*options, output="out.jsonl"):
        given = ["--target", tmp_path / "target", "--prompts", tmp_path / "rows.jsonl", "--output", tmp_path / output]
        given += ["--max-new-tokens", 8, "--max-prompt-tokens", 20, "--device", "cpu", "--dtype", "float32"]
        given += ["--compile", "never", *options]
        monkeypatch.setattr(sys, "argv", ["generate_dataset.py", *map(str, given)])
        generate_dataset.main()
        return [json.loads(line) for line in (tmp_path / output).read_text().splitlines()]

    return run


def test_the_temperatures_are_shared_out_over_the_prompts_and_not_over_the_batches(asked):
    rows = asked("--temperatures", "0", "0", "0.8", "--batch-size", "64")
    assert sorted(row["temperature"] for row in rows) == [0.0] * 8 + [0.8] * 4


def test_a_stopped_run_goes_on_with_the_answers_of_a_whole_one(asked, tmp_path, monkeypatch):
    whole = asked("--batch-size", "3")
    calls = []

    def stopped(*given):
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return answer(*given)

    monkeypatch.setattr(generate_dataset, "answer", stopped)
    with pytest.raises(KeyboardInterrupt):
        asked("--batch-size", "3", output="again.jsonl")
    assert asked("--batch-size", "3", output="again.jsonl") == whole
    assert asked("--batch-size", "3", output="again.jsonl") == whole and len(calls) == 3 + 3


def test_answers_that_repeat_themselves_are_kept_apart_and_not_asked_for_again(asked, tmp_path, monkeypatch):
    whole = {row["prompt_id"] for row in asked("--batch-size", "3")}
    monkeypatch.setattr(generate_dataset, "repeats_itself", lambda tokens: tokens[0] % 2 == 0)
    kept = {row["prompt_id"] for row in asked("--batch-size", "3", output="some.jsonl")}
    apart = (tmp_path / "some.repeats.jsonl").read_text().splitlines()
    assert kept and len(apart) == 12 - len(kept) > 0
    assert kept | {json.loads(line)["prompt_id"] for line in apart} == whole
    assert len(asked("--batch-size", "3", output="some.jsonl")) == len(kept)


def test_without_a_terminal_each_batch_is_a_line(asked, capsys):
    asked("--batch-size", "4")
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[:2] == [
        "Reading at most 4000 prompts ...",
        "Answering 12 prompts in 3 batches; 0 are answered already.",
    ]
    assert [line.partition(",")[0] for line in lines[2:]] == ["4/12 prompts", "8/12 prompts", "12/12 prompts"]
    assert "Answering" not in printed.err


@pytest.mark.parametrize("drafts_with_a_head", [False, True])
@pytest.mark.parametrize(
    ("model_type", "attention"),
    [("llama", "eager"), ("gemma2", "eager"), ("llama", "sdpa"), ("mistral", "sdpa"), ("gemma3_text", "sdpa")],
)
def test_greedy_answers_are_those_of_plain_generate_to_each_prompt_alone(
    model_type: str, attention: str, drafts_with_a_head: bool
) -> None:
    extra = {} if model_type == "llama" else {"sliding_window": 8, "head_dim": 8}
    model = build_target(model_type, initializer_range=0.4, attn_implementation=attention, **extra)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 64, (length,), generator=generator).tolist() for length in (7, 3, 9, 12, 7, 5)]
    alone = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
        alone.append(out[0, len(prompt) :].tolist())
    ends = sorted({2} | {tokens[len(tokens) // 2] for tokens in alone[:2]})  # so that some rows end early
    model.generation_config.eos_token_id = ends
    torch.manual_seed(1)
    head = DraftHead.from_target(model) if drafts_with_a_head else None
    answers = answer(attach(model), head, prompts, 0.0, 20, seed=0)
    for found, plain in zip(answers, alone, strict=True):
        length = next((i for i, token in enumerate(plain) if token in ends), len(plain) - 1) + 1
        assert found == plain[:length]


def test_sampled_answers_are_those_of_the_seed() -> None:
    model = attach(build_target("llama", initializer_range=0.4))
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12]]
    first, second, other = (answer(model, None, prompts, 0.9, 12, seed) for seed in (3, 3, 4))
    assert first == second != other


def test_a_batch_holds_prompts_of_one_temperature_and_similar_lengths() -> None:
    prompts = ["a" * (number * 7 % 31 + 1) for number in range(31)]
    found = batches(prompts, len, [0.0, 0.0, 0.8], 8, seed=0)
    assert sorted(prompt for _, group in found for prompt in group) == sorted(prompts)
    assert {number: temperature for temperature, group in found for number in map(len, group)} == {
        len(prompt): (0.0, 0.0, 0.8)[place % 3] for place, prompt in enumerate(prompts)
    }
    sizes = sorted(len(group) for _, group in found)
    assert sizes == [5, 5, 7, 7, 7]  # as even as possible: a small batch costs nearly as much as a full one
    greedy = sorted((min(map(len, group)), max(map(len, group))) for temperature, group in found if not temperature)
    assert all(end < start for (_, end), (start, _) in zip(greedy, greedy[1:], strict=False))
    assert found == batches(prompts, len, [0.0, 0.0, 0.8], 8, seed=0) != batches(prompts, len, [0.0, 0.0, 0.8], 8, 1)


def test_a_terminal_gets_a_bar_and_a_log_one_line_for_each_batch(capsys: pytest.CaptureFixture[str]) -> None:
    now, model = [0.0], torch.nn.Identity()
    for is_terminal in (True, False):
        now[0] = 0.0
        with PromptProgress(10, 2, is_terminal=is_terminal, clock=lambda: now[0]) as progress:
            with progress.watch(model, 4, most_steps=8):
                model(torch.zeros(1))
            now[0] = 2.0
            progress.add(4, 100)
        printed = capsys.readouterr()
        if is_terminal:
            assert "6/10" in printed.err and "50 tokens/s" in printed.err and not printed.out
        else:
            assert printed.out == "6/10 prompts, 50 tokens/s, 0:00:02 left\n" and not printed.err
