import pytest

from runs.context import check_context
from tests.targets import Architecture


def test_what_does_not_fit_into_the_context_is_refused() -> None:
    target = Architecture("llama", {"max_position_embeddings": 64}).build("sdpa")
    check_context(target, 64, "64 tokens are asked for", "Ask for less.")
    with pytest.raises(ValueError, match="65 tokens are asked for, but the target reads at most 64 tokens. Ask for"):
        check_context(target, 65, "65 tokens are asked for", "Ask for less.")
