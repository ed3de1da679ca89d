"""Part of the study `vllm_exports`: what vLLM decodes with one exported head, run by vLLM's own Python.

    .venv/vllm/bin/python training/studies/vllm_side.py JOB ANSWER

JOB is a JSON object: `target` and `head` (folders), `dtype`, `drafted` tokens a step, `max_new_tokens`, and `prompts`
as lists of token ids. ANSWER gets vLLM's `version` and, of each prompt, `tokens` and the number of `drafts`.
"""

import json
import sys
from pathlib import Path
from typing import Any


def decoded(job: dict[str, Any]) -> dict[str, Any]:
    """Greedy answers, one prompt at a time, each with the steps that verified drafts."""
    import vllm

    head = {"method": "eagle3", "model": job["head"], "num_speculative_tokens": job["drafted"]}
    engine = vllm.LLM(
        job["target"],
        dtype=job["dtype"],
        speculative_config=head,
        enforce_eager=True,
        max_model_len=1024,
        max_num_seqs=1,
        gpu_memory_utilization=0.1,  # on a processor: the share of the memory that it takes at once
        enable_prefix_caching=False,
        disable_log_stats=False,
        generation_config="vllm",
    )

    def drafts() -> int:
        return sum(int(one.value) for one in engine.get_metrics() if one.name == "vllm:spec_decode_num_drafts")

    rows = []
    for prompt in job["prompts"]:
        before = drafts()
        sampling = vllm.SamplingParams(temperature=0, max_tokens=job["max_new_tokens"])
        (out,) = engine.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
        rows.append({"tokens": list(out.outputs[0].token_ids), "drafts": drafts() - before})
    return {"version": vllm.__version__, "rows": rows}


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(decoded(json.loads(Path(sys.argv[1]).read_text()))))
