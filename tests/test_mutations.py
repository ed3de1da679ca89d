"""The planted bugs have a place; `python -m tests.mutations` tells whether the tests notice them."""

from pathlib import Path

import pytest

from tests.mutations import MUTATIONS, ROOT, Mutation, copy_of


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.bug)
def test_a_bug_still_has_its_place(mutation: Mutation, tmp_path: Path) -> None:
    original = (ROOT / "transformers_resps" / mutation.file).read_text(encoding="utf-8")
    (tmp_path / mutation.file).parent.mkdir(exist_ok=True)
    (tmp_path / mutation.file).write_text(original, encoding="utf-8")
    mutation.plant(tmp_path)
    planted = (tmp_path / mutation.file).read_text(encoding="utf-8")
    assert planted != original
    compile(planted, mutation.file, "exec")


def test_a_bug_whose_place_is_gone_is_named(tmp_path: Path) -> None:
    (tmp_path / "tree.py").write_text("nothing", encoding="utf-8")
    with pytest.raises(ValueError, match="has 0 times `right`, but the bug 'old' needs it once"):
        Mutation("old", "tree.py", "right", "wrong", "tests").plant(tmp_path)


def test_copies_leave_the_working_tree_alone(tmp_path: Path) -> None:
    package = copy_of(tmp_path)
    MUTATIONS[0].plant(package)
    assert package.is_relative_to(tmp_path)
    assert MUTATIONS[0].right in (ROOT / "transformers_resps" / MUTATIONS[0].file).read_text(encoding="utf-8")
