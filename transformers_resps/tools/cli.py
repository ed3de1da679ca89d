"""The command `resps`: parses its arguments, then calls `run` of the module named like the subcommand.

This module must not import PyTorch, which takes seconds, so that help and errors appear at once.
"""

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import quiet


if TYPE_CHECKING:
    from ..tree import TreeShape


HEAD = "draft head, small model or assistant for the target, by folder or Hub id; or mtp, for the target's MTP layers"
PROMPT_LOOKUP, EAGLE = "prompt-lookup", "eagle"
BENCH_METHODS = {PROMPT_LOOKUP: "Transformers' prompt lookup", EAGLE: "EAGLE-3's published trees"}
_DATASET = ".json, .jsonl or Hub id of conversations"
DTYPES = ("auto", "float64", "float32", "bfloat16", "float16")
COMPILE: dict[str, bool | str | None] = {"auto": "auto", "always": True, "never": None}  # as `attach` takes them
QUANTIZATIONS = ("int8", "int4", "nf4")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand and return the exit status: 0, 1 if it found a fault, 2 if it failed, 130 after Ctrl-C."""
    args = make_parser().parse_args(arguments)
    try:
        if args.command == "bench":  # measure the load now: later it would include this process loading PyTorch
            args.load = quiet.checked_load("accept_noise" in args)
        if "torch" not in sys.modules:
            print(f"resps {args.command}: loading PyTorch and Transformers ...", file=sys.stderr, flush=True)
        return int(import_module(f".{args.command}", __package__).run(args))
    except (ValueError, OSError) as error:
        print(f"resps {args.command}: {in_flags(str(error), args)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"resps {args.command}: {f'stopped {interrupt}'.rstrip()}.", file=sys.stderr)
        return 130


_FLAGS = (  # option of a command, words in the library's error messages, words that replace them
    ("invariant", "pass `invariant=False`", "leave out `--invariant`"),
    ("invariant", "leave out `invariant=True`", "leave out `--invariant`"),
    ("invariant", "`invariant=True`", "`--invariant`"),
    ("compile", "Call `generate` with `compile=False`", "Leave out `--compile`"),
    ("compile", "Leave out `compile`", "Leave out `--compile`"),
    ("compile", "`compile=True`", "`--compile`"),
    ("dtype", "Load the model in float32", "Pass `--dtype float32`"),
    ("pack", "Call `prepack(model)`", "Pass `--pack`"),
)


def in_flags(message: str, args: argparse.Namespace) -> str:
    """Rewrite an error message for the command line: Python arguments like `compile=True` become `--compile`."""
    for option, words, flag in _FLAGS:
        message = message.replace(words, flag) if option in args else message
    return message


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of all subcommands."""
    parser = argparse.ArgumentParser("resps", description="Lossless draft trees for Transformers.")
    parser.add_argument("--version", action="version", version=f"transformers-resps {version('transformers-resps')}")
    commands = parser.add_subparsers(dest="command", required=True)
    adding: dict[str, tuple[Callable[[argparse.ArgumentParser], None], str]] = {
        "doctor": (_add_doctor, "check that a head or MTP layers are read with the settings they were trained with"),
        "inspect": (_add_inspect, "write one output as an HTML page: trees, decisions, times"),
        "calibrate": (_add_calibrate, "measure what steps cost on this machine, and whether drafting can pay"),
        "verify": (_add_verify, "check that the output with a draft head is the model's own; prints a report"),
        "bench": (_add_bench, "policies, trees and plain decoding in turn, and which of them to use"),
        "serve": (_add_serve, "answer requests of OpenAI's API, one at a time"),
        "compile": (_add_compile, "compile a target's steps on a CPU, for later processes"),
        "cache": (_add_cache, "show the compiled code that is kept for later processes"),
    }
    for name, (add_options, told) in adding.items():
        add_options(commands.add_parser(name, help=told))
    return parser


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    add = _shared(parser, "target", "--dtype", "--quantization", "--device", "--split", "--json")
    add("--dataset", type=dataset, help=f"{_DATASET}; without assistant turns the target writes the answers")
    read = "folder or Hub id of a draft head or MTP layers for the target, in any published format; mtp for its own"
    add("head", type=model, help=read)
    add("--answers", type=positive, default=50, help="number of answers to check (default: 50)")
    checked = "tokens to check per answer; a wrong RoPE base shows on long answers only (default: 48, thorough: 256)"
    add("--max-new-tokens", type=positive, help=checked)
    add("--thorough", action="store_true", help="read all answers, however long it takes; default: about a minute")
    longest = "tokens per conversation; longer ones are cut (default: 320)"
    add("--max-length", type=positive, default=320, help=longest)
    add("--revision", help="of the head")
    settings = 'read the head with these settings, for example rope_theta=1e4 feature_layers=[2,16,29] or fed="before"'
    add("--set", nargs="+", default=[], metavar="FIELD=VALUE", help=settings)


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    add = _shared(parser, "target", "head", "--dtype", "--quantization", "--device")
    add("--prompt", required=True, help="the user's message to the target")
    add("--output", required=True, type=Path, metavar="FILE.html", help="the HTML page to write")
    named = "auto, total_tokens,depth,top_k[,lookup], or a policy's folder or Hub id; default: the head's tree"
    add("--policy", help=named)
    add("--max-new-tokens", type=positive, default=128)
    add("--temperature", type=temperature, default=0.0, help="default: 0, which is greedy")
    add("--seed", type=int, default=0, help="random seed of both outputs, if tokens are sampled")
    _add_invariant(add, "decode, plainly and with drafts,")


def _add_calibrate(parser: argparse.ArgumentParser) -> None:
    add = _shared(parser, "target", "head", "--dtype", "--quantization", "--device", "--pack", "--json")
    _add_invariant(add, "measure steps")
    add("--refresh", action="store_true", help="measure again even if a table is stored")


def _add_verify(parser: argparse.ArgumentParser) -> None:
    loading = ("--dtype", "--quantization", "--device", "--pack", "--revision")
    add = _shared(parser, "target", "head", *loading, "--split", "--json")
    add("--dataset", type=dataset, help=f"{_DATASET}; its first user turns are the prompts")
    named = "folder or Hub id of a policy, 'auto', or total_tokens,depth,top_k[,lookup]; default: the head's tree"
    add("policy", nargs="?", help=named)
    add("--prompts", type=positive, help="number of prompts (default: 4, quick: 2)")
    add("--seeds", type=positive, help="sampled outputs per sampling setting (default: 4, quick: 1)")
    add("--max-new-tokens", type=positive, help="length of each compared output (default: 32, quick: 16)")
    add("--quick", action="store_true", help="make a third of the calls, of half the length")
    _add_invariant(add, "compare")


def _add_bench(parser: argparse.ArgumentParser) -> None:
    add_bench_options(parser, BENCH_METHODS)
    parser.add_argument("--json", action="store_true", help="print what results.json holds, instead of the table")
    drawn = "also draw the ratios with their intervals, in ratios.svg beside the table"
    parser.add_argument("--plot", action="store_true", help=drawn)


def add_bench_options(parser: argparse.ArgumentParser, choices: Mapping[str, str]) -> None:
    """Add an option for each field of `BenchConfig`; `choices` are the methods that `--methods` accepts."""
    parser.argument_default = argparse.SUPPRESS  # leave out options that are not given: the config has the defaults
    parser.set_defaults(head=None)
    add = _shared(parser, "target", "head", "--revision")
    add("--output", type=Path, help="folder for the results; default: results/bench")

    add = parser.add_argument_group("methods to compare (plain decoding is always included)").add_argument
    add("--policy", nargs="+", dest="policies", metavar="POLICY", help="'auto', folders or Hub ids; default: auto")
    named = f"besides the policies: {', '.join(choices.values())}; default: all"
    add("--methods", nargs="*", choices=tuple(choices), help=named)
    add("--shapes", nargs="+", type=shape, help="also these fixed trees: total_tokens,depth,top_k[,lookup]")
    add("--draft-model", metavar="ID", help="also Transformers' assisted generation with this model")

    add = parser.add_argument_group("prompts").add_argument
    layouts = ".jsonl or .json with turns, messages or prompt, or a Hub id; all user turns are answered"
    add("--dataset", type=dataset, nargs="+", required=True, dest="datasets", metavar="FILE_OR_ID", help=layouts)
    add("--split", help="of datasets from the Hub; default: test")
    add("--limit", type=positive, help="prompts per dataset, spread evenly over it; default: 10")

    add = _shared(parser.add_argument_group("conditions"), "--dtype", "--quantization", "--device")
    greedy = "0 (the default) is greedy"
    add("--temperature", nargs="+", type=temperature, dest="temperatures", metavar="T", help=greedy)
    add("--max-new-tokens", type=positive, help="of an answer; default: 128")
    add("--repeats", type=positive, help="of everything; default: 3")
    add("--pack", action="store_true", help="prepack the target's weights, for every method, plain decoding too")
    both = "decode in every way but Transformers' own with and without compilation, plain decoding too"
    add("--compile", action="store_true", help=both)
    _add_invariant(add, "also decode in every way but Transformers' own, plainly too,")
    add("--threads", type=positive, help="CPU threads; default: as torch chooses")
    add("--accept-noise", action="store_true", help="measure even on a noisy machine; the results say so")


def _add_serve(parser: argparse.ArgumentParser) -> None:
    add = _shared(parser, "--dtype", "--quantization", "--device", "--pack")
    add("targets", type=model, nargs="+", metavar="TARGET", help="folder or Hub id; several are served by name")
    add("--head", type=model, action="append", help=f"{HEAD}; one per target, in their order")
    told = "what clients call a target instead; one per target, in their order. A folder's own name does, too"
    add("--served-model-name", action="append", metavar="NAME", help=told)
    named = "folder or Hub id of a policy, 'auto' (the default), or total_tokens,depth,top_k[,lookup]"
    add("--policy", default="auto", help=named)
    compiled = "compiled steps: when they pay, or not"
    add("--compile", choices=COMPILE, default="never", help=compiled)
    _add_invariant(add, "answer every request")
    remembered = "remember the answers to each API key, and draft from them for that key alone"
    add("--memory", action="store_true", help=remembered)
    add("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, this machine only)")
    add("--port", type=int, default=8000, help="port; 0 takes a free one (default: 8000)")


def _add_compile(parser: argparse.ArgumentParser) -> None:
    add = _shared(parser, "target", "--dtype", "--quantization", "--pack")
    add("heads", type=model, nargs="*", metavar="head", help=HEAD)
    add("--threads", type=positive, help="CPU threads of the calls; default: as torch chooses")
    add("--rows", type=positive, default=1, help="prompts of a call; 2 stands for any batch (default: 1)")
    add("--only-as", help=argparse.SUPPRESS)  # raise if the loaded model has another identity


def _add_cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clear", action="store_true", help="remove it")


def model(text: str) -> str:
    """Return `text` if it is a folder or could be a Hub id; raise for any other path."""
    if (text.count("/") > 1 or text.startswith(("/", ".", "~"))) and not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is no folder and no Hub id (NAME or OWNER/NAME). Check the path.")
    return text


def dataset(text: str) -> str:
    """Return `text` unless it is named like a file of conversations that does not exist."""
    if text.endswith((".json", ".jsonl")) and not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text!r}. Check the path, or pass a dataset's Hub id.")
    return text


def temperature(text: str) -> float:
    """Parse a finite number of at least 0."""
    value = float(text)  # if `text` is no number, argparse reports it
    if not 0.0 <= value < math.inf:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no temperature. Write 0 for greedy decoding, or a number above 0."
        )
    return value


def shape(text: str) -> "TreeShape":
    """Parse total_tokens,depth,top_k[,lookup], such as `8,4,2`."""
    from ..tree import TreeShape  # imports PyTorch

    try:
        return TreeShape(*(int(part) for part in text.split(",")))
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no shape. Write total_tokens,depth,top_k as in 8,4,2."
        ) from error


def device(text: str) -> str:
    """Return `text` if it names a device that PyTorch can use here; otherwise raise."""
    if text.startswith("meta"):
        raise argparse.ArgumentTypeError(f"{text!r} is no device that computes. Write cpu, or leave it out.")
    if text == "cpu":
        return text
    import torch

    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no device here ({error}). Write cpu, or leave it out."
        ) from error
    return text


def quantization(text: str) -> str:
    """Return `text` if it names a quantization, or begins like a Transformers config in JSON; otherwise raise."""
    if text not in QUANTIZATIONS and not text.startswith("{"):
        raise argparse.ArgumentTypeError(f"{text!r} is no quantization. Write {', '.join(QUANTIZATIONS)}.")
    return text


def positive(text: str) -> int:
    """Parse an integer above 0."""
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no integer above 0.")
    return int(text)


_SHARED: dict[str, dict[str, Any]] = {  # arguments of several commands
    "target": {"type": model, "help": "folder or Hub id of the target"},
    "head": {"type": model, "nargs": "?", "help": f"{HEAD}; without one, drafts by lookup"},
    "--dtype": {"choices": DTYPES, "metavar": "DTYPE", "help": "auto, bfloat16, ...; default on a CPU: float32"},
    "--quantization": {
        "type": quantization,
        "metavar": "|".join(QUANTIZATIONS),
        "help": "load the target quantized, in bfloat16: int8 and int4 by torchao, nf4 by bitsandbytes",
    },
    "--device": {"type": device, "help": "default: cuda if available, or cpu"},
    "--pack": {"action": "store_true", "help": "prepack the target's weights first, as `prepack` does"},
    "--revision": {"help": "of a draft head"},
    "--split": {"default": "train", "help": "of a dataset from the Hub"},
    "--json": {"action": "store_true", "help": "print the result as one JSON object"},
}


def _shared(parser: "argparse.ArgumentParser | argparse._ArgumentGroup", *names: str) -> Callable[..., object]:
    """Add the arguments `names` to a parser, as `_SHARED` defines them; return the parser's `add_argument`."""
    for name in names:
        parser.add_argument(name, **_SHARED[name])
    return parser.add_argument


def _add_invariant(add: Callable[..., object], what: str) -> None:
    add("--invariant", action="store_true", help=f"{what} in the invariant mode: drafts never change the text")
