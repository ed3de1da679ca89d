"""Computes, and can cache, the target's outputs from which a head learns: features, hidden states, best tokens."""

import hashlib
import inspect
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.logging import tqdm

from ..compat import output_layer, text_config
from ..data.batches import IGNORED, PreparedTexts, TokenBudgetBatches, collate
from ..data.image_texts import cast_for
from ..data.preparation import Example
from ..heads.identity import parameter_fingerprint
from ..verifying.forward import FeatureTap
from .losses import Teacher


_PICK_CHUNK = 512  # Number of positions whose full logits are in memory at once.
_SAME = 0.02  # Features count as equal up to this share of the largest feature, because of half precision.


@dataclass(frozen=True, slots=True)
class TargetFeatures:
    """Outputs of the target for a batch of texts."""

    features: Tensor  # [b, t, F]
    hidden: Tensor  # [b, t, target hidden] after the target's final norm: the input of its output head
    picks: Tensor  # [b, t] the target's most likely next token; 0 where `run` did not compute it


class FrozenTarget:
    """Runs the target from which a head learns, in evaluation mode and without gradients.

    The target is not part of the trained module. See `DraftHeadConfig` for `feature_layers` and `before_deepstack`.
    Raises `ValueError` if the model has no output head.
    """

    def __init__(self, model: PreTrainedModel, feature_layers: list[int], *, before_deepstack: bool = False) -> None:
        output = output_layer(model)
        if output is None:
            raise ValueError(
                f"{type(model).__name__} has no output head, but a draft head learns from the target's distribution. "
                "Load the target with AutoModelForCausalLM."
            )
        self._output = output
        self.model = model.eval().requires_grad_(False)
        self.feature_layers, self.before_deepstack = feature_layers, before_deepstack
        config = text_config(model)
        multiplied, divided = (getattr(config, name, None) or 1.0 for name in ("logit_scale", "logits_scaling"))
        self.scale = float(multiplied) / float(divided)
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._kept_logits = {"logits_to_keep": 1} if keeps_logits else {}
        self._is_known_causal = False  # whether a text with images has shown that attention is causal

    @torch.no_grad()
    def run(
        self, input_ids: Tensor, predicted: Tensor | None = None, image_inputs: dict[str, Tensor] | None = None
    ) -> TargetFeatures:
        """Run the target over right-padded texts `[b, t]`; attention is causal, so the padding needs no mask.

        The target's most likely next token is computed only at positions where `predicted` `[b, t]` is true. `None`
        computes it at all positions, and the run takes a fifth longer. See `collate` for `image_inputs`. Raises
        `ValueError` if attention to images is not causal.
        """
        if image_inputs and not self._is_known_causal:
            self._check_causal(input_ids, image_inputs)
        features, hidden = self._outputs(input_ids, image_inputs)
        return TargetFeatures(features, hidden, self._picks(hidden, predicted))

    def _outputs(self, input_ids: Tensor, image_inputs: dict[str, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Return the features `[b, t, F]`, and the decoder's output `[b, t, target hidden]` after its final norm."""
        decoder = self.model.get_decoder()
        tap = FeatureTap(self.model, self.feature_layers, before_deepstack=self.before_deepstack)
        with tap, tap.record() as features:
            if not image_inputs:
                hidden = decoder(input_ids=input_ids, use_cache=False).last_hidden_state
                return features.concatenated(), hidden
            outputs = list[Any]()  # not every model returns its decoder's output
            hook = decoder.register_forward_hook(lambda module, arguments, output: outputs.append(output))
            try:
                inputs = cast_for(self.model, image_inputs) | self._kept_logits
                mask = torch.ones_like(input_ids)  # without a mask, Qwen-Omni counts no positions of images
                self.model(input_ids=input_ids, attention_mask=mask, use_cache=False, **inputs)
            finally:
                hook.remove()
        return features.concatenated(), outputs[-1].last_hidden_state

    def _check_causal(self, input_ids: Tensor, image_inputs: dict[str, Tensor]) -> None:
        """Raise `ValueError` if features depend on later tokens, which do not exist yet when the head drafts."""
        other = input_ids.clone()
        other[:, -1] = (other[:, -1] == 0).long()
        before, after = (self._outputs(ids, image_inputs)[0][:, :-1].float() for ids in (input_ids, other))
        if not torch.allclose(before, after, rtol=_SAME, atol=_SAME * float(before.abs().max())):
            raise ValueError(
                f"{type(self.model).__name__} reads a whole text with images in both directions, but answers only "
                "forwards when it decodes, so a head would learn from other features than it meets. Train it on text "
                "alone."
            )
        self._is_known_causal = True

    def _picks(self, hidden: Tensor, predicted: Tensor | None) -> Tensor:
        """Return the likeliest next token after each position, `[b, t]`; 0 where the next token is not `predicted`."""
        wanted = hidden.new_ones(hidden.shape[:2], dtype=torch.bool)
        if predicted is not None:
            wanted = F.pad(predicted[:, 1:], (0, 1))  # a position predicts the next token
        rows = hidden[wanted].to(self._output.weight.dtype)
        best = [self._output(part).argmax(-1) for part in rows.split(_PICK_CHUNK)]  # scale and soft cap keep the order
        picks = hidden.new_zeros(hidden.shape[:2], dtype=torch.long)
        picks[wanted] = torch.cat(best)
        return picks

    def teacher(self, hidden: Tensor, token_ids: Tensor) -> Teacher:
        """Return the target's distributions over tokens `token_ids` `[d]`, from hidden states `[n, target hidden]`."""
        bias = getattr(self._output, "bias", None)
        bias = None if bias is None else bias[token_ids]
        return Teacher(hidden, self._output.weight[token_ids], self.scale, self.softcap, bias)


_BLOCK = 64  # Number of texts per file.
_DTYPE = torch.bfloat16  # Takes half as much disk as fp32, and is the dtype in which heads are saved.
_MAX_OPEN_FILES = 256
_TOKENS_PER_FORWARD = 4096  # Number of tokens in a batch of the target, padding included.


class CachedFeatures(PreparedTexts):
    """Prepared texts with the target's outputs (`TargetFeatures`) on disk, so that training does not run the target.

    Missing outputs are computed when the object is made. Each block of 64 texts has a safetensors file, named by a
    hash of the texts and the target. So only missing files are computed after a kill, or after texts were appended.
    """

    def __init__(
        self, rows: Any, folder: str | Path, target: FrozenTarget, collator: Callable[[Any], Any] = collate
    ) -> None:
        super().__init__(rows)
        self._folder, self._target, self._collate = Path(folder), target, collator
        self._folder.mkdir(parents=True, exist_ok=True)
        # Files for another target or dtype need other names
        model = f"{type(target.model).__name__} {target.model.dtype} {parameter_fingerprint(target.model)}"
        identity: dict[str, Any] = {"layers": target.feature_layers, "dtype": str(_DTYPE), "target": model}
        identity |= {"before_deepstack": True} if target.before_deepstack else {}
        self._identity = json.dumps(identity, sort_keys=True)
        starts = range(0, len(self), _BLOCK)
        self._paths = [self._folder / f"{self._key(self._block(start))}.safetensors" for start in starts]
        self._open: dict[Path, Any] = {}
        missing = [index for index, path in enumerate(self._paths) if not path.exists()]
        tokens = {index: sum(self.lengths[index * _BLOCK : (index + 1) * _BLOCK]) for index in missing}
        with tqdm(total=sum(tokens.values()), desc="Caching features", unit=" tokens", disable=not missing) as bar:
            for index, count in tokens.items():
                self._write(self._paths[index], self._block(index * _BLOCK))
                bar.update(count)

    def __getitem__(self, index: int) -> dict[str, Any]:
        block, row = divmod(index, _BLOCK)
        path = self._paths[block]
        if path not in self._open:
            if len(self._open) >= _MAX_OPEN_FILES:
                self._open.pop(next(iter(self._open)))
            try:
                self._open[path] = safe_open(path, framework="pt")  # type: ignore[no-untyped-call]  # untyped upstream
            except (OSError, SafetensorError) as error:
                raise ValueError(
                    f"The feature file {path} is gone or damaged ({error}). Delete it and start again: it is computed "
                    "anew."
                ) from error
        file = self._open[path]
        return super().__getitem__(index) | {
            name: file.get_tensor(f"{row}.{name}") for name in ("features", "hidden", "picks")
        }

    def _block(self, start: int) -> list[Example]:
        return [self.example(index) for index in range(start, min(start + _BLOCK, len(self)))]

    def _key(self, block: list[Example]) -> str:
        digest = hashlib.sha256(self._identity.encode())
        for example in block:
            digest.update(example.input_ids.numpy().tobytes() + b"|")
            digest.update(example.predicted.numpy().tobytes() + b"|")  # only predicted tokens have picks
            digest.update(b"" if example.pictures is None else example.pictures.key.encode())
        return digest.hexdigest()[:24]

    def _write(self, path: Path, block: list[Example]) -> None:
        tensors: dict[str, Tensor] = {}
        lengths = [len(example.input_ids) for example in block]
        for rows in TokenBudgetBatches(lengths, _TOKENS_PER_FORWARD, shuffle=False):
            batch = self._collate([block[row].tensors for row in rows])
            device = self._target.model.device
            predicted = (batch["labels"] != IGNORED).to(device)
            outputs = self._target.run(batch["input_ids"].to(device), predicted, batch.get("image_inputs"))
            for index, row in enumerate(rows):
                for name, dtype in (("features", _DTYPE), ("hidden", _DTYPE), ("picks", torch.int32)):
                    states = getattr(outputs, name)[index, : lengths[row]]
                    tensors[f"{row}.{name}"] = states.to("cpu", dtype).contiguous()
        partial = path.with_suffix(f".{os.getpid()}.partial")  # several processes write to the same folder
        try:
            save_file(tensors, partial)
            partial.replace(path)
        except (OSError, SafetensorError) as error:
            needed = sum(tensor.nbytes for tensor in tensors.values()) // max(sum(lengths), 1)
            raise OSError(
                f"Writing the target's features to {path} failed: {error} (they need about {needed} bytes per "
                f"token). Free disk space and run again to continue, set "
                "another `feature_cache_dir`, or leave it out to run the target on each batch."
            ) from error
        finally:
            partial.unlink(missing_ok=True)
