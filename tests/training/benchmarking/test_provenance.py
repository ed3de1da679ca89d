"""What a published figure says of where it comes from."""

import hashlib
from pathlib import Path

from benchmarking.provenance import code_sha256, weights_sha256


def test_the_hash_of_weights_is_that_of_all_their_files(tmp_path: Path) -> None:
    """One file's, as `sha256sum` has it, whatever else lies there; of parts one after the other; else the config's."""
    (tmp_path / "config.json").write_bytes(b"{}")
    assert weights_sha256(tmp_path) == hashlib.sha256(b"{}").hexdigest()
    parts = [tmp_path / f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for part, content in zip(parts, (b"first", b"second"), strict=True):
        part.write_bytes(content)
    assert weights_sha256(tmp_path) == hashlib.sha256(b"firstsecond").hexdigest()
    for part in parts:
        part.unlink()
    (tmp_path / "model.safetensors").write_bytes(b"whole")
    assert weights_sha256(tmp_path) == hashlib.sha256(b"whole").hexdigest()
    assert weights_sha256(tmp_path / "nowhere") is None


def test_the_hash_of_code_is_of_what_it_does_not_of_what_it_says(tmp_path: Path) -> None:
    module, native = tmp_path / "module.py", tmp_path / "native.cpp"
    module.write_text('"""Says."""\n\n\ndef add(a, b):\n    """Adds."""\n    return a + b  # both\n')
    native.write_text("int one();\n")
    before = code_sha256(tmp_path)
    module.write_text("def add(a, b):\n    return a + b\n")
    assert code_sha256(tmp_path) == before
    module.write_text("def add(a, b):\n    return b + a\n")
    changed = code_sha256(tmp_path)
    assert changed != before
    native.write_text("int two();\n")
    assert code_sha256(tmp_path) not in (before, changed)
