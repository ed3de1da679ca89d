"""`resps compile`: compile a target's steps and its heads' drafting, and store the code for later processes."""

import argparse

import torch
from transformers import AutoTokenizer

from ..compilation.packages import FOLDER_VARIABLE, packages_folder
from ..generation.attach import attach
from ..policies.fixed import FixedPolicy
from ..tree import TreeShape
from .loading import load_source, load_target


_TEXT = "The quick brown fox jumps over the lazy dog, and the dog sleeps on in the warm sun."
_TREE = TreeShape(6, 3, 2, lookup=2)
_NEW_TOKENS = 16


def run(args: argparse.Namespace) -> int:
    """Decode a few tokens with compiled steps, so that their code is stored; raise `ValueError` if it is not."""
    folder = packages_folder()
    if folder is None:
        raise ValueError(f"{FOLDER_VARIABLE} is off, so no code is kept. Unset it, or name a folder.")
    if args.threads:
        torch.set_num_threads(args.threads)
    options = {"packed": args.pack, "quantization": args.quantization}
    target = attach(load_target(args.target, args.dtype, "cpu", **options))
    engine = target.speculation_state.slot_engine
    with engine.borrow(target) as lent:
        if args.only_as and lent.packages.identity != args.only_as:
            raise ValueError("The model differs from its checkpoint. Pass `compile=True` to wait for the code.")
    tokens = AutoTokenizer.from_pretrained(args.target)(_TEXT, return_tensors="pt").input_ids.repeat(args.rows, 1)
    length = {"max_new_tokens": _NEW_TOKENS, "min_new_tokens": _NEW_TOKENS}
    prompt = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    for head in (None, *args.heads):
        source = load_source(head, target)
        policy = FixedPolicy(TreeShape(1, 0, 1, lookup=4) if source is None else _TREE)
        target.generate(**prompt, assistant_model=source, policy=policy, compile=True, do_sample=False, **length)
    if not engine.is_stored(target, is_batch=args.rows > 1):
        full = f"Its code cannot be kept in {folder}. Name another folder in {FOLDER_VARIABLE}."
        raise ValueError(engine.obstacle or full)
    print(f"The code lies in {folder}.")
    return 0
