import json
import sys

import datasets
import pytest

from transformers_resps.data import load_conversations


USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, ASSISTANT]},
        {"prompt": "q", "completion": "a"},
        {"prompt": [USER], "completion": [ASSISTANT]},
        {"question": "q", "answer": "a"},
        {"messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": "a"}]}]},
        {"conversations": [USER, ASSISTANT]},
        {
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "gpt", "value": "a"},
                {"from": "tool", "value": ""},
            ]
        },
    ],
)
def test_every_known_layout_gives_the_same_messages(tmp_path, row):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n\n")
    assert list(load_conversations(str(path))) == [[USER, ASSISTANT]]


def test_a_list_that_is_cut_off_gives_its_whole_rows(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"messages": [USER]}, {"messages": [ASSISTANT]}])[:-5])
    assert list(load_conversations(path)) == [[USER]]


def test_a_broken_row_before_the_end_of_a_list_is_refused_and_no_row_after_it_lost(tmp_path):
    path = tmp_path / "rows.json"
    rows = [json.dumps({"messages": [USER]})] * 4
    path.write_text("[" + ", ".join([rows[0], '{"messages": x}', *rows]) + "]")
    with pytest.raises(ValueError, match="broken row: Expecting value at 'x}.*Fix that row"):
        list(load_conversations(path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "line 1 is not JSON"),
        ("5", "row 0 is 5, but"),
        ('{"messages": [{"role": "user", "content": null}]}', "has the content None"),
        ('{"conversations": [{"from": "human"}]}', "lack `from` or `value`"),
        ('{"text": "q"}', "fields \\['text'\\]"),
        ('{"messages": [{"role": "user"}]}', "message with the fields \\['role'\\]"),
        ('{"messages": null}', "messages that are None, but they must be a list of JSON objects. Fix"),
        ('{"messages": [null]}', "messages that are \\[None\\]"),
        ('{"conversations": [3]}', "`conversations` that are \\[3\\]"),
        ('{"turns": "abc"}', "`turns` that are 'abc'"),
        ('{"turns": [null]}', "has the content None"),
        ('{"turns": [[{"type": "text", "text": null}]]}', "has the content .*only text can be trained on"),
        ('{"prompt": 3}', "messages that are 3"),
    ],
)
def test_rows_that_are_no_conversations_are_named(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(line)
    with pytest.raises(ValueError, match=message):
        list(load_conversations(path))


def test_a_line_that_is_not_utf_8_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "q"}\n{"prompt": "\xff"}\n')
    with pytest.raises(ValueError, match="line 2 is not JSON .*utf-8.* Fix or remove that line"):
        list(load_conversations(path))


def test_a_question_without_an_answer_may_say_so(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "q", "completion": null}')
    assert list(load_conversations(path)) == [[USER]]


def test_a_dataset_of_the_hub_is_read_by_id_config_and_split(tmp_path, monkeypatch):
    """A folder laid out like a repository of the Hub goes through the same `load_dataset`."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    for name, answer in (("train", "a"), ("test", "b")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": "q", "completion": answer}) + "\n")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files:\n  - {split: train, path: train.jsonl}\n"
        "  - {split: test, path: test.jsonl}\n---\n"
    )
    cache = {"cache_dir": str(tmp_path / "cache")}
    real = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda *given, **named: real(*given, **named, **cache))
    assert list(load_conversations(f"{tmp_path}:main", "test")) == [[USER, {"role": "assistant", "content": "b"}]]
    assert list(load_conversations(str(tmp_path), "train[:1]")) == [[USER, ASSISTANT]]
    with pytest.raises(ValueError, match="BuilderConfig 'other' not found"):
        list(load_conversations(f"{tmp_path}:other"))


def test_datasets_of_the_hub_need_their_package_and_say_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"Install transformers-resps\[train\]"):
        list(load_conversations("owner/name"))


def test_a_missing_file_is_not_looked_for_on_the_hub():
    with pytest.raises(ValueError, match="There is no file"):
        list(load_conversations("nowhere.jsonl"))
