"""Draft trees: the shape that a policy asks for, the pool that a drafter scores, the tree that the target verifies.

Shape legend, used in the whole package: b batch rows, n tree nodes, m nodes of the accepted path, p pool nodes, w
nodes of one drafted level, e entries drafted before it, k `top_k`; s cached positions, t positions of one pass, q
those of them that look at others; v vocabulary, d draft vocabulary, h hidden size, hd width of an attention head, F
width of the features (layers that the head reads times the target's hidden size); a actions of a policy.
"""

from .draft_tree import DraftTree, first_children
from .pool import CandidatePool
from .shape import TreeShape
from .transfer import moved


__all__ = ["CandidatePool", "DraftTree", "TreeShape", "first_children", "moved"]
