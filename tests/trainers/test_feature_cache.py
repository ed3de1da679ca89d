"""Features on disk; what fills them is tested with the trainer."""

from pathlib import Path

import pytest
import torch

from tests.targets import Architecture
from transformers_resps.trainers import CachedFeatures, Example, FrozenTarget


def test_a_damaged_file_is_named_and_what_to_do(tmp_path: Path) -> None:
    target = FrozenTarget(Architecture("llama").build("sdpa"), [1, 2])
    example = Example(torch.tensor([3, 4, 5, 6]), torch.tensor([False, False, True, True]))
    cached = CachedFeatures([example], tmp_path, target)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(ValueError, match=f"{file.name} is gone or damaged.*Delete it and start again"):
        cached[0]
    file.unlink()
    assert CachedFeatures([example], tmp_path, target)[0]["picks"].shape == (4,)
