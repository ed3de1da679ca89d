"""What a published figure says of where it comes from."""

import hashlib
from pathlib import Path

from benchmarking.provenance import weights_sha256


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
