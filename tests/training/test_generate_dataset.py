import json
import sys

import generate_dataset
import pytest
import torch

from tests.conftest import build_target
from tests.tokenizers import letter_tokenizer


@pytest.mark.parametrize(
    ("model_type", "attention"),
    [("llama", "eager"), ("gemma2", "eager"), ("llama", "sdpa"), ("mistral", "sdpa"), ("gemma3_text", "sdpa")],
)
def test_batched_answers_equal_plain_generate(model_type, attention):
    """Rows that end early leave the batch; windowed caches fall back to the stock layers."""
    extra = {} if model_type == "llama" else {"sliding_window": 8, "head_dim": 8}
    model = build_target(model_type, initializer_range=0.4, attn_implementation=attention, **extra)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 64, (7,), generator=generator).tolist() for _ in range(12)]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
        expected.append(out[0, 7:].tolist())
    ends = {2} | {tokens[len(tokens) // 2] for tokens in expected[:2]}  # so that some rows end early
    answers = generate_dataset.answer(model, prompts, 0.0, 20, ends, seed=0)
    for answer, plain in zip(answers, expected, strict=True):
        length = next((i for i, token in enumerate(plain) if token in ends), len(plain) - 1) + 1
        assert answer == plain[:length]
    assert model.config._attn_implementation == attention


def test_a_line_cut_off_by_a_kill_is_written_anew(tmp_path):
    output = tmp_path / "answers.jsonl"
    text = "a\u2028b\x85c"  # ends a line for `splitlines`, but none of a JSONL file
    whole = json.dumps({"prompt_id": "a", "text": text}, ensure_ascii=False) + "\n"
    output.write_text(whole + '{"prompt_id": "b", "mess', encoding="utf-8")
    assert generate_dataset.finished_ids(output) == {"a"}
    assert output.read_text(encoding="utf-8") == whole


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
    tokenizer = letter_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}"

    def chosen(pattern):
        prompts = generate_dataset.read_prompts([tmp_path / "rows.jsonl"], tokenizer, 9, 9, 0, pattern)
        return {prompt.messages[-1]["content"] for prompt in prompts}

    assert chosen(r"\bef\b") == {"d ef", "EF"}
    assert chosen("") == {"d ef", "def", "EF"}
