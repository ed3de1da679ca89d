"""What reaches the Hub, and what does not when something goes wrong on the way."""

from pathlib import Path

import pytest

from tests.hub.loopback_hub import LoopbackHub
from transformers_resps.hub.upload import Destination, Existing, upload


REPO = "tester/head"
FILES = {"README.md": b"# A head\n", "config.json": b"{}", "model.safetensors": bytes(range(256)) * 40}


def send(hub: LoopbackHub, *, sleep=lambda seconds: None, **destination) -> str:
    return upload(FILES, Destination(REPO, **destination), "Publish", sleep=sleep)


def received(hub: LoopbackHub) -> dict[str, bytes]:
    return {name: content for name, content in hub.repositories[REPO].files.items() if name != ".gitattributes"}


def test_all_files_arrive_in_one_commit(hub):
    address = send(hub)
    assert received(hub) == FILES
    assert len(hub.repositories[REPO].commits) == 2  # the empty one, and ours
    assert address.endswith(hub.repositories[REPO].branches["main"])


def test_a_local_file_arrives_as_it_is_and_stays(hub, tmp_path):
    file = tmp_path / "notes.md"
    file.write_bytes(b"as it is")
    upload({"notes.md": file}, Destination(REPO), "Publish")
    assert hub.repositories[REPO].files["notes.md"] == file.read_bytes() == b"as it is"


@pytest.mark.parametrize("private", [True, False])
def test_a_new_repository_is_as_private_as_asked(hub, private):
    send(hub, private=private)
    assert hub.repositories[REPO].private == private


def test_a_branch_is_made_and_the_main_one_left_alone(hub):
    send(hub, revision="next")
    assert received(hub) == {}
    assert set(FILES) < set(hub.repositories[REPO].commits[hub.repositories[REPO].branches["next"]])


def test_a_file_to_keep_is_kept_where_it_is_and_written_where_it_is_not(hub):
    keep = Existing(keep=("README.md",))
    upload(FILES, Destination(REPO), "Publish", existing=keep)
    assert received(hub)["README.md"] == FILES["README.md"]
    upload({"README.md": b"other", "config.json": b"[]"}, Destination(REPO), "Again", existing=keep)
    assert received(hub)["README.md"] == FILES["README.md"] and received(hub)["config.json"] == b"[]"


def test_a_file_that_tells_of_other_weights_is_refused_and_nothing_committed(hub):
    refuse = Existing(refuse=("results.json",))
    upload(FILES | {"results.json": b"{}"}, Destination(REPO), "Publish", existing=refuse)
    with pytest.raises(FileExistsError, match=r"holds results.json of other weights.*Push to another repository"):
        upload(FILES | {"config.json": b"[]"}, Destination(REPO), "Again", existing=refuse)
    assert received(hub) == FILES | {"results.json": b"{}"}


def test_leftovers_go_in_the_same_commit_and_what_is_not_asked_about_stays(hub):
    upload(FILES | {"old.png": b"", "LICENSE": b""}, Destination(REPO), "Publish")
    upload(FILES, Destination(REPO), "Again", existing=Existing(remove=lambda name: name.endswith((".png", ".md"))))
    assert received(hub) == FILES | {"LICENSE": b""} and len(hub.repositories[REPO].commits) == 3


@pytest.mark.parametrize("call", ["repos/create", "/commit/"])
def test_a_busy_hub_is_asked_again_after_the_time_it_names(hub, call):
    waited = []
    hub.fault(call, (429, {"Retry-After": "7"}), times=2)
    send(hub, sleep=waited.append)
    assert waited == [7.0, 7.0] and received(hub) == FILES


def test_a_hub_that_stays_busy_is_given_up_with_nothing_committed(hub):
    waited = []
    hub.fault("/commit/", 429, times=99)
    with pytest.raises(OSError, match="(?s)nothing was committed.*later"):
        send(hub, sleep=waited.append)
    assert waited == [1.0, 2.0, 4.0, 8.0] and received(hub) == {}


@pytest.mark.parametrize("call", ["preupload", "objects/batch", "PUT /large"])
def test_a_busy_hub_in_the_middle_of_an_upload_is_asked_again(hub, pauses, call):
    hub.fault(call, (429, {"Retry-After": "3"}))
    send(hub)
    assert pauses == [4.0] and received(hub) == FILES


def test_without_a_valid_token_nothing_is_made(hub):
    with pytest.raises(OSError, match="hf auth login"):
        send(hub, token="hf_wrong")
    assert hub.repositories == {}


def test_a_repository_of_another_owner_is_named(hub):
    hub.fault("repos/create", 403)
    with pytest.raises(OSError, match="whether the token may write there"):
        send(hub)


def test_a_commit_of_another_writer_meanwhile_is_not_overwritten(hub):
    def another_writer(request: str) -> None:
        if "preupload" in request:
            hub.repositories[REPO].commit({"config.json": b"theirs"})

    hub.before = another_writer
    with pytest.raises(OSError, match="repository was changed meanwhile"):
        send(hub)
    assert hub.repositories[REPO].files == {"config.json": b"theirs"}


def test_a_conflict_says_to_look_first(hub):
    hub.fault("/commit/", 409)
    with pytest.raises(OSError, match="repository was changed meanwhile"):
        send(hub)


def test_an_upload_cut_once_goes_on(hub, pauses):
    hub.fault("PUT /large", "drop")
    send(hub)
    assert received(hub) == FILES and len(pauses) == 1


@pytest.mark.parametrize("call", ["PUT /large", "/commit/"])
def test_an_upload_cut_for_good_commits_nothing_and_says_so(hub, pauses, call):
    hub.fault(call, "drop", times=99)
    with pytest.raises(ConnectionError, match="Either all files were committed or none"):
        send(hub)
    assert received(hub) == {}
    hub.faults.clear()
    send(hub)
    assert received(hub) == FILES


def test_an_id_that_is_none_is_refused(hub):
    with pytest.raises(ValueError, match="no Hub id"):
        upload(FILES, Destination("a/b/c"), "Publish")


def test_local_folders_are_not_ids(tmp_path, monkeypatch):
    from transformers_resps.hub.upload import as_hub_id

    monkeypatch.chdir(tmp_path)
    Path("work/head").mkdir(parents=True)
    assert as_hub_id("owner/head") == "owner/head"
    assert [as_hub_id(name) for name in ("work/head", "/tmp/head", "head", None)] == [None] * 4
