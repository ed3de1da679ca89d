"""The study of the invariant mode's price runs on a tiny target."""

import torch
from transformers import PreTrainedModel

from training.studies.invariant_speed import TREES, measure, tree_of


def test_both_modes_verify_the_same_trees(tiny_target: PreTrainedModel) -> None:
    with torch.no_grad():
        rows = measure(tiny_target, [5], 1, compiles=False)
    assert [(row["nodes"], row["paths"]) for row in rows] == list(TREES)
    assert all(row["normal"] > 0 and row["invariant"] > 0 for row in rows)


def test_a_tree_has_the_paths_that_are_asked_for() -> None:
    for nodes, paths in TREES:
        tree = tree_of(torch.arange(nodes), paths)
        assert len(set(range(nodes)) - set(tree.parents[0, 1:].tolist())) == paths
