r"""Answer prompts with a target and record what its drafters would have proposed, once for all studies.

    python -m training.prompts.recordings --target work/smollm2 --head model_cards/smollm2-135m-instruct-head \
        --evaluate eval/mt_bench.jsonl eval/gsm8k.jsonl --fit sharegpt.json gsm8k_train.jsonl --output work/recordings

Resumable: a recording that is there is not made again. Records of evaluation prompts lie in `evaluate/`, of those that
may be fitted to in `fit/`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoTokenizer

from transformers_resps import AutoDraftHead, BlockHead, DraftHead, attach
from transformers_resps.data import load_conversations, to_tokens
from transformers_resps.generation.output import sampling
from transformers_resps.heads import parameter_fingerprint
from transformers_resps.replay import RecordedText
from transformers_resps.tools.loading import load_target
from transformers_resps.trainers.data import Recorder


DEPTHS = {1: 6, 2: 6, 4: 6}  # top_k -> levels: what the shapes of the studies ask for
BLOCKS = {1: 1, 10: 1}  # likewise of block heads, whose blocks are drafted whole
TEMPERATURES = (0.0, 1.0)


def read_prompts(source: str, tokenizer: Any, limit: int, max_tokens: int) -> list[Tensor]:
    """The first user turns of a dataset, as `[s]` each, the first `limit` that are short enough."""
    prompts: dict[tuple[int, ...], Tensor] = {}
    for conversation in load_conversations(source):
        asked = next((message for message in conversation if message["role"] == "user"), None)
        if asked is None:
            continue
        tokens = to_tokens([asked], tokenizer)
        if len(tokens) <= max_tokens:
            prompts.setdefault(tuple(tokens.tolist()), tokens)
        if len(prompts) == limit:
            break
    return list(prompts.values())


def record(
    target: Any,
    head: DraftHead | BlockHead,
    prompts: list[Tensor],
    temperature: float,
    folder: Path,
    max_new_tokens: int,
) -> None:
    """One file per prompt with an answer of at least two tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    depths = BLOCKS if isinstance(head, BlockHead) else DEPTHS
    made_with = json.dumps([head.fingerprint(), max_new_tokens, list(depths.items()), str(target.dtype)])
    check_folder(folder, parameter_fingerprint(target), made_with)
    generation = {"max_new_tokens": max_new_tokens, **sampling(temperature)}
    Recorder(target, head, RecordedText, depths, folder, generation).record(prompts, folder.name)


def check_folder(folder: Path, target: str, made_with: str) -> None:
    """Check that a folder holds recordings of the same kind only: a study reads all of them.

    Raises:
        ValueError: those in it are of another target or head, or were made otherwise.
    """
    file = folder / "made_with.json"
    facts = json.dumps({"target": target, "made_with": made_with})
    if file.is_file() and file.read_text(encoding="utf-8") != facts:
        raise ValueError(
            f"{folder} holds recordings of another target or head, or of other lengths ({file}), but a study reads "
            "all of a folder. Pass another --output, or delete that folder."
        )
    file.write_text(facts, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", required=True)
    parser.add_argument("--head", required=True)
    parser.add_argument("--evaluate", nargs="+", default=[], help="files of prompts to score on, one per benchmark")
    parser.add_argument("--fit", nargs="+", default=[], help="files of prompts to fit and to search on")
    parser.add_argument("--limit", type=int, default=4, help="prompts of each file to score on")
    parser.add_argument("--fit-limit", type=int, default=20, help="prompts of each file to fit on")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--max-prompt-tokens", type=int, default=1024)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", type=Path, default=Path("work/recordings"))
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    target: Any = attach(load_target(args.target, args.dtype, "cpu"))
    head: Any = AutoDraftHead.from_pretrained(args.head, target)
    jobs = [("fit", source, args.fit_limit) for source in args.fit]
    jobs += [("evaluate", source, args.limit) for source in args.evaluate]
    for temperature in TEMPERATURES:
        for kind, source, limit in jobs:
            prompts = read_prompts(source, tokenizer, limit, args.max_prompt_tokens)
            folder = args.output / kind / f"{temperature:g}" / Path(source).stem
            record(target, head, prompts, temperature, folder, args.max_new_tokens)
            print(f"{folder}: {len(prompts)} prompts", flush=True)


if __name__ == "__main__":
    main()
