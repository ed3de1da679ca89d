"""Other libraries that decode the same target with their own loops; each is imported when it is asked for.

OpenVINO GenAI decodes plainly and with its prompt lookup, llama.cpp plainly and in its own arithmetic; both read a
copy of the target that another program converts, with weights in its precision or in 8 or 4 bits. vLLM decodes
plainly, with its prompt lookup or with our head, each in a process of its own. None of them takes processors or
streamers.
"""

import atexit
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import torch
from torch import Tensor

from transformers_resps.heads import DraftHead
from transformers_resps.tools.methods import Answer, Method


MODULES = {"openvino": "openvino_genai", "llama.cpp": "llama_cpp"}
PEERS = tuple(MODULES)  # what `--peers` takes
BUILT = {"llama.cpp": "llama"}  # which pip compiles for minutes: in an extra of its own
VLLM_WAYS = ("vLLM (plain)", "vLLM (prompt lookup)", "vLLM (head)")
# Bits of a weight, 0 for the target's own precision -> names of the methods.
OPENVINO_WAYS = {
    bits: (f"OpenVINO{kind} (plain)", f"OpenVINO{kind} (prompt lookup)")
    for bits, kind in ((0, ""), (8, " int8"), (4, " int4"))
}
LLAMA_CPP_WAYS = {0: ("llama.cpp, its own arithmetic",), 8: ("llama.cpp Q8_0",), 4: ("llama.cpp Q4_0",)}
CONVERTED, GGUF = "-openvino", ".gguf"  # after the name of the target's folder, and before `.gguf` "-Q8_0"
_LOOKED_UP, _LONGEST_MATCH = 10, 3  # as in OpenVINO's documentation; Transformers' prompt lookup drafts ten, too
_VLLM_DRAFTED = 3  # tokens of a step from a head, as in most of vLLM's examples
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


def load_peers(names: Sequence[str], target: Any, bits: int = 0) -> list[Peer]:
    """Return the methods of other libraries, of `PEERS`, which share a target, with weights of 8 or 4 `bits` if given.

    Raises:
        ImportError: one is not installed; see `check_installed`.
        ValueError: one cannot decode this target.
    """
    found: dict[str, AnswerFn] = {}
    for name in names:
        found |= {"openvino": _openvino, "llama.cpp": _llama_cpp}[name](target, bits)
    return [Peer(name, answer, effort=6, seed_exact=False) for name, answer in found.items()]


def check_installed(names: Sequence[str]) -> None:
    """Raises ValueError naming those of `names` that cannot be imported."""
    missing = {MODULES[name]: BUILT.get(name, "peers") for name in names if find_spec(MODULES[name]) is None}
    if missing:
        raise ValueError(
            f"--peers needs {' and '.join(missing)}, not installed here. Run `pip install "
            f"'.[{','.join(sorted(set(missing.values())))}]'`, or leave it out of --peers."
        )


def peer_versions(names: Sequence[str]) -> dict[str, str]:
    """Return the versions of the libraries that are compared."""
    distributions = packages_distributions()
    return {name: version(distributions[MODULES[name]][0]) for name in names}


def _openvino(target: Any, bits: int) -> dict[str, AnswerFn]:
    """Return name in the table -> how it answers, computing in the target's precision, keys and values too.

    Raises:
        ValueError: the target is not converted, or not on a CPU.
    """
    weights = f"int{bits}" if bits else "fp16"
    folder = Path(f"{str(target.name_or_path).rstrip('/')}{CONVERTED}{f'-{weights}' if bits else ''}")
    if not folder.is_dir():
        raise ValueError(
            f"`--peers openvino` needs the converted target in {folder}, which is no folder. Where optimum-intel is "
            f"installed, run `optimum-cli export openvino --model {target.name_or_path} --task "
            f"text-generation-with-past --weight-format {weights} {folder}`."
        )
    if target.device.type != "cpu" or target.dtype not in _PRECISIONS:
        raise ValueError(
            f"`--peers openvino` is measured on a CPU in float32, bfloat16 or float16, but the target is on "
            f"{target.device} in {target.dtype}. Pass `--device cpu` and such a `--dtype`."
        )
    plain, lookup = OPENVINO_WAYS[bits]
    pipeline = partial(_openvino_pipeline, folder, target.dtype)
    return {plain: pipeline(), lookup: pipeline(prompt_lookup=True)}


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
            settings.num_assistant_tokens, settings.max_ngram_size = _LOOKED_UP, _LONGEST_MATCH
        found = pipeline.generate(openvino.Tensor(input_ids.numpy()), settings)
        told = found.perf_metrics.raw_metrics
        prefill = _MICROSECOND * told.m_times_to_first_token[0]
        return Answer(found.tokens[0], target_forwards=len(told.token_infer_durations), prefill_seconds=prefill)

    return answer


def _llama_cpp(target: Any, bits: int) -> dict[str, AnswerFn]:
    """Return llama.cpp, whose weights have the file's precision, and keys and values 16 bits.

    Raises:
        ValueError: the target is not converted, or not on a CPU.
    """
    whole = Path(f"{str(target.name_or_path).rstrip('/')}{GGUF}")
    precision = _PRECISIONS.get(target.dtype, "bf16")
    file, converting = whole, f"python convert_hf_to_gguf.py {target.name_or_path} --outtype {precision} --outfile"
    if bits:
        file, converting = whole.with_name(f"{whole.stem}-Q{bits}_0{GGUF}"), f"llama-quantize {whole}"
    if not file.is_file():
        raise ValueError(
            f"`--peers llama.cpp` needs the converted target in {file}, which is no file. In a clone of it, run "
            f"`{converting} {file}{f' Q{bits}_0' if bits else ''}`."
        )
    if target.device.type != "cpu":
        raise ValueError(
            f"`--peers llama.cpp` is measured on a CPU, but the target is on {target.device}. Pass `--device cpu`."
        )
    from llama_cpp import Llama

    threads, context = torch.get_num_threads(), target.config.get_text_config().max_position_embeddings
    options: dict[str, Any] = {"n_threads": threads, "n_threads_batch": threads, "flash_attn": True, "verbose": False}
    model: Any = Llama(str(file), n_ctx=context, **options)
    atexit.register(model.close)  # left to the interpreter's end, it fails

    def answer(input_ids: Tensor, max_new_tokens: int, temperature: float, ends: Sequence[int]) -> Answer:
        model.reset()  # no other method keeps what an earlier call has read
        if temperature:
            model.set_seed(int(torch.randint(2**31, ())))  # of the seed that the bench has set
        started, tokens, first = time.perf_counter(), [], 0.0
        for token in model.generate(input_ids[0].tolist(), temp=temperature, top_k=0, top_p=1.0, min_p=0.0):
            first = first or time.perf_counter() - started
            tokens.append(token)
            if token in ends or len(tokens) == max_new_tokens:
                break
        return Answer(tokens, target_forwards=len(tokens), prefill_seconds=first)

    return dict.fromkeys(LLAMA_CPP_WAYS[bits], answer)


class Vllm:
    """vLLM in a process of its own; a context that ends it. It needs another Transformers than we do.

    Args:
        python: of an environment that has it, as `make vllm` makes one.
        options: of `vllm.LLM`.
        threads: that it computes with.

    Attributes:
        version: of vLLM.

    Raises:
        OSError: it cannot be started, or later: it ended; its own lines say why.
    """

    def __init__(self, python: Path, options: dict[str, Any], threads: int) -> None:
        cores = sorted(os.sched_getaffinity(0))[:threads]
        settings = {
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_PLUGINS": "",
        }
        not_ours = ("PYTHONPATH", "OMP_NUM_THREADS")
        alone = {name: value for name, value in os.environ.items() if name not in not_ours}
        command = [python, Path(__file__).with_name("vllm_side.py")]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=alone | settings
        )
        self.version = str(self.ask(options)["version"])

    def ask(self, told: dict[str, Any]) -> dict[str, Any]:
        """Send one line of `vllm_side`, and return its answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            print(json.dumps(told), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.end()
            raise OSError("vLLM ended before it had answered; its own lines above say why.")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def answer(self, input_ids: Tensor, max_new_tokens: int, temperature: float, ends: Sequence[int]) -> Answer:
        seed = int(torch.randint(2**31, ())) if temperature else None  # of the seed that the bench has set
        sampling = {
            "temperature": temperature,
            "max_tokens": max_new_tokens,
            "seed": seed,
            "stop_token_ids": list(ends),
        }
        told = self.ask({"prompt": input_ids[0].tolist(), "sampling": sampling})
        return Answer(told["tokens"], target_forwards=told["forwards"], prefill_seconds=told["first_seconds"])

    def end(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


@contextmanager
def vllm_peers(
    python: Path, target: Any, head: DraftHead, names: Sequence[str] = VLLM_WAYS
) -> Iterator[tuple[list[Peer], str]]:
    """Yield vLLM's ways as methods, each with a process of its own, and its version.

    Args:
        python: see `Vllm`.
        target: loaded from a folder, on a CPU.
        head: that one of them drafts with.
        names: of the ways, in the order in which they start.

    Raises:
        OSError: vLLM cannot be started.
    """
    shared = {"model": str(target.name_or_path), "dtype": str(target.dtype).removeprefix("torch.")}
    shared |= {"max_model_len": target.config.max_position_embeddings}
    lookup = {"method": "ngram", "num_speculative_tokens": _LOOKED_UP, "prompt_lookup_max": _LONGEST_MATCH}
    with TemporaryDirectory() as folder, ExitStack() as running:
        head.save_pretrained(folder, format="speculators")
        drafts = {"method": "eagle3", "num_speculative_tokens": _VLLM_DRAFTED, "model": folder}
        ways = dict(zip(VLLM_WAYS, (None, lookup, drafts), strict=True))
        engines = {
            name: running.enter_context(
                Vllm(python, shared | {"speculative_config": ways[name]}, torch.get_num_threads())
            )
            for name in names
        }
        peers = [Peer(name, engine.answer, effort=6, seed_exact=False) for name, engine in engines.items()]
        yield peers, next(iter(engines.values())).version
