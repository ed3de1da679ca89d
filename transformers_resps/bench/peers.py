"""Lets other libraries decode the same target with their own loops; each is imported when it is asked for.

They draft with the draft model where there is one, and otherwise with what followed earlier in the text; OpenVINO
always with the text. None takes processors or streamers.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .methods import Answer, AnswerFn
from .openvino import openvino


MODULES = {"flashspec": "flashspec", "economize": "economize", "openvino": "openvino_genai"}
PEERS = tuple(MODULES)  # what `--peers` takes
_DRAFTED_TOKENS = 4  # of a step, the default of both libraries


def load_peers(names: Sequence[str], target: Any, draft_model: PreTrainedModel | None) -> dict[str, AnswerFn]:
    """Return name in the table -> how it answers.

    Args:
        names: of `PEERS`.
        target: which all of them share.
        draft_model: that they draft with; without one they look up.

    Raises:
        ImportError: one is not installed; see `check_installed`.
        ValueError: one cannot decode this target.
    """
    how = "lookup" if draft_model is None else "draft model"
    found: dict[str, AnswerFn] = {}
    for name in names:
        found |= openvino(target) if name == "openvino" else {f"{name} ({how})": _LOADERS[name](target, draft_model)}
    return found


def check_installed(names: Sequence[str]) -> None:
    """Raises ValueError naming those of `names` that cannot be imported."""
    missing = [MODULES[name] for name in names if find_spec(MODULES[name]) is None]
    if missing:
        raise ValueError(
            f"--peers needs {' and '.join(missing)}, not installed here. Run `pip install "
            "'transformers-resps[peers]'`, or leave it out of --peers."
        )


def peer_versions(names: Sequence[str]) -> dict[str, str]:
    """Return the versions of the libraries that are compared."""
    return {name: version(MODULES[name]) for name in names}


def _flashspec(target: Any, draft_model: PreTrainedModel | None) -> AnswerFn:
    """Verify chains drafted by a model, or by the last match (flashspec's `composite-g6-f2` with both)."""
    from flashspec import FlashSpecConfig, SamplingConfig, SpeculativeEngine
    from flashspec.engine.hf_drafter import HuggingFaceDrafter
    from flashspec.engine.ngram import NgramDrafter
    from flashspec.engine.verifier import TargetModel

    verifier = TargetModel(str(target.name_or_path), target.device, target.dtype, target)

    @cache  # an engine on a GPU captures graphs at its first answer
    def engine(temperature: float) -> Any:
        drafter: Any = NgramDrafter()
        if draft_model is not None:
            name = str(draft_model.name_or_path)
            drafter = HuggingFaceDrafter(name, target.device, target.dtype, temperature, draft_model)
        config = FlashSpecConfig(
            device=str(target.device),
            dtype=str(target.dtype).removeprefix("torch."),
            sampling=SamplingConfig(gamma=_DRAFTED_TOKENS, temperature=temperature),
        )
        return SpeculativeEngine(config, [drafter], verifier)

    def answer(input_ids: Tensor, max_new_tokens: int, temperature: float, end_ids: Sequence[int]) -> Answer:
        return Answer(engine(temperature).generate(input_ids, max_new_tokens, list(end_ids)).output_ids[0].tolist())

    return answer


def _economize(target: Any, draft_model: PreTrainedModel | None) -> AnswerFn:
    """Call its `decode`: its `generate` fails since Transformers 5.24 renamed `past_key_values`.

    Raises:
        ValueError: it cannot decode this target.
    """
    from economize import DecodeConfig, EconomizeError, TopPSampler, apply
    from economize.techniques.draft_model import DraftModelConfig
    from economize.techniques.lookup import LookupConfig

    technique: Any = LookupConfig() if draft_model is None else DraftModelConfig(model=str(draft_model.name_or_path))
    try:
        model = apply(target, technique)
    except EconomizeError as error:
        raise ValueError(
            f"economize cannot decode {type(target).__name__} ({error}). Leave it out of --peers."
        ) from error

    def answer(input_ids: Tensor, max_new_tokens: int, temperature: float, end_ids: Sequence[int]) -> Answer:
        seed = int(torch.randint(2**31, ()))  # of the seed that the bench has set
        selector = TopPSampler(temperature, seed=seed) if temperature else None
        decoding = DecodeConfig(_DRAFTED_TOKENS, verifier="rejection" if temperature else None)
        found = model.decode(input_ids, max_new_tokens, decoding=decoding, selector=selector, stop=list(end_ids))
        return Answer(found.tokens.tolist())

    return answer


_LOADERS: Mapping[str, Callable[[Any, PreTrainedModel | None], AnswerFn]] = {
    "flashspec": _flashspec,
    "economize": _economize,
}
