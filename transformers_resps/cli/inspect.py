"""`resps inspect`: shows one output as an HTML page, step by step."""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils.logging import tqdm

from ..bench.models import load_target
from ..bench.options import model, positive, temperature
from ..bench.policies import read_policy
from ..data import to_tokens
from ..generation.attach import attach
from ..heads import DraftHead
from ..inspection import Examination, examine, facts_of, page, page_data
from ..policies import default_policy
from ..telemetry.display import decoder, moving
from .options import add_target_options


def add_command(commands: Any) -> None:
    """Add `resps inspect TARGET [HEAD] --prompt TEXT --output FILE.html`."""
    parser = commands.add_parser("inspect", help="write one output as an HTML page: trees, decisions, times")
    parser.set_defaults(run=inspect)
    add_target_options(parser)
    parser.add_argument("head", type=model, nargs="?", help="folder or Hub id of a draft head for the target")
    parser.add_argument("--prompt", required=True, help="the user's message to the target")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE.html", help="the HTML page to write")
    parser.add_argument(
        "--policy",
        help="auto, total_tokens,depth,top_k[,lookup], or a policy's folder or Hub id; default: the head's tree",
    )
    parser.add_argument("--max-new-tokens", type=positive, default=128)
    parser.add_argument("--temperature", type=temperature, default=0.0, help="default: 0, which is greedy")
    parser.add_argument("--seed", type=int, default=0, help="random seed of both outputs, if tokens are sampled")


def inspect(args: argparse.Namespace) -> int:
    """Write the page; 1 when both outputs differ and rounding cannot be the reason."""
    if not args.prompt.strip():
        raise ValueError("`--prompt` is empty. Pass a question in quotes.")
    args.output.parent.mkdir(parents=True, exist_ok=True)  # or fail here, not after minutes
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    target = attach(load_target(args.target, args.dtype, args.device))
    head = DraftHead.from_pretrained(args.head, target=target) if args.head else None
    named = read_policy(args.policy, head)
    policy = default_policy(target.device) if isinstance(named, str) else named
    prompt_ids = to_tokens([{"role": "user", "content": args.prompt}], tokenizer)
    warm_up(target, head, prompt_ids)
    both = 2 * args.max_new_tokens  # plain, then with drafts, which takes fewer steps
    bar = tqdm(desc="Answering twice", total=both, unit="token", disable=None)
    with bar, moving(bar, target, both, both):
        found = examine(target, head, policy, prompt_ids, settings=settings_of(args), seed=args.seed)
    decoding = f"temperature {args.temperature:g}, seed {args.seed}" if args.temperature > 0 else "greedy"
    facts = facts_of(target, head, policy, decoding)
    args.output.write_text(page(page_data(found, decoder(tokenizer), args.prompt, facts)), encoding="utf-8")
    print(f"{found.report}\nSame text as plain decoding: {same_text(found)}.\nThe page: {args.output}")
    return 0 if is_explained(found, target.dtype) else 1


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return keywords of `generate` for both answers."""
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature > 0 else {"do_sample": False}
    return {"max_new_tokens": args.max_new_tokens, **sampling}


def warm_up(target: PreTrainedModel, head: DraftHead | None, prompt_ids: Tensor) -> None:
    """Allocate and compile before the timed calls; the policy stays as it is."""
    for assistant in (None, head) if head is not None else (None,):
        call: Any = target
        ids = prompt_ids[None].to(target.device)
        call.generate(
            ids, attention_mask=torch.ones_like(ids), assistant_model=assistant, max_new_tokens=4, do_sample=False
        )


def same_text(found: Examination) -> str:
    """Say yes, or where the texts differ first."""
    if found.parts_at is None:
        return "yes"
    why = f" ({found.divergence})" if found.divergence is not None else ""
    return f"no, they differ from token {found.parts_at + 1}{why}"


def is_explained(found: Examination, dtype: torch.dtype) -> bool:
    """Tell whether texts are equal or may be rounded apart; of sampled texts in half precision no more can be said."""
    if found.parts_at is None:
        return True
    return found.divergence.explained if found.divergence is not None else dtype in (torch.bfloat16, torch.float16)
