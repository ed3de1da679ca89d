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
from typing import TYPE_CHECKING, TypeAlias

from . import quiet


if TYPE_CHECKING:
    from ..tree import TreeShape


HEAD = "draft head, small model or assistant for the target, by folder or Hub id; or mtp, for the target's MTP layers"
PROMPT_LOOKUP, EAGLE = "prompt-lookup", "eagle"
BENCH_METHODS = {PROMPT_LOOKUP: "Transformers' prompt lookup", EAGLE: "EAGLE-3's published trees"}
_JSON = "print the result as one JSON object"
_Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand and return the exit status: 0, 1 if it found a fault, 2 if it failed, 130 after Ctrl-C."""
    args = make_parser().parse_args(arguments)
    try:
        if args.command == "bench":  # measure the load now: later it would include this process loading PyTorch
            args.load = quiet.checked_load("accept_noise" in args)
        if "torch" not in sys.modules:
            print(f"resps {args.command}: loading PyTorch and Transformers ...", file=sys.stderr, flush=True)
        status: int = import_module(f".{args.command}", __package__).run(args)
    except (ValueError, OSError) as error:
        print(f"resps {args.command}: {in_flags(str(error), args)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"resps {args.command}: {f'stopped {interrupt}'.rstrip()}.", file=sys.stderr)
        return 130
    return status


_FLAGS = {  # option of a command -> (words in the library's error messages, words that replace them)
    "invariant": (
        ("pass `invariant=False`", "leave out `--invariant`"),
        ("leave out `invariant=True`", "leave out `--invariant`"),
        ("`invariant=True`", "`--invariant`"),
    ),
    "compile": (
        ("Call `generate` with `compile=False`", "Leave out `--compile`"),
        ("Leave out `compile`", "Leave out `--compile`"),
        ("`compile=True`", "`--compile`"),
    ),
    "dtype": (("Load the model in float32", "Pass `--dtype float32`"),),
    "pack": (("Call `prepack(model)`", "Pass `--pack`"),),
}


def in_flags(message: str, args: argparse.Namespace) -> str:
    """Rewrite an error message: replace Python arguments such as `compile=True` by options such as `--compile`."""
    for option in _FLAGS.keys() & vars(args).keys():
        for keyword, flag in _FLAGS[option]:
            message = message.replace(keyword, flag)
    return message


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of all subcommands."""
    parser = argparse.ArgumentParser("resps", description="Lossless draft trees for Transformers.")
    parser.add_argument("--version", action="version", version=f"transformers-resps {version('transformers-resps')}")
    commands = parser.add_subparsers(dest="command", required=True)
    adding = _add_doctor, _add_inspect, _add_calibrate, _add_verify, _add_bench, _add_serve, _add_compile, _add_cache
    for add_command in adding:
        add_command(commands)
    return parser


def _add_doctor(commands: _Commands) -> None:
    told = "check that a head or MTP layers are read with the settings they were trained with"
    parser = commands.add_parser("doctor", help=told)
    _add_target_options(parser)
    _add_question_options(parser, "without assistant turns the target writes the answers")
    add = parser.add_argument
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
    add("--json", action="store_true", help=_JSON)


def _add_inspect(commands: _Commands) -> None:
    parser = commands.add_parser("inspect", help="write one output as an HTML page: trees, decisions, times")
    _add_target_options(parser)
    parser.add_argument("head", type=model, nargs="?", help=HEAD)
    parser.add_argument("--prompt", required=True, help="the user's message to the target")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE.html", help="the HTML page to write")
    parser.add_argument(
        "--policy",
        help="auto, total_tokens,depth,top_k[,lookup], or a policy's folder or Hub id; default: the head's tree",
    )
    parser.add_argument("--max-new-tokens", type=positive, default=128)
    parser.add_argument("--temperature", type=temperature, default=0.0, help="default: 0, which is greedy")
    parser.add_argument("--seed", type=int, default=0, help="random seed of both outputs, if tokens are sampled")
    _add_invariant_option(parser.add_argument, "decode, plainly and with drafts,")


def _add_calibrate(commands: _Commands) -> None:
    parser = commands.add_parser(
        "calibrate", help="measure what steps cost on this machine, and whether drafting can pay"
    )
    _add_target_options(parser)
    parser.add_argument("head", type=model, nargs="?", help=HEAD)
    parser.add_argument("--pack", action="store_true", help="prepack the target's weights first, as `prepack` does")
    _add_invariant_option(parser.add_argument, "measure steps")
    parser.add_argument("--refresh", action="store_true", help="measure again even if a table is stored")
    parser.add_argument("--json", action="store_true", help=_JSON)


def _add_verify(commands: _Commands) -> None:
    parser = commands.add_parser(
        "verify", help="check that the output with a draft head is the model's own; prints a report"
    )
    _add_target_options(parser)
    _add_question_options(parser, "its first user turns are the prompts")
    add = parser.add_argument
    add("head", type=model, nargs="?", help=f"{HEAD}; without one, drafts by lookup")
    named = "folder or Hub id of a policy, 'auto', or total_tokens,depth,top_k[,lookup]; default: the head's tree"
    add("policy", nargs="?", help=named)
    add("--prompts", type=positive, default=4, help="number of prompts (default: 4)")
    add("--seeds", type=positive, default=4, help="sampled outputs per sampling setting (default: 4)")
    add("--max-new-tokens", type=positive, default=32, help="length of each compared output (default: 32)")
    _add_invariant_option(add, "compare")
    add("--pack", action="store_true", help="prepack the target's weights first, as `prepack` does")
    add("--revision", help="of a draft head")
    add("--json", action="store_true", help=_JSON)


def _add_bench(commands: _Commands) -> None:
    parser = commands.add_parser("bench", help="policies, trees and plain decoding in turn, and which of them to use")
    add_bench_options(parser, BENCH_METHODS)
    parser.add_argument("--json", action="store_true", help="print what results.json holds, instead of the table")
    drawn = "also draw the ratios with their intervals, in ratios.svg beside the table"
    parser.add_argument("--plot", action="store_true", help=drawn)


def add_bench_options(parser: argparse.ArgumentParser, choices: Mapping[str, str]) -> None:
    """Add an option for each field of `BenchConfig`; `choices` are the methods that `--methods` accepts."""
    parser.argument_default = argparse.SUPPRESS  # leave out options that are not given: the config has the defaults
    add = parser.add_argument
    add("target", type=model, help="folder or Hub id of the target")
    add("head", type=model, nargs="?", default=None, help=f"{HEAD}; without one, drafts by lookup")
    add("--revision", help="of a draft head")
    add("--output", type=Path, help="folder for the results; default: results/bench")

    add = parser.add_argument_group("methods to compare (plain decoding is always included)").add_argument
    add("--policy", nargs="+", dest="policies", metavar="POLICY", help="'auto', folders or Hub ids; default: auto")
    named = f"besides the policies: {', '.join(choices.values())}; default: all"
    add("--methods", nargs="*", choices=tuple(choices), help=named)
    add("--shapes", nargs="+", type=shape, help="also these fixed trees: total_tokens,depth,top_k[,lookup]")
    add("--draft-model", metavar="ID", help="also Transformers' assisted generation with this model")

    add = parser.add_argument_group("prompts").add_argument
    layouts = ".jsonl or .json with turns, messages or prompt, or a Hub id; all user turns are answered"
    add("--dataset", nargs="+", required=True, dest="datasets", metavar="FILE_OR_ID", help=layouts)
    add("--split", help="of datasets from the Hub; default: test")
    add("--limit", type=positive, help="prompts per dataset, spread evenly over it; default: 10")

    add = parser.add_argument_group("conditions").add_argument
    greedy = "0 (the default) is greedy"
    add("--temperature", nargs="+", type=temperature, dest="temperatures", metavar="T", help=greedy)
    add("--max-new-tokens", type=positive, help="of an answer; default: 128")
    add("--repeats", type=positive, help="of everything; default: 3")
    _add_loading_options(add)
    add("--pack", action="store_true", help="prepack the target's weights, for every method, plain decoding too")
    both = "decode in every way but Transformers' own with and without compilation, plain decoding too"
    add("--compile", action="store_true", help=both)
    _add_invariant_option(add, "also decode in every way but Transformers' own, plainly too,")
    add("--threads", type=positive, help="CPU threads; default: as torch chooses")
    add("--accept-noise", action="store_true", help="measure even on a noisy machine; the results say so")


def _add_serve(commands: _Commands) -> None:
    parser = commands.add_parser("serve", help="answer requests of OpenAI's API, one at a time")
    add = parser.add_argument
    add("targets", type=model, nargs="+", metavar="TARGET", help="folder or Hub id; several are served by name")
    add("--head", type=model, action="append", help=f"{HEAD}; one per target, in their order")
    told = "what clients call a target instead; one per target, in their order. A folder's own name does, too"
    add("--served-model-name", action="append", metavar="NAME", help=told)
    named = "folder or Hub id of a policy, 'auto' (the default), or total_tokens,depth,top_k[,lookup]"
    add("--policy", default="auto", help=named)
    compiled = "compiled steps: when they pay, or not"
    add("--compile", choices=("auto", "always", "never"), default="never", help=compiled)
    _add_loading_options(add)
    add("--pack", action="store_true", help="prepack the targets' weights first, as `prepack` does")
    _add_invariant_option(add, "answer every request")
    remembered = "remember the answers to each API key, and draft from them for that key alone"
    add("--memory", action="store_true", help=remembered)
    add("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, this machine only)")
    add("--port", type=int, default=8000, help="port; 0 takes a free one (default: 8000)")


def _add_compile(commands: _Commands) -> None:
    parser = commands.add_parser("compile", help="compile a target's steps on a CPU, for later processes")
    add = parser.add_argument
    add("target", type=model, help="folder or Hub id of the target")
    add("heads", type=model, nargs="*", metavar="head", help=HEAD)
    add("--dtype", type=dtype, help="auto, float32 (the default), bfloat16 or float16")
    add("--threads", type=positive, help="CPU threads of the calls; default: as torch chooses")
    add("--rows", type=positive, default=1, help="prompts of a call; 2 stands for any batch (default: 1)")
    add("--pack", action="store_true", help="prepack the target's weights first, as calls do that have them so")
    add("--only-as", help=argparse.SUPPRESS)  # identity of the model that must be compiled


def _add_cache(commands: _Commands) -> None:
    parser = commands.add_parser("cache", help="show the compiled code that is kept for later processes")
    parser.add_argument("--clear", action="store_true", help="remove it")


def model(text: str) -> str:
    """Accept an existing folder, or a text that could be a Hub id."""
    if (text.count("/") > 1 or text.startswith(("/", ".", "~"))) and not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is no folder and no Hub id (NAME or OWNER/NAME). Check the path.")
    return text


def temperature(text: str) -> float:
    """Parse a finite number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
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


def dtype(text: str) -> str:
    """Accept "auto", or the name of a dtype in which models can be loaded."""
    if text not in ("auto", "float64", "float32", "bfloat16", "float16"):
        raise argparse.ArgumentTypeError(f"{text!r} is no supported dtype. Write auto, float32, bfloat16 or float16.")
    return text


def device(text: str) -> str:
    """Accept the name of a device that PyTorch can use here."""
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


def positive(text: str) -> int:
    """Parse an integer above 0."""
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no integer above 0.")
    return int(text)


def _add_target_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", type=model, help="folder or Hub id of the target")
    _add_loading_options(parser.add_argument)


def _add_loading_options(add: Callable[..., object]) -> None:
    add("--dtype", type=dtype, help="auto, float32 (the default on a CPU), bfloat16 or float16")
    add("--device", type=device, help="default: cuda if available, or cpu")


def _add_invariant_option(add: Callable[..., object], what: str) -> None:
    mode = "in the invariant mode: the same text in any dtype, whatever drafts"
    add("--invariant", action="store_true", help=f"{what} {mode}")


def _add_question_options(parser: argparse.ArgumentParser, of_dataset: str) -> None:
    parser.add_argument("--dataset", help=f".json, .jsonl or Hub id of conversations; {of_dataset}")
    parser.add_argument("--split", default="train", help="of a dataset from the Hub")
