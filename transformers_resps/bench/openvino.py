"""Lets OpenVINO GenAI decode the same target, plainly and with its prompt lookup.

It reads the target in a format of its own, which another package converts to.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .methods import Answer, AnswerFn


CONVERTED = "-openvino"  # after the name of the target's folder
_PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
_DRAFTED_TOKENS, _LONGEST_MATCH = 10, 3  # as in its documentation; Transformers' prompt lookup drafts ten, too
_MICROSECOND = 1e-6


def openvino(target: Any) -> dict[str, AnswerFn]:
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
        "OpenVINO (plain)": _answering(folder, target.dtype),
        "OpenVINO (prompt lookup)": _answering(folder, target.dtype, prompt_lookup=True),
    }


def _answering(folder: Path, dtype: torch.dtype, **options: Any) -> AnswerFn:
    import openvino
    from openvino_genai import GenerationConfig, LLMPipeline

    precision = _PRECISIONS[dtype]
    options |= {"INFERENCE_PRECISION_HINT": precision, "KV_CACHE_PRECISION": precision}
    pipeline = LLMPipeline(str(folder), "CPU", INFERENCE_NUM_THREADS=torch.get_num_threads(), **options)

    def answer(input_ids: Tensor, max_new_tokens: int, temperature: float, end_ids: Sequence[int]) -> Answer:
        settings = GenerationConfig()
        settings.max_new_tokens, settings.stop_token_ids = max_new_tokens, set(end_ids)
        settings.do_sample = temperature > 0
        if temperature:
            settings.temperature, settings.rng_seed = temperature, int(torch.randint(2**31, ()))  # of the bench's seed
        if "prompt_lookup" in options:
            settings.num_assistant_tokens, settings.max_ngram_size = _DRAFTED_TOKENS, _LONGEST_MATCH
        found = pipeline.generate(openvino.Tensor(input_ids.numpy()), settings)
        told = found.perf_metrics.raw_metrics
        prefill = _MICROSECOND * told.m_times_to_first_token[0]
        return Answer(found.tokens[0], target_forwards=len(told.token_infer_durations), prefill_seconds=prefill)

    return answer
