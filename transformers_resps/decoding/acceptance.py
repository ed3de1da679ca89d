"""The acceptance rule: follow the tree in commit order.

At every committed position it makes exactly the calls that plain sampling makes (Transformers' `_sample`):
the user's logits processors with the text so far, one pick by the target, the stopping criteria, the streamer. It
then descends if a child carries the pick, and stops otherwise. So every token is the target's own draw given its
prefix, in the order and with the random numbers of plain decoding: lossless for any tree that was built without
looking at the picks, and identical with the same seed. `min(1, p/q)` on chosen children is not (a test shows it).

`accept_greedy` is the same rule for greedy decoding that nothing observes, without these calls. `accept_at_once` is
the same rule where the calls keep no state: it makes them for all nodes, and reads the picks once.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..tree import DraftTree
from .text import Text


@dataclass(frozen=True, slots=True)
class Acceptance:
    """What a step added to the rows that it decoded.

    Attributes:
        path: `[b, m]` nodes whose logits were used, root first; meaningless in rows that had finished. A row that
            kept fewer repeats its last.
        tokens: `[b, m]` the picks after them; the last one is the next root.
        counts: nodes that each row kept.
        emitted: tokens that each row of the call gained, decoded or not; padding after its end does not count.
    """

    path: Tensor
    tokens: Tensor
    counts: list[int]
    emitted: list[int]

    @property
    def gained(self) -> list[bool]:
        """Which of the decoded rows gained tokens: all, unless finished rows are decoded with them."""
        every_row = len(self.emitted) == len(self.counts)
        return [count > 0 for count in self.emitted] if every_row else [True] * len(self.counts)

    @classmethod
    def from_rows(
        cls, paths: list[list[int]], picks: list[list[int]], emitted: list[int], device: torch.device
    ) -> "Acceptance":
        """Build it for rows that advanced each on its own, from their paths and the picks after each node."""
        return cls(_filled(paths, device), _filled(picks, device), list(map(len, paths)), emitted)


def accept(tree: DraftTree, logits: Tensor, text: Text) -> Acceptance:
    """Commit picks along the tree until one is not drafted, or the text is finished.

    The rows of a text advance in lockstep: all commit as many tokens as the live row with the shortest run.

    Args:
        tree: what was verified, for the decoded rows.
        logits: `[b, n, v]` the target's, one row per node.
        text: gains the picks.
    """
    children, rows, nodes = tree.children(), list(range(len(logits))), [0] * len(logits)
    path, picks, emitted = [], [], torch.zeros_like(text.unfinished)
    while True:
        path.append(nodes)
        emitted = emitted + text.unfinished
        tokens = text.commit(_logits_at(rows, nodes, logits))
        picks.append(tokens)
        if text.finished or tree.node_count == 1:
            break
        following = _next_nodes(children, nodes, tokens.tolist(), text.live.tolist())
        if following is None:
            break
        nodes = following
    followed = torch.tensor(path, device=logits.device).T
    return Acceptance(followed, torch.stack(picks, dim=1).to(logits.device), [len(path)] * len(rows), emitted.tolist())


def _next_nodes(
    children: list[dict[tuple[int, int], int]], nodes: list[int], tokens: list[int], live: list[bool]
) -> list[int] | None:
    """The children of `nodes` that carry the picks `tokens`; `None` if a live row's pick was not drafted."""
    found = [own.get(at) for own, at in zip(children, zip(nodes, tokens, strict=True), strict=True)]
    if any(is_live and node is None for is_live, node in zip(live, found, strict=True)):
        return None
    return [node or 0 for node in found]


def accept_greedy(tree: DraftTree, logits: Tensor, texts: list[Text]) -> tuple[list[list[int]], list[list[int]]]:
    """Accept as `accept` would for each row on its own, where all texts are plain greedy (`Text.is_plain_greedy`).

    The picks, their order and the ends are the same, without the calls for each token of each row: a batch of eight
    roots takes 0.5 ms instead of 1.4.

    Args:
        tree: what was verified.
        logits: `[b, n, v]` the target's, one row per node.
        texts: b of one row each; they gain the picks.

    Returns:
        Of each row, the nodes whose logits were used, root first, and the picks after them.
    """
    children = tree.children()
    paths: list[list[int]] = [[] for _ in texts]
    picks: list[list[int]] = [[] for _ in texts]
    going = dict.fromkeys(range(len(texts)), 0)  # row -> the node it has come to
    while going:
        rows, nodes = list(going), list(going.values())
        tokens = _logits_at(rows, nodes, logits).argmax(-1).tolist()
        going = {}
        for row, node, token in zip(rows, nodes, tokens, strict=True):
            paths[row].append(node)
            picks[row].append(token)
            child = children[row].get((node, token))
            if child is not None and not _is_end(texts[row], token, len(picks[row])):
                going[row] = child
    for text, own in zip(texts, picks, strict=True):
        text.extend(own, finished=_is_end(text, own[-1], len(own)))
    return paths, picks


def accept_at_once(tree: DraftTree, logits: Tensor, text: Text) -> tuple[list[int], list[int]]:
    """Accept as `accept` would for a text of one row that `picks_at_once`, with one read of the device.

    Args:
        tree: what was verified, of one row.
        logits: `[1, n, v]` the target's, one row per node.
        text: gains the picks.

    Returns:
        The nodes whose logits were used, root first, and the picks after them.
    """
    at_once = text.tree_picks(tree, logits)
    above, tokens, picks = torch.stack([tree.parents[0], tree.tokens[0], at_once.tokens]).tolist()
    children = {(above[node], tokens[node]): node for node in range(len(tokens) - 1, 0, -1)}
    path: list[int] = []
    following: int | None = 0
    while following is not None:
        path.append(following)
        pick = picks[following]
        following = None if _is_end(text, pick, len(path)) else children.get((following, pick))
    text.follow(at_once, path, [picks[node] for node in path], finished=_is_end(text, pick, len(path)))
    return path, [picks[node] for node in path]


def _logits_at(rows: list[int], nodes: list[int], logits: Tensor) -> Tensor:
    """`[r, v]` of one node in each of r rows, of `[b, n, v]`; no copy where all rows stand at one node."""
    if len(rows) == len(logits) and len(set(nodes)) == 1:
        return logits[:, nodes[0]]
    return logits[rows, nodes]


def _is_end(text: Text, token: int, count: int) -> bool:
    """Whether a text ends with `token`, the newest of `count` picks that it has not gained yet."""
    assert text.stop_conditions is not None
    return token in text.stop_conditions.token_ids or text.length + count >= text.stop_conditions.length


def _filled(rows: list[list[int]], device: torch.device) -> Tensor:
    """`[b, m]`; rows that are shorter repeat their last number."""
    longest = max(map(len, rows))
    return torch.tensor([row + row[-1:] * (longest - len(row)) for row in rows], device=device)
