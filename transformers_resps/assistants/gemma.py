"""Draft with Google's assistants of Gemma 4, such as `google/gemma-4-E4B-it-assistant`.

An assistant has no keys and values of its own: all nodes of a tree attend to the target's keys, and have the position
id of the root (the newest token). A node knows its ancestors only through its hidden state, so no cache is needed.

Transformers' own loop differs in two ways. There the assistant also attends to the keys of the first rejected token,
and its likeliest tokens are accepted as if they were sampled. Here only tokens that the target picks are accepted.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..drafting import ALL, DraftCache, Entries, Places, StepModel, Wanted
from ..drafting.step_model import likeliest
from ..verifying.forward import decoder_layers
from ..verifying.masks import layer_types
from ..verifying.verifier import TargetEntries, Verifier
from .loaded import LoadedModel


class GemmaAssistant(LoadedModel):
    """Drafts with an assistant model of Gemma 4."""

    reads_target = True

    def __init__(self, model: PreTrainedModel, target: PreTrainedModel) -> None:
        super().__init__(model, target)
        self._layer_count: int = target.config.get_text_config(decoder=True).num_hidden_layers

    @property
    def feature_layers(self) -> list[int]:
        """The number of layers + 1: the index of the output of the target's final norm, see `FeatureTap`."""
        return [self._layer_count + 1]

    def _obstacle(self, target: PreTrainedModel) -> str | None:
        model, config = self.model, target.config.get_text_config(decoder=True)
        way_out = "Load the assistant of the target's own size, `google/gemma-4-E4B-it-assistant` for example."
        if not config.model_type.startswith("gemma4") or not layer_types(model) <= layer_types(target):
            return f"drafts for Gemma 4 alone, not for a {type(target).__name__} ({config.model_type}). {way_out}"
        needed = {
            "hidden_size": model.config.backbone_hidden_size,
            "vocab_size": model.config.get_text_config().vocab_size,
            **_key_sizes(model),
        }
        sizes = {"hidden_size": config.hidden_size, "vocab_size": config.vocab_size, **_key_sizes(target)}
        wrong = [f"{name} {size} (this target: {sizes[name]})" for name, size in needed.items() if sizes[name] != size]
        if wrong:
            return f"was made for another size of Gemma: it needs {', '.join(wrong)}. {way_out}"
        if model.dtype != target.dtype:
            return f"is in {model.dtype}, and the target in {target.dtype}. Load both with the same `dtype`."
        return None

    def bind(self, target: PreTrainedModel) -> StepModel:
        self.check_target(target)
        return _Queries(self.model, target)


def _key_sizes(model: PreTrainedModel) -> dict[str, str]:
    """Describe the sizes of each layer type's keys, for comparison and error messages."""
    heads = model.config.get_text_config(decoder=True).num_attention_heads
    found: list[Any] = [layer.self_attn for layer in cast(Any, decoder_layers(model))]
    return {
        f"{own.layer_type} keys": f"{heads // own.num_key_value_groups}x{own.head_dim} in a window of "
        f"{own.sliding_window or 'all'}"
        for own in found
    }


class _OfTarget(Entries):
    """Holds the target's keys and values, to which the assistant's layers attend."""

    def __init__(self, kept: TargetEntries) -> None:
        self.kept = kept

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("An assistant has no keys of its own.")


class _TargetCache(DraftCache):
    """Stores nothing: `attend` returns the target's keys and values, and looks them up once for each text length."""

    def __init__(self, verifier: Verifier) -> None:
        super().__init__(device=verifier.device)
        self._verifier, self._length = verifier, 0
        self._kept: _OfTarget | None = None

    def reserve(self, length: int, tree: int = 0) -> None:
        self._kept, self._length = self._kept if length == self._length else None, length

    def keep_rows(self, rows: Tensor) -> None:
        self._kept = None

    def attend(self, where: int | Tensor, end: int, **_: Any) -> Entries:
        self._kept = self._kept or _OfTarget(self._verifier.target_entries())
        return self._kept


class _Queries(StepModel):
    """Drafts with the assistant, which runs over all nodes of a tree level; nodes do not attend to each other."""

    def __init__(self, model: PreTrainedModel, target: PreTrainedModel) -> None:
        self._model = cast(Any, model)
        self._embed = target.get_input_embeddings()
        self._embedder: Any = self._model.masked_embedding
        self.proposable_tokens = model.config.get_text_config().vocab_size
        if self._embedder is not None:
            self._by_centroid = self._embedder.token_ordering.view(self._embedder.num_centroids, -1)
            self.proposable_tokens = self._embedder.centroid_intermediate_top_k * self._by_centroid.shape[1]
        self.device, self.dtype = model.device, model.dtype

    @property
    def modules(self) -> nn.ModuleList:
        return nn.ModuleList([self._model, self._embed])

    def cache(self, verifier: Verifier | None) -> DraftCache:
        assert verifier is not None, "an assistant attends to what a verifier keeps"
        return _TargetCache(verifier)

    def run(
        self, depth: int, tokens: Tensor, hidden: Tensor | None, places: Places, entries: Entries, wanted: Wanted = ALL
    ) -> Tensor:
        assert hidden is not None and isinstance(wanted, slice) and isinstance(entries, _OfTarget)
        tokens, hidden, kept = tokens[:, wanted], hidden[:, wanted], entries.kept
        count = tokens.shape[1]
        outputs = self._model.model(
            inputs_embeds=self._model.pre_projection(torch.cat([self._embed(tokens), hidden], dim=-1)),
            attention_mask={kind: mask.expand(-1, -1, count, -1) for kind, mask in kept.masks.items()},
            position_ids=kept.positions.expand(-1, count),
            shared_kv_states=kept.states,
            use_cache=False,
            logits_to_keep=None,  # a number, even 0, would slice inputs that an assistant does not have
        )
        return outputs.last_hidden_state

    def logits(self, output: Tensor, depth: int = 0) -> Tensor:
        """Compute logits of all tokens; if the model clusters its vocabulary, only of the tokens of `_nearest`."""
        if self._embedder is None:
            return self._model.lm_head(output).float()
        return self._scores(output, self._nearest(output))

    def children(self, output: Tensor, top_k: int, depth: int = 0) -> tuple[Tensor, Tensor]:
        if self._embedder is None:
            return super().children(output, top_k, depth)
        tokens = self._nearest(output)
        scores, best = likeliest(self._scores(output, tokens), min(top_k, tokens.shape[-1]))
        return tokens.gather(-1, best), scores

    def _nearest(self, output: Tensor) -> Tensor:
        """Return the ids `[b, q, d]` of the tokens that belong to the centroids nearest to each output."""
        nearest = self._embedder.centroids(output).topk(self._embedder.centroid_intermediate_top_k).indices
        return self._by_centroid[nearest].flatten(-2)

    def _scores(self, output: Tensor, tokens: Tensor) -> Tensor:
        return (self._model.lm_head.weight[tokens] @ output[..., None]).squeeze(-1).float()

    def feedback(self, output: Tensor, hidden: Tensor | None) -> Tensor:
        return self._model.post_projection(output)
