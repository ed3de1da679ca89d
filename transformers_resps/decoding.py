"""The step loop: draft, verify, walk, keep; until the text is finished.

One `TreeDecoding` lives for one call of `generate`. Knows nothing of how it was asked for.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from .acceptance import Acceptance, Text, walk
from .attention import tree_attention_mask, tree_positions
from .cache import check_cache, keep_nodes
from .candidate_generator import TreeCandidateGenerator
from .features import Features, FeatureTap
from .head import BoundHead
from .policy import Observation, Policy
from .telemetry import SpeculationReport, StepRecord
from .tree import DraftTree, TreeShape
from .versions import CACHE_KEYWORD


class TreeDecoding:
    """Decodes one batch with a head and a policy.

    Args:
        target: verifies.
        head: drafts.
        policy: decides.
        text: starts as the prompt and gains the answer.
        cache: the target's, empty.
        attention_mask: `[b, s]` of the prompt, or `None` when nothing is padded.
        position_ids: `[b or 1, s]` of the prompt.
        tap: open, catches the features that the head reads.
        max_length: positions the text may reach.
        clock: seconds; tests pass a fake one.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        head: BoundHead,
        policy: Policy,
        text: Text,
        *,
        cache: Cache,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        tap: FeatureTap,
        max_length: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.target, self.policy, self.text, self.cache = target, policy, text, cache
        self.report = SpeculationReport(batch_size=len(text.input_ids))
        self._tap = tap
        self._generator = TreeCandidateGenerator(head, len(text.input_ids), attention_mask)
        self._mask = attention_mask
        self._positions = position_ids
        self._root_positions = position_ids[:, -1].expand(len(text.input_ids)) + 1  # [b]
        self._max_length = max_length
        self._last_position = _last_position(target, int(self._root_positions.max()))
        self._clock = clock

    def prefill(self, chunk_size: int | None, logits_to_keep: dict[str, int]) -> None:
        """Run the prompt through the target, in chunks if asked, and commit the first token: step 0 of the report."""
        started = self._clock()
        prompt = self.text.input_ids
        length = prompt.shape[1]
        features = []
        self.cache.activate_past_recording()
        for start in range(0, length, chunk_size or length):
            end = min(start + (chunk_size or length), length)
            outputs, caught = self._forward(
                prompt[:, start:end],
                None if self._mask is None else self._mask[:, :end],
                self._positions[:, start:end],
                **logits_to_keep,
            )
            self.cache.crop(0)
            features.append(caught.concatenated())
        check_cache(self.cache)
        verified = self._clock()
        tree = DraftTree.root_only(prompt[:, -1])
        acceptance = walk(tree, outputs.logits[:, -1:], self.text)
        self._generator.observe(torch.cat(features, dim=1), self.text.input_ids[:, 1:])
        self._record(TreeShape.plain(), 0, tree, acceptance, (started, started, verified))

    def step(self) -> None:
        """One target forward and all that surrounds it (DESIGN.md, section 3)."""
        started = self._clock()
        observation = self._observe()
        shape = self._clip(self.policy.choose(observation))
        tree, drafted_count = self._draft(shape)
        drafted = self._clock()
        outputs, features = self._verify(tree)
        verified = self._clock()
        acceptance = walk(tree, outputs.logits, self.text)
        self._keep(tree, acceptance, features)
        record = self._record(shape, drafted_count, tree, acceptance, (started, drafted, verified))
        self.policy.observe(record)

    def _observe(self) -> Observation:
        return Observation(self._generator.newest_features, self.text.length, len(self.report.steps) - 1)

    def _clip(self, shape: TreeShape) -> TreeShape:
        """No deeper than the text may grow, and than the target's positions reach."""
        room = self._max_length - self.text.length - 1
        if self._last_position is not None:
            room = min(room, self._last_position - int(self._root_positions.max()))
        return shape.within(room)

    def _draft(self, shape: TreeShape) -> tuple[DraftTree, int]:
        """The tree to verify, and how many candidates it was chosen from."""
        root = self.text.input_ids[:, -1]
        if shape.is_plain:
            return DraftTree.root_only(root), 0
        pool = self._generator.draft(shape, self.policy)
        total_tokens = min(shape.total_tokens, self.policy.size(pool.scores))
        drafted = pool.tokens.shape[1]
        if total_tokens <= 1:
            return DraftTree.root_only(root), drafted
        return DraftTree.from_pool(root.to(pool.tokens.device), pool, total_tokens), drafted

    def _verify(self, tree: DraftTree) -> tuple[Any, Features]:
        """The target's forward over all nodes; a lone root runs exactly as in plain decoding."""
        if self._mask is not None:
            missing = self.text.length - self._mask.shape[1]
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(self._mask), missing)], dim=1)
        if tree.node_count == 1:
            mask: Any = self._mask
        else:
            mask = tree_attention_mask(self.target.config, self.cache, self._mask, tree, self.target.dtype)
        return self._forward(tree.tokens, mask, tree_positions(tree, self._root_positions))

    def _forward(self, tokens: Tensor, mask: Any, positions: Tensor, **kwargs: int) -> tuple[Any, Features]:
        with self._tap.record() as features:
            outputs = self.target(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=positions,
                use_cache=True,
                return_dict=True,
                **{CACHE_KEYWORD: self.cache},
                **kwargs,
            )
        return outputs, features

    def _keep(self, tree: DraftTree, acceptance: Acceptance, features: Features) -> None:
        """The target's cache keeps the accepted path; the features of that path go to the head."""
        path = acceptance.path
        keep_nodes(self.cache, path, tree.node_count)
        states = features.concatenated()
        index = path.to(states.device)[..., None].expand(-1, -1, states.shape[-1])
        self._generator.observe(states.gather(1, index), acceptance.tokens)
        self._root_positions = self._root_positions + path.shape[1]

    def _record(
        self,
        shape: TreeShape,
        drafted: int,
        tree: DraftTree,
        acceptance: Acceptance,
        clock: tuple[float, float, float],
    ) -> StepRecord:
        started, drafting_ended, verifying_ended = clock
        emitted = acceptance.emitted.tolist()
        accepted = [max(count - 1, 0) for count in emitted]
        alone = len(emitted) == 1
        record = StepRecord(
            shape=shape,
            drafted=drafted,
            verified=tree.node_count,
            accepted=accepted[0] if alone else tuple(accepted),
            emitted=emitted[0] if alone else tuple(emitted),
            draft_seconds=drafting_ended - started,
            verify_seconds=verifying_ended - drafting_ended,
            step_seconds=self._clock() - started,
        )
        self.report.steps.append(record)
        return record


def _last_position(target: PreTrainedModel, root_position: int) -> int | None:
    """The deepest position a node may take, or `None` for no limit.

    A table of learned positions ends there; 'longrope' switches its frequencies for a whole forward as soon as one
    position passes the original context, which plain decoding would do one token at a time.
    """
    config = target.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        boundary = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        return int(boundary) - 1 if root_position < boundary else None
    return None if rope else int(config.max_position_embeddings) - 1
