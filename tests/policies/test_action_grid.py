"""The set of shapes that a learned policy picks from, and its presets."""

import json
from itertools import product

import pytest

from transformers_resps import TreeShape
from transformers_resps.policies.action_grid import ActionGrid


def test_a_grid_is_of_shapes_and_one_from_a_list_equals_the_saved_one() -> None:
    shapes = [TreeShape.plain(), TreeShape(4, 2, 2)]
    assert ActionGrid(shapes) == ActionGrid(tuple(shapes))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"needs `TreeShape`s, got \(\(8, 3, 2\),\).*from_list"):
        ActionGrid(((8, 3, 2),))  # type: ignore[arg-type]


def test_the_papers_grid_has_its_177_actions_in_its_order_and_counting() -> None:
    grid = ActionGrid.paper()
    assert len(grid) == 177
    assert grid[0] == TreeShape.from_eagle(32, 3, 8) == TreeShape(32, 4, 8)
    combinations = set(product((32, 48, 64, 80, 96, 128), range(4, 10), (8, 12, 16, 20, 32)))
    kept = {(shape.total_tokens, shape.depth, shape.top_k) for shape in grid.shapes}
    assert combinations - kept == {(total, 4, 8) for total in (80, 96, 128)}


def test_a_grid_from_bins_holds_what_a_head_can_fill_and_a_plain_step() -> None:
    grid = ActionGrid.from_bins((2, 8, 32), (1, 3), (1, 2))
    assert grid.shapes == (TreeShape.plain(), TreeShape(2, 1, 1), TreeShape(2, 1, 2), TreeShape(8, 3, 2))
    assert ActionGrid.small()[0].is_plain and all(shape.total_tokens <= 16 for shape in ActionGrid.small().shapes)
    assert ActionGrid.from_list(json.loads(json.dumps(grid.to_list()))) == grid
    with pytest.raises(ValueError, match="no duplicates, got 2 shapes, 1 of them distinct"):
        ActionGrid((TreeShape.plain(), TreeShape.plain()))
