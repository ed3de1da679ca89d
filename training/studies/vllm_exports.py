"""Decode with a head's exports in vLLM and with the head itself here, and compare texts and steps.

Question: does vLLM read the heads that we export as they were trained?
Answer: vLLM 0.32.0 does: both layouts of four heads, 10 prompts of MT-Bench, 64 tokens. Texts are plain decoding's, in
exactly our steps (343 for SmolLM2's head, tau 1.66). SGLang needs a GPU, and was not run.

    python -m training.studies.vllm_exports TARGET model_cards/smollm2-135m-instruct-head --dataset prompts.jsonl \
        --vllm .venv/vllm/bin/python

Method: greedy chains in float32, where vLLM and we must pick the same tokens. A head that is read wrongly drafts other
tokens, and so needs other numbers of steps for the same text. Both layouts are written of the head as it is and of
copies that have what else vLLM reads: biases in attention, the normed output fed back, a fourth feature layer. vLLM
needs another Transformers than we do, so it has an environment of its own (`make vllm`). Nothing is timed.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.benchmarking.peers import Vllm
from transformers_resps import DraftHead, DraftHeadConfig, FixedPolicy, TreeShape
from transformers_resps.generation.output import sampling
from transformers_resps.tools.bench import BenchConfig, BenchModels
from transformers_resps.tools.cli import model, positive
from transformers_resps.tools.session import read_dialogues, spread

from .experiment import execute, report


DRAFTED = 3  # tokens of a chain


@dataclass(frozen=True, slots=True)
class Decoded:
    """The answer to one prompt, and how many steps verified drafts for it."""

    tokens: list[int]
    drafts: int


def variants(head: DraftHead) -> Iterator[tuple[str, DraftHead]]:
    """Yield the head as it is, and copies that have what else vLLM reads."""
    yield "as trained", head
    yield "attention_bias", changed(head, attention_bias=True)
    yield "feedback_post_norm", changed(head, feedback_post_norm=True)
    layers = head.config.feature_layers or []
    yield "a fourth layer", changed(head, feature_layers=[*layers, layers[-1] + 1])


def changed(head: DraftHead, **fields: Any) -> DraftHead:
    """Copy a head; what it had not got is a little random, so that it matters and the head still drafts."""
    torch.manual_seed(0)
    made = DraftHead(DraftHeadConfig.from_dict(head.config.to_dict() | fields)).to(head.dtype)
    state, old = made.state_dict(), head.state_dict()
    for name, tensor in state.items():
        kept = old.get(name)
        if name.endswith("bias"):
            tensor.normal_(std=0.5)
        elif kept is not None:
            tensor[..., : kept.shape[-1]] = kept  # `fc` may have become wider
    return made


def here(target: Any, head: DraftHead, prompts: list[Tensor], most: int) -> list[Decoded]:
    """Decode with a chain, as vLLM does."""
    found = []
    for prompt in prompts:
        out = target.generate(
            prompt[None],
            assistant_model=head,
            policy=FixedPolicy(TreeShape(DRAFTED + 1, DRAFTED, 1)),
            max_new_tokens=most,
            return_dict_in_generate=True,
            **sampling(0.0),
        )
        found.append(Decoded(out.sequences[0, len(prompt) :].tolist(), out.speculation.target_forwards - 1))
    return found


def there(python: Path, options: dict[str, Any], prompts: list[list[int]], most: int) -> tuple[str, list[Decoded]]:
    """VLLM's version, and what it decodes with these options of `vllm.LLM`.

    Raises:
        OSError: it failed; its own lines stand above.
    """
    with Vllm(python, options, threads=1) as vllm:
        sampling = {"temperature": 0, "max_tokens": most}
        told = [vllm.ask({"prompt": prompt, "sampling": sampling}) for prompt in prompts]
        return vllm.version, [Decoded(one["tokens"], one["drafts"]) for one in told]


def row(head: str, layout: str, plain: list[list[int]], ours: list[Decoded], theirs: list[Decoded]) -> dict[str, Any]:
    """What the table says of one export. A prefill is a forward that gives one token, as tau counts."""
    pairs = list(zip(ours, theirs, strict=True))

    def tau(answers: list[Decoded]) -> float:
        return sum(len(one.tokens) for one in answers) / sum(one.drafts + 1 for one in answers)

    return {
        "head": head,
        "layout": layout,
        "prompts": len(pairs),
        "same texts as plain": sum(other.tokens == text for (_, other), text in zip(pairs, plain, strict=True)),
        "same numbers of drafts": sum(one.drafts == other.drafts for one, other in pairs),
        "drafts here": sum(one.drafts for one, _ in pairs),
        "drafts in vLLM": sum(other.drafts for _, other in pairs),
        "tau here": tau(ours),
        "tau in vLLM": tau(theirs),
    }


def compare(args: argparse.Namespace) -> int:
    """Measure every variant in both layouts; 1 if vLLM decoded anything else than we did."""
    asked, most = str(args.dataset), args.max_new_tokens
    models = BenchModels.load(
        BenchConfig(args.target, args.head, [asked], policies=(), dtype=args.dtype, device=args.device)
    )
    prompts = [one.prompt(models.tokenizer).input_ids for one in spread(read_dialogues(asked), args.limit)]
    settings = {"max_new_tokens": most, "policy": "plain", **sampling(0.0)}
    plain = [models.target.generate(ids[None], **settings)[0, len(ids) :].tolist() for ids in prompts]
    options = {"model": str(args.target), "dtype": args.dtype, "max_model_len": 1024, "enforce_eager": True}
    drafts = {"method": "eagle3", "num_speculative_tokens": DRAFTED}
    rows, version = [], ""
    for name, head in variants(models.head):
        ours = here(models.target, head, prompts, most)
        for layout in ("speculators", "specforge"):
            with tempfile.TemporaryDirectory() as folder:
                head.save_pretrained(folder, format=layout)
                chosen = options | {"speculative_config": drafts | {"model": folder}}
                version, theirs = there(args.vllm, chosen, [ids.tolist() for ids in prompts], most)
            rows.append(row(name, layout, plain, ours, theirs))
    report(args, models.target, rows, [], vllm=version)
    same = ("same texts as plain", "same numbers of drafts")
    return int(any(found[name] != found["prompts"] for found in rows for name in same))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=model, help="folder of the target")
    parser.add_argument("head", type=model, help="folder or Hub id of a draft head for the target")
    parser.add_argument("--dataset", type=Path, required=True, help=".jsonl with turns, messages or prompt")
    parser.add_argument("--vllm", type=Path, required=True, help="the Python of an environment with vLLM")
    parser.add_argument("--limit", type=positive, default=10, help="prompts, spread evenly over the file")
    parser.add_argument("--max-new-tokens", type=positive, default=64)
    parser.add_argument("--output", type=Path, default=Path("results/vllm"), help="folder for results.json")
    parser.set_defaults(dtype="float32", device="cpu")
    return execute(parser, arguments, compare)


if __name__ == "__main__":
    sys.exit(main())
