"""What vLLM answers, run by vLLM's own Python: it needs another Transformers than we do.

    .venv/vllm/bin/python training/benchmarking/vllm_side.py

Each line is a JSON object. The first one that comes holds the arguments of `vllm.LLM`, whose `version` goes back when
it is loaded. Each other one holds a `prompt` of token ids and the arguments of `SamplingParams` as `sampling`; its
answer has `tokens`, `drafts` (steps that verified some), `forwards`, and `first_seconds` until the first token.
"""

import json
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any


def answered(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Yield what goes back for each line."""
    import vllm

    told = iter(lines)
    engine = vllm.LLM(
        **json.loads(next(told)),
        max_num_seqs=1,
        enable_prefix_caching=False,  # each answer reads its prompt
        disable_log_stats=False,
        generation_config="vllm",
    )
    yield {"version": vllm.__version__}

    def counts() -> tuple[int, int]:
        found = {one.name: one for one in engine.get_metrics()}
        drafts = found.get("vllm:spec_decode_num_drafts")
        return int(drafts.value) if drafts else 0, int(found["vllm:iteration_tokens_total"].count)

    for line in told:
        asked, before = json.loads(line), counts()
        sampling = vllm.SamplingParams(**asked["sampling"])
        (out,) = engine.generate([{"prompt_token_ids": asked["prompt"]}], sampling, use_tqdm=False)
        drafts, forwards = (now - then for now, then in zip(counts(), before, strict=True))
        first = out.metrics.first_token_latency
        tokens = list(out.outputs[0].token_ids)
        yield {"tokens": tokens, "drafts": drafts, "forwards": forwards, "first_seconds": first}


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # vLLM writes lines of its own
    for answer in answered(sys.stdin):
        print(json.dumps(answer), file=answers)
