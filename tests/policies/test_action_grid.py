"""The set of shapes itself; which ones the presets hold is tested with the policy that picks from them."""

import pytest

from transformers_resps import TreeShape
from transformers_resps.policies import ActionGrid


def test_a_grid_is_of_shapes_and_one_from_a_list_equals_the_saved_one() -> None:
    shapes = [TreeShape.plain(), TreeShape(4, 2, 2)]
    assert ActionGrid(shapes) == ActionGrid(tuple(shapes))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"needs `TreeShape`s, got \(\(8, 3, 2\),\).*from_list"):
        ActionGrid(((8, 3, 2),))  # type: ignore[arg-type]
