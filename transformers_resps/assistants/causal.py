"""Draft trees with a causal model that has the target's vocabulary, such as a smaller model of its family."""

import json
from inspect import signature
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from ..compat import CACHE_KEYWORD
from ..drafting import ALL, Entries, Places, StepModel, Wanted, at_wanted
from ..verifying.attention import use_gqa_attention
from ..verifying.hybrids import is_recurrent, recurrence_obstacle
from ..verifying.masks import ATTENTION_TYPES, additive, attention_patterns, last_position, layer_types
from ..verifying.unknown_targets import FAILURES, beyond_tolerance
from .loaded import LoadedModel


_PADDED = 0.01  # The vocabulary sizes of model and target may differ by this share, because some models pad theirs.
_SAME_TOKENS = (
    "Pass a model with the target's tokenizer, or leave out the policy and pass both tokenizers: Transformers then "
    "drafts chains."
)


class CausalDrafter(LoadedModel):
    """A causal model that drafts for a target with the same vocabulary. It reads the text, not the target's features.
    If both models have a `tokenizer.json`, these files are compared, otherwise only the sizes of the vocabularies.
    """

    _is_probed = False

    def _obstacle(self, target: PreTrainedModel) -> str | None:
        model = self.model
        if model is target:
            return "is the target itself, so a draft costs what it saves. Pass a smaller model of its family."
        if model.config.is_encoder_decoder:
            return "is an encoder-decoder, and only a decoder can draft. Pass a causal model."
        if is_recurrent(model) or recurrence_obstacle(model) is not None:
            return (
                "has recurrent layers, whose state cannot branch in a tree. Pass a model with attention alone, or "
                "`policy='auto'` without an assistant, which drafts by lookup."
            )
        odd = layer_types(model) - ATTENTION_TYPES
        if odd:
            return f"has layers of the kind {sorted(odd)}, which it would draft wrongly with. Pass another model."
        if "position_ids" not in signature(model.forward).parameters:
            return "takes no `position_ids`, so it cannot draft trees. Pass another model."
        if model.get_output_embeddings() is None:
            return "has no output head, so it writes no text. Pass a model of `AutoModelForCausalLM`."
        sizes = [_vocab_size(found) for found in (model, target)]
        if abs(sizes[0] - sizes[1]) > _PADDED * max(sizes):
            return f"has a vocabulary of {sizes[0]} tokens, and the target one of {sizes[1]}. {_SAME_TOKENS}"
        return None

    def prepare(self, target: PreTrainedModel) -> None:
        self.check_target(target)
        if not self._is_probed:
            known = [_tokens(found) for found in (self.model, target)]
            if None not in known and known[0] != known[1]:
                theirs = target.config.name_or_path
                raise ValueError(f"{_name(self.model)} has another tokenizer than the target {theirs}. {_SAME_TOKENS}")
            _check_trees(self.model, _Steps(self.model, _vocab_size(target)))
            self._is_probed = True

    def bind(self, target: PreTrainedModel) -> StepModel:
        self.prepare(target)
        return _Steps(self.model, _vocab_size(target))


def _vocab_size(model: PreTrainedModel) -> int:
    return model.config.get_text_config(decoder=True).vocab_size


def _name(model: PreTrainedModel) -> str:
    return f"The assistant {model.config.name_or_path or type(model).__name__} ({model.config.model_type})"


def _tokens(model: PreTrainedModel) -> Any:
    """Load the vocabulary from `tokenizer.json` in the model's folder or the Hub's cache; `None` if it is missing."""
    name = model.config.name_or_path or ""
    path: Any = Path(name) / "tokenizer.json"
    if not path.is_file():
        try:
            path = try_to_load_from_cache(name, path.name)
        except HFValidationError:  # the name is a folder or empty
            return None
    if not isinstance(path, str | Path):
        return None
    return json.loads(Path(path).read_text(encoding="utf-8")).get("model", {}).get("vocab")


class _Steps(StepModel):
    """Drafts with a causal model, which runs over the text and a tree's nodes. Position ids do not count padding."""

    reads_features = False
    counts_padding = False

    def __init__(self, model: PreTrainedModel, target_vocab_size: int) -> None:
        self._model, self._decoder = model, model.get_decoder()
        self._output = model.get_output_embeddings()
        config = self._config = model.config.get_text_config(decoder=True)
        self._known_tokens = cast(Tensor, model.get_input_embeddings().weight).shape[0]
        self._has_unknown = target_vocab_size > self._known_tokens
        self.proposable_tokens = min(target_vocab_size, _vocab_size(model))
        self._patterns = attention_patterns(config, DynamicCache(config=config))
        self._last_position = last_position(config, 0)
        self.device, self.dtype = model.device, model.dtype

    @property
    def modules(self) -> nn.ModuleList:
        return nn.ModuleList([self._model])

    def places(self, positions: Tensor) -> Places:
        """Limit positions to the learned position table, if any. Drafts beyond it are useless, but do not fail."""
        return (positions.clamp(0, self._last_position),)

    def run(
        self, depth: int, tokens: Tensor, hidden: Tensor | None, places: Places, entries: Entries, wanted: Wanted = ALL
    ) -> Tensor:
        (positions,) = places
        with use_gqa_attention(self._model):
            outputs = self._decoder(
                input_ids=tokens.clamp(max=self._known_tokens - 1) if self._has_unknown else tokens,
                attention_mask=self._masks(positions.expand_as(tokens), entries),
                position_ids=positions.expand_as(tokens),
                use_cache=True,
                **{CACHE_KEYWORD: entries},
            )
        return at_wanted(outputs.last_hidden_state, wanted)

    def logits(self, output: Tensor, depth: int = 0) -> Tensor:
        """Compute logits of the tokens that the target also has, scaled and capped as the model's config says."""
        config, logits = self._config, self._output(output).float()
        logits = logits[..., : self.proposable_tokens] * getattr(config, "logit_scale", 1.0)
        logits = logits / getattr(config, "logits_scaling", 1.0)
        cap = getattr(config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _masks(self, positions: Tensor, entries: Entries) -> Any:
        """Make an attention mask for all layers, or a dict of masks by layer type; `None` means causal attention."""
        mask = entries.mask
        patterns = {name: pattern for name, pattern in self._patterns.items() if pattern is not None}
        if all(pattern.window is None for pattern in patterns.values()):
            if mask is None:
                return None
            masks = dict.fromkeys(patterns, additive(mask, self.dtype))
        else:  # windows need the positions of all keys, so positions are cached like one more layer's keys
            own = positions[:, None, :, None].float()
            known, _ = entries.update(own, own, self._config.num_hidden_layers)
            keys = known.transpose(-1, -2)
            masks = {name: additive(one.mask(own, keys, mask), self.dtype) for name, one in patterns.items()}
        return masks.get(None, masks)


class _Shown(Entries):
    """Replaces the cache in one pass over a whole text: `update` returns the new keys and values unchanged."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return keys, values


@torch.no_grad()
def _check_trees(model: PreTrainedModel, steps: StepModel) -> None:
    """Raise a `ValueError` if the logits of `steps`, which runs `model` over a tree, differ from those of `model` over
    each branch alone. Without this check a wrong mask or scale would lower acceptance unnoticed.
    """
    name = _name(model)
    tokens = torch.arange(1, 7, device=model.device).remainder(steps.proposable_tokens)[None]
    positions = torch.tensor([[0, 1, 2, 3, 3, 4]], device=model.device)  # nodes 3 and 4 follow 2, and 5 follows 4
    mask = torch.ones(6, 6, dtype=torch.bool, device=model.device).tril()
    mask[4:, 3] = False
    try:
        output = steps.run(0, tokens, None, steps.places(positions), _Shown(mask[None, None]))
        found = steps.logits(output)[0, [3, 5]]
        texts = tokens[:, [0, 1, 2, 3]], tokens[:, [0, 1, 2, 4, 5]]
        alone = [model(input_ids=text, use_cache=False).logits[0, -1] for text in texts]
    except FAILURES as failure:
        raise ValueError(
            f"{name} fails on a draft tree's cache, positions and mask ({type(failure).__name__}: {failure}). Leave "
            "out the policy, and Transformers drafts chains with it."
        ) from failure
    error = beyond_tolerance(found, torch.stack(alone)[..., : steps.proposable_tokens], model.dtype)
    if error is not None:
        raise ValueError(
            f"{name} gives logits that differ by {error:.3g} between a draft tree and the same tokens alone. Leave "
            "out the policy, and Transformers drafts chains with it."
        )
