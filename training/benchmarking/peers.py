"""Other libraries that decode the same target with their own loops; each is imported when it is asked for.

flashspec and economize draft with the draft model where there is one, and otherwise with what followed earlier in the
text. OpenVINO GenAI decodes plainly and with its prompt lookup; it reads a copy of the target that another package
converts. None of them takes processors or streamers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from transformers_resps.tools.methods import Answer, Method


MODULES = {"flashspec": "flashspec", "economize": "economize", "openvino": "openvino_genai"}
PEERS = tuple(MODULES)  # what `--peers` takes
CONVERTED = "-openvino"  # after the name of the target's folder
_DRAFTED_TOKENS = 4  # of a step, the default of flashspec and economize
_OPENVINO_TOKENS, _OPENVINO_MATCH = 10, 3  # as in its documentation; Transformers' prompt lookup drafts ten, too
_PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
_MICROSECOND = 1e-6

# Prompt `[1, s]`, most new tokens, temperature, end tokens -> the answer.
AnswerFn = Callable[[Tensor, int, float, Sequence[int]], Answer]


@dataclass(frozen=True)
class Peer(Method):
    """Another library; to use it a user must leave `generate`.

    Attributes:
        answer: with its own loop.
    """

    answer: AnswerFn

    def prepare(
        self, target: Any, input_ids: Tensor, max_new_tokens: int, temperature: float, ends: Sequence[int]
    ) -> Callable[[], Answer]:
        return lambda: self.answer(input_ids, max_new_tokens, temperature, ends)


def load_peers(names: Sequence[str], target: Any, draft_model: PreTrainedModel | None) -> list[Peer]:
    """Return the methods of other libraries.

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
        if name == "openvino":
            found |= _openvino(target)
        else:
            load = {"flashspec": _flashspec, "economize": _economize}[name]
            found[f"{name} ({how})"] = load(target, draft_model)
    return [Peer(name, answer, effort=6, seed_exact=False) for name, answer in found.items()]


def check_installed(names: Sequence[str]) -> None:
    """Raises ValueError naming those of `names` that cannot be imported."""
    missing = [MODULES[name] for name in names if find_spec(MODULES[name]) is None]
    if missing:
        raise ValueError(
            f"--peers needs {' and '.join(missing)}, not installed here. Run `pip install '.[peers]'`, or leave it "
            "out of --peers."
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

    def answer(input_ids: Tensor, max_new_tokens: int, temperature: float, ends: Sequence[int]) -> Answer:
        return Answer(engine(temperature).generate(input_ids, max_new_tokens, list(ends)).output_ids[0].tolist())

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

    def answer(input_ids: Tensor, max_new_tokens: int, temperature: float, ends: Sequence[int]) -> Answer:
        seed = int(torch.randint(2**31, ()))  # of the seed that the bench has set
        selector = TopPSampler(temperature, seed=seed) if temperature else None
        decoding = DecodeConfig(_DRAFTED_TOKENS, verifier="rejection" if temperature else None)
        found = model.decode(input_ids, max_new_tokens, decoding=decoding, selector=selector, stop=list(ends))
        return Answer(found.tokens.tolist())

    return answer


def _openvino(target: Any) -> dict[str, AnswerFn]:
    """Return name in the table -> how it answers, in the target's precision, keys and values too.

    Raises:
        ValueError: the target is not converted, or not on a CPU.
    """
    folder = Path(f"{str(target.name_or_path).rstrip('/')}{CONVERTED}")
    if not folder.is_dir():
        raise ValueError(
            f"`--peers openvino` needs the converted target in {folder}, which is no folder. Where optimum-intel is "
            f"installed, run `optimum-cli export openvino --model {target.name_or_path} --task "
            f"text-generation-with-past --weight-format fp16 {folder}`."
        )
    if target.device.type != "cpu" or target.dtype not in _PRECISIONS:
        raise ValueError(
            f"`--peers openvino` is measured on a CPU in float32, bfloat16 or float16, but the target is on "
            f"{target.device} in {target.dtype}. Pass `--device cpu` and such a `--dtype`."
        )
    return {
        "OpenVINO (plain)": _openvino_pipeline(folder, target.dtype),
        "OpenVINO (prompt lookup)": _openvino_pipeline(folder, target.dtype, prompt_lookup=True),
    }


def _openvino_pipeline(folder: Path, dtype: torch.dtype, **options: Any) -> AnswerFn:
    import openvino
    from openvino_genai import GenerationConfig, LLMPipeline, SchedulerConfig

    precision = _PRECISIONS[dtype]
    scheduler = SchedulerConfig()
    scheduler.enable_prefix_caching = False  # no other method keeps what an earlier call has read
    options |= {"INFERENCE_PRECISION_HINT": precision, "KV_CACHE_PRECISION": precision, "scheduler_config": scheduler}
    pipeline = LLMPipeline(str(folder), "CPU", INFERENCE_NUM_THREADS=torch.get_num_threads(), **options)

    def answer(input_ids: Tensor, max_new_tokens: int, temperature: float, ends: Sequence[int]) -> Answer:
        settings = GenerationConfig()
        settings.max_new_tokens, settings.stop_token_ids = max_new_tokens, set(ends)
        settings.do_sample = temperature > 0
        if temperature:
            settings.temperature, settings.rng_seed = temperature, int(torch.randint(2**31, ()))  # of the bench's seed
        if "prompt_lookup" in options:
            settings.num_assistant_tokens, settings.max_ngram_size = _OPENVINO_TOKENS, _OPENVINO_MATCH
        found = pipeline.generate(openvino.Tensor(input_ids.numpy()), settings)
        told = found.perf_metrics.raw_metrics
        prefill = _MICROSECOND * told.m_times_to_first_token[0]
        return Answer(found.tokens[0], target_forwards=len(told.token_infer_durations), prefill_seconds=prefill)

    return answer
